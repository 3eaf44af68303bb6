"""How exact the loss and its gradients are, against float64, beside liger-kernel, TRL and plain torch.

`python -m benchmarks.precision` takes SmolLM2's hidden states on its own rollouts, in float32 and in bfloat16,
computes each divergence by every method, and prints ‖x - ref‖ / ‖ref‖ against full logits in float64 from the same
(rounded) inputs. `float64 from float32 products` is what a float32 matrix product alone costs: its logits, and
float64 from there on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.methods import METHODS, Inputs, offers
from benchmarks.rollouts import smollm2_states
from sdft_kernels.divergences import DIVERGENCES
from sdft_kernels.reference import divergence_per_token

PRODUCTS_ALONE = "float64 from float32 products"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Errors:
    """One row of the report: relative errors."""

    dtype: str
    divergence: str
    method: str
    loss: float
    grad_hidden: float
    grad_weight: float


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()


def inputs_in(dtype: torch.dtype, states: tuple[Tensor, Tensor, Tensor]) -> Inputs:
    student, teacher, head = (tensor.detach().to(dtype) for tensor in states)
    labels = torch.zeros(len(student), dtype=torch.int64)
    return Inputs(student.requires_grad_(), head.clone().requires_grad_(), teacher, head, labels)


def from_logits(inputs: Inputs, student: Tensor, teacher: Tensor, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hidden gradient and weight gradient in float64 from given logits."""
    student = student.double().requires_grad_()
    log_q = teacher.double().log_softmax(-1)
    loss = divergence_per_token(student.log_softmax(-1), log_q, divergence).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    hidden, weight = inputs.student_hidden.detach().double(), inputs.student_weight.detach().double()
    return loss.detach(), gradient @ weight, gradient.T @ hidden


def measure(inputs: Inputs, dtype: str, divergence: str) -> list[Errors]:
    """Every method's errors on one divergence."""
    tensors = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)

    def logits(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden, weight, teacher_hidden, teacher_weight = (tensor.detach().to(kind) for tensor in tensors)
        return hidden @ weight.T, teacher_hidden @ teacher_weight.T

    expected = from_logits(inputs, *logits(torch.float64), divergence)

    def errors(method: str, found: tuple[Tensor, Tensor, Tensor]) -> Errors:
        return Errors(dtype, divergence, method, *map(relative_error, found, expected))

    rows = [errors(PRODUCTS_ALONE, from_logits(inputs, *logits(torch.float32), divergence))]
    for name, method in METHODS.items():
        if offers(name, divergence) and name != "Liger compiled":  # the same arithmetic as Liger eager
            inputs.clear()
            loss = method(inputs, divergence)
            assert inputs.student_hidden.grad is not None and inputs.student_weight.grad is not None
            rows.append(errors(name, (loss, inputs.student_hidden.grad, inputs.student_weight.grad)))
    return rows


def table(rows: list[Errors]) -> str:
    lines = [f"{'dtype':9} {'divergence':16} {'method':30} {'loss':>8} {'d hidden':>9} {'d weight':>9}"]
    lines += [
        f"{row.dtype:9} {row.divergence:16} {row.method:30} "
        f"{row.loss:8.1e} {row.grad_hidden:9.1e} {row.grad_weight:9.1e}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Errors], path: Path) -> None:
    """The errors of the hidden gradient and of the loss, a panel for each dtype."""
    methods = list(dict.fromkeys(row.method for row in rows))
    with plots.panels(path, 2, len(DTYPES), (11, 7), sharey="col") as axes:
        for column, dtype in enumerate(DTYPES):
            here = [row for row in rows if row.dtype == dtype]
            names = list(dict.fromkeys(row.divergence.replace("_", " ") for row in here))
            for axis, value in zip(axes[:, column], ("loss", "grad_hidden"), strict=True):
                heights = {
                    method: {r.divergence.replace("_", " "): getattr(r, value) for r in here if r.method == method}
                    for method in methods
                }
                plots.bars(axis, names, heights)
                axis.set(
                    yscale="log", title=f"{dtype}: {'loss' if value == 'loss' else 'gradient of the hidden states'}"
                )
                axis.tick_params("x", rotation=15)
        axes[0][0].set_ylabel("relative error against float64")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--prompts", type=int, default=16, help="rollouts whose hidden states are taken (default 16)")
    files.add_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the errors there (PNG or SVG)")
    given = parser.parse_args(argv)
    states = smollm2_states(given.prompts)
    work = [(name, divergence) for name in DTYPES for divergence in DIVERGENCES]
    rows: list[Errors] = []
    for name, divergence in tqdm(work, unit="divergence"):
        rows += measure(inputs_in(DTYPES[name], states), name, divergence)
    print(machine.heading(), f"{len(states[0])} tokens of SmolLM2-135M-Instruct's own rollouts", table(rows), sep="\n")
    files.write(rows, given)
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
