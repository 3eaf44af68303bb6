"""How long the loss and its gradients take, against liger-kernel, TRL, plain torch and the bare matrix products.

`python -m benchmarks.speed` runs all of them in one process, in turns, on the shapes of real heads, prints the median
time of each, its ratio to the bare products (the floor) and to ours, and the most memory above inputs and gradients
(`benchmarks.memory`, in a process of its own); and writes them as CSV and as a plot. Of the divergences that were not
asked for, ours has a line each. `--divergences cross_entropy` compares with full logits and with three bare products.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.memory import measure_apart
from benchmarks.methods import METHODS, OF_LABELS, SHAPES, Floor, Inputs, Method, Shape, make_inputs, offers
from sdft_kernels.divergences import DIVERGENCES

FLOOR = "bare products"
OURS = "sdft-kernels"


@dataclass(frozen=True)
class Timing:
    """One row of the table: seconds are medians over rounds; mebibytes, where measured, above inputs and gradients."""

    shape: str
    head: str
    divergence: str
    method: str
    seconds: float
    to_floor: float
    to_ours: float
    mebibytes: float | None = None


def seconds_of(method: Method, inputs: Inputs, divergence: str) -> float:
    inputs.clear()
    gc.collect()
    started = time.perf_counter()
    method(inputs, divergence)
    return time.perf_counter() - started


def compare(
    shape: Shape,
    *,
    trainable_head: bool,
    divergence: str,
    methods: list[str],
    rounds: int,
    progress: tqdm | None = None,
) -> list[Timing]:
    """Every method in turns, `rounds` times after one unmeasured turn (which also compiles what compiles)."""
    inputs = make_inputs(shape, trainable_head=trainable_head)
    runs: dict[str, Method] = {FLOOR: Floor(inputs)}
    runs |= {name: METHODS[name] for name in methods if offers(name, divergence)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, method in runs.items():
            seconds = seconds_of(method, inputs, divergence)
            if turn:
                taken[name].append(seconds)
            if progress is not None:
                progress.update()
    medians = {name: statistics.median(times) for name, times in taken.items()}
    head = "trainable" if trainable_head else "frozen"
    return [
        Timing(shape.name, head, divergence, name, seconds, seconds / medians[FLOOR], seconds / medians[OURS])
        for name, seconds in medians.items()
    ]


def with_memory(row: Timing, shape: Shape, threads: int) -> Timing:
    """The row with the most memory that its method takes; the floor's arrays are there before."""
    if row.method == FLOOR:
        return row
    trainable = row.head == "trainable"
    mebibytes = measure_apart(shape, row.method, row.divergence, trainable_head=trainable, threads=threads)
    return replace(row, mebibytes=mebibytes)


def table(rows: list[Timing]) -> str:
    columns = ("shape", "head", "divergence", "method", "ms", "× floor", "× ours", "peak MiB")
    lines = ["{:14} {:9} {:16} {:15} {:>8} {:>8} {:>7} {:>9}".format(*columns)]
    lines += [
        f"{row.shape:14} {row.head:9} {row.divergence:16} {row.method:15} {row.seconds * 1e3:8.0f} "
        f"{row.to_floor:8.2f} {row.to_ours:7.2f} {'' if row.mebibytes is None else round(row.mebibytes):>9}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Timing], path: Path) -> None:
    """Time over the floor's: a panel for each head, a group of bars for each shape and divergence."""
    heads = list(dict.fromkeys(row.head for row in rows))
    cases = list(dict.fromkeys((row.shape, row.divergence) for row in rows))
    several = len({divergence for _, divergence in cases}) > 1
    names = {case: "\n".join(case if several else case[:1]).replace("_", " ") for case in cases}
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name != FLOOR]
    size = (max(5.0, 2.2 * len(cases)) * len(heads), 4.2)
    with plots.panels(path, 1, len(heads), size, sharey=True) as axes:
        for axis, head in zip(axes[0], heads, strict=True):
            heights = {
                method: {names[r.shape, r.divergence]: r.to_floor for r in rows if (r.method, r.head) == (method, head)}
                for method in methods
            }
            plots.bars(axis, list(names.values()), heights)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_title(f"{head} head: time over the bare products'")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each method (default 5)")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--heads", nargs="+", choices=["trainable", "frozen"], default=["trainable", "frozen"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--divergences",
        nargs="+",
        choices=(*DIVERGENCES, *OF_LABELS),
        default=["reverse_kl"],
        help="to compare every method on, every shape and head (default reverse_kl, which the bars are for); of the "
        "other divergences ours alone is run, on the first shape and head, unless only losses of labels are asked for",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "speed")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    methods = list(dict.fromkeys([OURS, *given.methods]))
    shapes = [shape for shape in SHAPES if shape.name in given.shapes]
    cases = [(shape, head, d, methods) for shape in shapes for head in given.heads for d in given.divergences]
    if not set(given.divergences) <= set(OF_LABELS):
        cases += [(shapes[0], given.heads[0], d, [OURS]) for d in DIVERGENCES if d not in given.divergences]
    offered = [sum(offers(m, d) for m in chosen) for _, _, d, chosen in cases]
    rows: list[Timing] = []
    with tqdm(total=sum((1 + count) * (given.rounds + 1) + count for count in offered), unit="run") as progress:
        for shape, head, divergence, chosen in cases:
            found = compare(
                shape,
                trainable_head=head == "trainable",
                divergence=divergence,
                methods=chosen,
                rounds=given.rounds,
                progress=progress,
            )
            for row in found:
                rows.append(with_memory(row, shape, given.threads))
                progress.update(row.method != FLOOR)
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)
    draw([row for row in rows if row.divergence in given.divergences], given.plot)


if __name__ == "__main__":
    main()
