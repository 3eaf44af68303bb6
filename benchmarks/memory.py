"""The most memory the loss takes above its inputs and the gradients it returns, each method in a process of its own.

`python -m benchmarks.memory` reads the kernel's own high-water mark of resident memory, reset after a small warm-up
call, so that what libraries allocate once is not counted. It prints a table and writes it as CSV and as a plot.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.methods import METHODS, OF_LABELS, SHAPES, Inputs, Shape, make_inputs, offers
from sdft_kernels.divergences import DIVERGENCES

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Peak:
    """One row of the table."""

    shape: str
    tokens: int
    head: str
    method: str
    mebibytes: float


def resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at the most (VmHWM)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"this system's /proc/self/status has no {field}"
    return int(found.group(1)) * 1024


def gradient_bytes(inputs: Inputs) -> int:
    gradients = (inputs.student_hidden.grad, inputs.student_weight.grad)
    return sum(g.numel() * g.element_size() for g in gradients if g is not None)


def measure(shape: Shape, method: str, divergence: str, *, trainable_head: bool) -> float:
    """Peak mebibytes above inputs and returned gradients, in this process."""
    inputs = make_inputs(shape, trainable_head=trainable_head)
    small = make_inputs(Shape("warm-up", 8, shape.hidden, 1024), trainable_head=trainable_head)
    METHODS[method](small, divergence)
    del small
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    METHODS[method](inputs, divergence)
    return (resident("VmHWM") - before - gradient_bytes(inputs)) / MEBIBYTE


def measure_apart(
    shape: Shape, method: str, divergence: str = "reverse_kl", *, trainable_head: bool, threads: int
) -> float:
    """The same in a fresh process."""
    code = (
        "import torch; from benchmarks.memory import measure; from benchmarks.methods import Shape; "
        f"torch.set_num_threads({threads}); "
        f"print(measure({shape!r}, {method!r}, {divergence!r}, trainable_head={trainable_head}))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} on {shape} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def table(rows: list[Peak]) -> str:
    lines = [f"{'shape':14} {'tokens':>6} {'head':9} {'method':15} {'MiB above inputs and gradients':>30}"]
    lines += [f"{row.shape:14} {row.tokens:6} {row.head:9} {row.method:15} {row.mebibytes:30.0f}" for row in rows]
    return "\n".join(lines)


def draw(rows: list[Peak], path: Path) -> None:
    """A panel for each head, a group of bars for each shape and number of tokens."""
    heads = list(dict.fromkeys(row.head for row in rows))
    cases = list(dict.fromkeys((row.shape, row.tokens) for row in rows))
    names = {case: f"{case[0]}\n{case[1]} tokens" for case in cases}
    methods = list(dict.fromkeys(row.method for row in rows))
    size = (max(5.0, 2.2 * len(cases)) * len(heads), 4.2)
    with plots.panels(path, 1, len(heads), size, sharey=True) as axes:
        for axis, head in zip(axes[0], heads, strict=True):
            heights = {
                method: {names[r.shape, r.tokens]: r.mebibytes for r in rows if (r.method, r.head) == (method, head)}
                for method in methods
            }
            plots.bars(axis, list(names.values()), heights)
            axis.set_title(f"{head} head: MiB above inputs and gradients")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--heads", nargs="+", choices=["trainable", "frozen"], default=["trainable", "frozen"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--divergence", choices=(*DIVERGENCES, *OF_LABELS), default="reverse_kl")
    parser.add_argument("--tokens", type=int, nargs="+", help="instead of each shape's own number")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "memory")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    shapes = [s for s in SHAPES if s.name in given.shapes]
    if given.tokens:
        shapes = [Shape(s.name, tokens, s.hidden, s.vocab) for s in shapes for tokens in given.tokens]
    methods = [method for method in given.methods if offers(method, given.divergence)]
    cases = [(shape, head, method) for shape in shapes for head in given.heads for method in methods]
    rows = []
    for shape, head, method in tqdm(cases, unit="process"):
        trainable = head == "trainable"
        mebibytes = measure_apart(shape, method, given.divergence, trainable_head=trainable, threads=given.threads)
        rows.append(Peak(shape.name, shape.tokens, head, method, mebibytes))
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)
    draw(rows, given.plot)


if __name__ == "__main__":
    main()
