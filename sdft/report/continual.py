"""continual.json, which `sdft continual` leaves, as the page shows it: who could do what after each stage.

A stage is named by the skill that it taught, and one that taught several is "all at once". The model before training
is the stage "base" of every method, and the same model as a teacher a stage of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.errors import UsageError, shown

BASE, TEACHER = "base", "base as teacher"


@dataclass(frozen=True)
class Measurement:
    """One model measured: `accuracy` (0 to 1) by evaluated set, `forgetting` in nats a token from the base model."""

    method: str | None
    seed: int | None
    stage: str
    accuracy: dict[str, float | None] = field(default_factory=dict)
    forgetting: float | None = None


@dataclass
class Continual:
    """All that was measured, of which model and on what. `skills` are in the order in which they are learned."""

    skills: list[str]
    measurements: list[Measurement] = field(default_factory=list)
    model: Any = None
    made_with: Any = None

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(each.method for each in self.measurements if each.method is not None))

    @property
    def evaluated(self) -> list[str]:
        """The sets that some accuracy is of."""
        found = [item for each in self.measurements for item in each.accuracy.items()]
        return list(dict.fromkeys(name for name, accuracy in found if accuracy is not None))

    def of(self, method: str) -> dict[str, list[Measurement]]:
        """The measurements of a method by stage, one for each seed."""
        before = [each.stage for each in self.measurements if each.method is None]
        found: dict[str, list[Measurement]] = {stage: [] for stage in (*before, *self.skills)}
        for each in self.measurements:
            if each.method in (method, None):
                found.setdefault(each.stage, []).append(each)
        return {stage: measured for stage, measured in found.items() if measured}


def read_continual(path: Path) -> Continual:
    """The file, read; UsageError that names what is wrong in it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    try:
        base = found["base"]
        measurements = [_measurement(None, None, BASE, {**base, "forgetting": 0.0})]
        if teacher := base.get("teacher_accuracy"):
            measurements.append(_measurement(None, None, TEACHER, {"accuracy": teacher}))
        measurements += [
            _measurement(run["method"], run["seed"], _name(stage["learned"]), stage)
            for run in found["runs"]
            for stage in run["stages"]
        ]
        return Continual([*map(str, found["skills"])], measurements, found.get("model"), found.get("made_with"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not what sdft continual writes: {type(error).__name__}: {error}") from error


def _name(learned: list[str]) -> str:
    return learned[0] if len(learned) == 1 else "all at once"


def _measurement(method: str | None, seed: int | None, stage: str, scores: dict[str, Any]) -> Measurement:
    accuracy = {**scores["accuracy"], "general": scores.get("general_accuracy")}
    forgetting = scores.get("forgetting")
    for name, share in [*accuracy.items(), ("forgetting", forgetting)]:
        if not (share is None or (isinstance(share, int | float) and math.isfinite(share))):
            raise UsageError(f"{name} after {stage} is {shown(share)}; it must be a number or null")
    return Measurement(method, seed, stage, accuracy, forgetting)
