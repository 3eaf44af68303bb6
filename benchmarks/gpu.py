"""What `python -m benchmarks.gpu_static` predicts, measured where there is a GPU: `python -m benchmarks.gpu`.

The loss and its gradients in bfloat16, ours, TRL and Liger in turns, timed by CUDA events, beside the time that the
roofline predicts for this GPU, and the most memory above inputs and returned gradients beside the ledger's.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks import rows as files
from benchmarks.ledger import COMPARED, OURS, count
from benchmarks.methods import METHODS, Inputs, make_inputs
from benchmarks.roofline import GPUS, LABEL, MODELS, Gpu, Model, seconds

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Measured:
    """One row of the table; times are medians over rounds. The prediction is None for a GPU that has none."""

    gpu: str
    model: str
    head: str
    tokens: int
    method: str
    milliseconds: float
    predicted_milliseconds: float | None
    workspace_mebibytes: float
    predicted_workspace_mebibytes: float
    ours_over_this: float
    predicted_ours_over_this: float | None


def milliseconds_of(method: str, inputs: Inputs) -> float:
    """One call and its backward pass, from the first launch to the end of the last."""
    inputs.clear()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    METHODS[method](inputs, "reverse_kl")
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended)


def workspace_of(method: str, inputs: Inputs) -> float:
    """Mebibytes above inputs and returned gradients."""
    inputs.clear()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    METHODS[method](inputs, "reverse_kl")
    gradients = [g for g in (inputs.student_hidden.grad, inputs.student_weight.grad) if g is not None]
    returned = sum(g.numel() * g.element_size() for g in gradients)
    return (torch.cuda.max_memory_allocated() - before - returned) / MEBIBYTE


def compare(
    model: Model, tokens: int, *, trainable_head: bool, methods: list[str], rounds: int, progress: tqdm
) -> list[Measured]:
    """Every method in turns, `rounds` times after one unmeasured turn, which compiles what compiles."""
    shape = model.at(tokens)
    inputs = make_inputs(shape, trainable_head=trainable_head, dtype=torch.bfloat16, device="cuda")
    workspaces: dict[str, float] = {}
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(rounds + 2):
        for method in methods:
            if turn == 1:
                workspaces[method] = workspace_of(method, inputs)
            else:
                milliseconds = milliseconds_of(method, inputs)
                if turn:
                    taken[method].append(milliseconds)
            progress.update()
    medians = {method: statistics.median(times) for method, times in taken.items()}
    ledgers = {method: count(method, shape, trainable_head=trainable_head) for method in methods}
    gpu = this_gpu()
    predicted = {method: None if gpu is None else seconds(ledgers[method], gpu) * 1e3 for method in methods}
    return [
        Measured(
            gpu=torch.cuda.get_device_name(),
            model=model.name,
            head="trainable" if trainable_head else "frozen",
            tokens=tokens,
            method=method,
            milliseconds=medians[method],
            predicted_milliseconds=predicted[method],
            workspace_mebibytes=workspaces[method],
            predicted_workspace_mebibytes=ledgers[method].workspace / MEBIBYTE,
            ours_over_this=medians[OURS] / medians[method],
            predicted_ours_over_this=_ratio(predicted[OURS], predicted[method]),
        )
        for method in methods
    ]


def this_gpu() -> Gpu | None:
    """The roofline's entry for the GPU that is there."""
    name, gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / 2**30
    known = next((gpu for gpu in GPUS if gpu.name in re.split(r"[\s-]", name)), None)
    # Of an A100 and an H100 there are slower ones, with 40 GB, on PCIe, or as the two of an NVL.
    slower = gib < 60 or any(word in name for word in ("PCIe", "NVL", "MIG"))
    return None if slower else known


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def table(rows: list[Measured]) -> str:
    lines = [
        f"columns marked * are {LABEL}",
        f"{'model':14} {'head':9} {'tokens':>6} {'method':15} {'ms':>9} {'ms *':>9} {'MiB':>7} {'MiB *':>7} "
        f"{'ours/this':>9} {'ours/this *':>11}",
    ]
    lines += [
        f"{row.model:14} {row.head:9} {row.tokens:6} {row.method:15} {row.milliseconds:9.3f} "
        f"{_shown(row.predicted_milliseconds):>9} {row.workspace_mebibytes:7.0f} "
        f"{row.predicted_workspace_mebibytes:7.0f} {row.ours_over_this:9.3f} {_shown(row.predicted_ours_over_this):>11}"
        for row in rows
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--heads", nargs="+", choices=["trainable", "frozen"], default=["trainable", "frozen"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16_384], help="(default 1k, 4k, 16k)")
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each method (default 5)")
    files.add_arguments(parser)
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu measures on a CUDA GPU, and torch sees none here; see benchmarks.gpu_static instead.")
    methods = list(dict.fromkeys([OURS, *given.methods]))
    cases = [(model, head, tokens) for model in given.models for head in given.heads for tokens in given.tokens]
    rows: list[Measured] = []
    with tqdm(total=len(cases) * len(methods) * (given.rounds + 2), unit="run") as progress:
        for model, head, tokens in cases:
            rows += compare(
                MODELS[model],
                tokens,
                trainable_head=head == "trainable",
                methods=methods,
                rounds=given.rounds,
                progress=progress,
            )
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)


if __name__ == "__main__":
    main()
