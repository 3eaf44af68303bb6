"""continual.json: what a model can do and has forgotten after each stage of training on one skill after the other.

    {"stages": ["base", "science", "tools"],
     "measurements": [
       {"method": null, "seed": null, "stage": "base", "accuracy": {"science": 0.2, "tools": 0.1}, "forgetting": 0.0},
       {"method": "sdft", "seed": 1, "stage": "science", "accuracy": {"science": 0.6}, "forgetting": 0.1}]}

A measurement follows another as stages end, in any order. One without a method is of the model before any training,
and counts for every method. A stage that is not in `stages`, such as all skills at once, comes last.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sdft.errors import UsageError, shown


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
    """All that was measured. `stages` are those of the sequence, in their order."""

    stages: list[str]
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(each.method for each in self.measurements if each.method is not None))

    @property
    def evaluated(self) -> list[str]:
        """The sets that accuracies are of."""
        return list(dict.fromkeys(name for each in self.measurements for name in each.accuracy))

    def of(self, method: str) -> dict[str, list[Measurement]]:
        """The measurements of a method by stage, one for each seed."""
        found: dict[str, list[Measurement]] = {stage: [] for stage in self.stages}
        for each in self.measurements:
            if each.method in (method, None):
                found.setdefault(each.stage, []).append(each)
        return {stage: measured for stage, measured in found.items() if measured}

    def text(self) -> str:
        """The file."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def read_continual(path: Path) -> Continual:
    """The file, read; UsageError that names what is wrong in it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    try:
        measurements = [_measurement(each, number) for number, each in enumerate(found["measurements"], 1)]
        stages = found["stages"]
        if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
            raise UsageError(f"stages is {shown(stages)}; it must be a list of names")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} must be an object with stages and measurements, each a list") from error
    return Continual(stages, measurements)


def _measurement(value: Any, number: int) -> Measurement:
    known = {each.name for each in fields(Measurement)}
    if not isinstance(value, dict) or not {"method", "seed", "stage"} <= value.keys() <= known:
        raise UsageError(f"measurement {number} must have method, seed and stage, and may have accuracy and forgetting")
    made = Measurement(**value)
    if not isinstance(made.stage, str) or not isinstance(made.method, str | None):
        raise UsageError(
            f"measurement {number} has stage {shown(made.stage)} and method {shown(made.method)}, not names"
        )
    if not isinstance(made.accuracy, dict):
        raise UsageError(f"measurement {number} has accuracy {shown(made.accuracy)}; it must be numbers by set")
    for name, share in [*made.accuracy.items(), ("forgetting", made.forgetting)]:
        if not (share is None or (isinstance(share, int | float) and math.isfinite(share))):
            raise UsageError(f"measurement {number} has {name} {shown(share)}; it must be a number or null")
    return made
