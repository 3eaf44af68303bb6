"""Whether `sdft plan` is right: the planned peak of a step beside what torch's allocator held on a CPU.

`python -m benchmarks.plan_check` runs scoring, forward pass, loss and backward pass of one completion, in float32 and
with random weights, and counts what the allocator gave out above the models. It plans the same step, on tensors without
values. It prints a table and writes it as CSV and as a plot. The time a case takes does not matter, so other work may
go on beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedConfig

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.memory import MEBIBYTE
from sdft.planning.presets import config_of
from sdft.planning.pretend import Device
from sdft.planning.step import Lengths, Step
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments

PROMPT = 64
MODELS = ("SmolLM2-135M", "4 layers of 512")
Given: TypeAlias = tuple[PreTrainedConfig, str, LoraArguments, SDFTConfig]


@dataclass(frozen=True)
class Check:
    """One row of the table, in MiB above the models."""

    model: str
    tokens: int
    trains: str
    checkpointed: bool
    planned: float
    measured: float

    @property
    def off(self) -> float:
        """How far the plan is off, as a share of what was measured."""
        return self.planned / self.measured - 1


def planned(given: Given, lengths: Lengths) -> int:
    """The planned peak of a micro-batch in bytes, above what there is before; `given` are arguments of `Step`."""
    step = Step(*given, Device("cpu"))
    before = step.tracker.current
    batch, _ = step.batch(lengths)
    step.tracker.forget_peak()
    with step.device.planning():
        step.micro_batch(batch)
    return step.tracker.peak.total - before


def measured(given: Given, lengths: Lengths) -> int:
    """The same as torch's CPU allocator had it, with real tensors."""
    step = Step(*given, Device("cpu", real=True))
    batch, _ = step.batch(lengths)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, step.device.planning():
        step.micro_batch(batch)
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def check(model: str, tokens: int, rank: int, checkpointed: bool) -> Check:
    if model == MODELS[0]:
        config = config_of(model)
    else:
        config = LlamaConfig(
            vocab_size=32_768,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=8,
            tie_word_embeddings=True,
        )
    told = SDFTConfig(
        output_dir="unused", report_to="none", per_device_train_batch_size=1, activation_checkpointing=checkpointed
    )
    given = (config, "float32", LoraArguments(lora_rank=rank), told)
    lengths = Lengths(PROMPT, tokens, PROMPT)
    plan, found = planned(given, lengths) / MEBIBYTE, measured(given, lengths) / MEBIBYTE
    return Check(model, tokens, f"LoRA {rank}" if rank else "full", checkpointed, round(plan, 1), round(found, 1))


def table(rows: list[Check]) -> str:
    lines = [
        f"{'model':16} {'tokens':>6} {'trains':8} {'checkpointed':12} {'planned MiB':>11} {'measured':>9} {'off':>6}"
    ]
    for row in rows:
        case = f"{row.model:16} {row.tokens:6} {row.trains:8} {'yes' if row.checkpointed else 'no':12}"
        lines.append(f"{case} {row.planned:11.0f} {row.measured:9.0f} {row.off:6.1%}")
    return "\n".join(lines)


def draw(rows: list[Check], path: Path) -> None:
    with plots.panels(path, 1, 1, (6, 5)) as axes:
        axis = axes[0][0]
        for model in dict.fromkeys(row.model for row in rows):
            of_model = [row for row in rows if row.model == model]
            axis.plot([r.measured for r in of_model], [r.planned for r in of_model], "o", label=model)
        ends = [min(row.measured for row in rows), max(row.measured for row in rows)]
        axis.plot(ends, ends, color="grey", linestyle="--", label="the same")
        axis.set(xscale="log", yscale="log", xlabel="measured, MiB", ylabel="planned, MiB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_check", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="completion lengths")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 16], help="of the adapter; 0 trains all weights")
    parser.add_argument("--checkpointed", nargs="+", choices=("yes", "no"), default=["yes", "no"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "plan_check")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    cases = [
        (model, tokens, rank, checkpointed == "yes")
        for tokens in given.tokens
        for model in given.models
        for rank in given.ranks
        for checkpointed in given.checkpointed
    ]
    rows = []
    for case in tqdm(cases, unit="case"):
        rows.append(check(*case))
        files.write(rows, given)  # a run that is cut short leaves what it has
    print(machine.heading(), table(rows), sep="\n")
    draw(rows, given.plot)


if __name__ == "__main__":
    main()
