"""The stages of the report, in their order, and how the minutes are shared out among them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

#: Seconds at the end that no stage is given: for the report's files and plots.
RESERVE = 15


@dataclass(frozen=True)
class Stage:
    """A stage: its name, its heading in the report, its share of the time, and the package of its module."""

    name: str
    title: str
    share: float
    package: str = "benchmarks.gpu_report"

    @property
    def path(self) -> str:
        return f"{self.package}.{self.name}" if self.package else self.name

    def module(self) -> ModuleType:
        """`run(settings)` and `table(rows)`, and `draw(rows, path)` where the stage has a plot."""
        return importlib.import_module(self.path)


#: Shares are in proportion to the seconds that each needs. What a stage leaves over goes to those after it.
STAGES = (
    Stage("card", "The card", 40),
    Stage("correctness", "Correctness: the tests of tests/gpu", 330),
    Stage("loss", "The loss and its gradients, beside its peers", 140),
    Stage("parts", "The loss by its parts, beside what was predicted", 35),
    Stage("scoring", "Scoring without a gradient", 35),
    Stage("training", "A training step by its phases", 90),
    Stage("runs", "`sdft train`, and what it planned", 120),
    Stage("rollouts", "Rollouts", 60),
)


def budget(stages: Sequence[Stage], number: int, left: float) -> float:
    """Seconds that the stage of this number may take, of those left for it and the ones after it."""
    ahead = sum(stage.share for stage in stages[number:])
    return max(0.0, left - RESERVE) * stages[number].share / ahead
