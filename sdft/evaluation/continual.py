"""What learning several skills leaves of each: the accuracy matrix and what is read from it.

R[i][j] is the accuracy on skill j after stage i. Backward transfer is the mean over earlier skills of R[last][j] -
R[j][j] (arXiv 1706.08840), and forgetting the mean of max over i of R[i][j] - R[last][j] (arXiv 1801.10112), where the
maximum is over the stages from j on. Both say nothing of a single stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Matrix = Sequence[Sequence[float]]


def backward_transfer(matrix: Matrix) -> float | None:
    """How far the accuracy on earlier skills has moved since each was learned; below 0 where they were forgotten."""
    changes = [matrix[-1][skill] - matrix[skill][skill] for skill in range(len(matrix) - 1)]
    return sum(changes) / len(changes) if changes else None


def skills_forgotten(matrix: Matrix) -> float | None:
    """How far the accuracy on earlier skills is below the best that it was."""
    losses = [max(row[skill] for row in matrix[skill:]) - matrix[-1][skill] for skill in range(len(matrix) - 1)]
    return sum(losses) / len(losses) if losses else None


@torch.no_grad()
def distance(model: nn.Module, start: nn.Module) -> tuple[float, float]:
    """The length of the vector from one model's weights to another's, and as a share of the length of the latter's."""
    moved = total = 0.0
    for (name, weight), (other, before) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        if name != other:
            raise ValueError(f"{name} and {other} are not the same parameter")
        moved += float((weight.float() - before.float()).square().sum())
        total += float(before.float().square().sum())
    return moved**0.5, (moved / total) ** 0.5


def report_of_run(skills: Sequence[str], method: str, seed: int, stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's run with one seed: its stages, and what they come to."""
    in_turn = [stage["learned"] for stage in stages] == [[skill] for skill in skills[: len(stages)]]
    matrix = [[stage["accuracy"][skill] for skill in skills] for stage in stages] if in_turn else []
    return {
        "method": method,
        "seed": seed,
        "stages": list(stages),
        "backward_transfer": backward_transfer(matrix),
        "skills_forgotten": skills_forgotten(matrix),
        "seconds": sum(stage["seconds"] for stage in stages),
    }
