"""How time and memory of the loss grow with the number of tokens and with the vocabulary, over a factor of 32 each.

`python -m benchmarks.linearity` doubles one of them at a time, the other staying at 512 tokens or SmolLM2's 49,152
entries, and prints for each point the time (median), the nanoseconds a logit, and the memory above inputs and returned
gradients, taken in a process of its own. Time is linear where the nanoseconds a logit stay the same.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.memory import measure_apart
from benchmarks.methods import Shape, make_inputs, ours
from benchmarks.speed import seconds_of

HIDDEN = 576
TOKENS = [512 * 2**step for step in range(6)]
VOCABULARY = [8192 * 2**step for step in range(6)]
SHAPES = {
    "tokens": [Shape("tokens", tokens, HIDDEN, 49_152) for tokens in TOKENS],
    "vocabulary": [Shape("vocabulary", 512, HIDDEN, vocab) for vocab in VOCABULARY],
}


@dataclass(frozen=True)
class Point:
    """One shape of the series in which `growing` is doubled."""

    growing: str
    tokens: int
    vocabulary: int
    head: str
    seconds: float
    nanoseconds_per_logit: float
    mebibytes: float


def measure(shape: Shape, *, trainable_head: bool, rounds: int) -> Point:
    """The median of `rounds` runs after one that is not counted, and the memory of one more."""
    inputs = make_inputs(shape, trainable_head=trainable_head)
    seconds = statistics.median([seconds_of(ours, inputs, "reverse_kl") for _ in range(rounds + 1)][1:])
    del inputs
    threads = torch.get_num_threads()
    return Point(
        growing=shape.name,
        tokens=shape.tokens,
        vocabulary=shape.vocab,
        head="trainable" if trainable_head else "frozen",
        seconds=seconds,
        nanoseconds_per_logit=seconds * 1e9 / (shape.tokens * shape.vocab),
        mebibytes=measure_apart(shape, "sdft-kernels", trainable_head=trainable_head, threads=threads),
    )


def table(points: list[Point]) -> str:
    lines = [f"{'growing':10} {'head':9} {'tokens':>6} {'vocabulary':>10} {'s':>7} {'ns a logit':>10} {'MiB':>5}"]
    lines += [
        f"{p.growing:10} {p.head:9} {p.tokens:6} {p.vocabulary:10} {p.seconds:7.3f} "
        f"{p.nanoseconds_per_logit:10.2f} {p.mebibytes:5.0f}"
        for p in points
    ]
    return "\n".join(lines)


def draw(points: list[Point], path: Path) -> None:
    """Time above, memory below; growing tokens left, growing vocabulary right."""
    with plots.panels(path, 2, 2, (9, 6.5), sharey="row") as axes:
        for column, growing in enumerate(SHAPES):
            for head, colour in (("trainable", "#2a6fbb"), ("frozen", "#e07b39")):
                here = [p for p in points if (p.growing, p.head) == (growing, head)]
                if not here:
                    continue
                sizes = [getattr(p, growing) for p in here]
                linear = [here[0].seconds * size / sizes[0] for size in sizes]
                axes[0][column].plot(sizes, linear, color=colour, alpha=0.35, linestyle="--", label=f"linear, {head}")
                axes[0][column].plot(sizes, [p.seconds for p in here], "o", color=colour, label=f"{head} head")
                axes[1][column].plot(sizes, [p.mebibytes for p in here], "o-", color=colour)
            for axis in axes[:, column]:
                axis.set_xscale("log", base=2)
            axes[0][column].set(yscale="log", title=f"growing {growing}")
            axes[1][column].set(xlabel="tokens" if growing == "tokens" else "vocabulary entries")
        axes[1][0].set_ylim(0)  # once both columns, which share it, are drawn
        axes[0][0].set_ylabel("seconds")
        axes[1][0].set_ylabel("MiB above inputs and gradients")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linearity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each point (default 3)")
    parser.add_argument("--heads", nargs="+", choices=["trainable", "frozen"], default=["trainable", "frozen"])
    parser.add_argument("--most", type=int, default=32, help="grow up to this factor (default 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "linearity")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shapes = [s for series in SHAPES.values() for s in series[: given.most.bit_length()]]
    cases = [(head, shape) for head in given.heads for shape in shapes]
    points = [
        measure(shape, trainable_head=head == "trainable", rounds=given.rounds)
        for head, shape in tqdm(cases, unit="point")
    ]
    print(machine.heading(), table(points), sep="\n")
    files.write(points, given)
    draw(points, given.plot)


if __name__ == "__main__":
    main()
