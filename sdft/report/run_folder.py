"""A run's folder, read for its report: every file may be missing or cut, which is noted, but for metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from sdft.errors import UsageError, counted
from sdft.report.continual import Continual, read_continual
from sdft.run_files import CONTINUAL_FILE, METRICS_FILE, RECORD, RESOLVED_FILE, SUMMARY_FILE

#: The most points that a curve has on the page; more are joined, each by the mean of its neighbours.
MOST_POINTS = 1000


@dataclass
class RunFolder:
    """What a run has left. `notes` are sentences about what is missing or cut."""

    path: Path
    name: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    continual: Continual | None = None
    notes: list[str] = field(default_factory=list)


def read_run(folder: str | Path) -> RunFolder:
    """All but the rollouts. UsageError where it is no run's folder."""
    path = Path(folder)
    check_run(path)
    run = RunFolder(path, path.resolve().name)
    if (path / CONTINUAL_FILE).is_file():
        run.continual = read_continual(path / CONTINUAL_FILE)
    if not (path / METRICS_FILE).is_file():
        run.record = {"made_with": run.continual and run.continual.made_with}
        run.recipe = _recipe(run)
        return run
    run.lines = _lines(run)
    run.record, run.summary = _object(run, RECORD), _object(run, SUMMARY_FILE)
    run.recipe = _recipe(run)
    if not run.summary:
        last = max((line["step"] for line in run.lines), default=0)
        run.notes.append(
            f"This run has not ended, or was stopped: the page shows what it had logged up to step {last}. "
            f"{SUMMARY_FILE} and {RESOLVED_FILE} are written at its end."
        )
    elif not run.recipe:
        run.notes.append(f"{RESOLVED_FILE} is missing: the page does not know the run's settings.")
    return run


def check_run(path: Path) -> None:
    """UsageError where the folder is not there or has nothing to report."""
    if not path.is_dir():
        what = "that is a file, and it must be the folder of a run" if path.exists() else "there is no such folder"
        raise UsageError(f"run_dir is {str(path)!r}; {what}")
    if not any((path / name).is_file() for name in (METRICS_FILE, CONTINUAL_FILE)):
        raise UsageError(
            f"run_dir is {str(path)!r}, which has no {METRICS_FILE}; it must be the output_dir of sdft train"
        )


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Each line's place in the file, and its object; None for a line that is cut or has no step."""
    with path.open("rb") as file:
        place = 0
        for line in file:
            try:
                found = json.loads(line)
                whole = isinstance(found, dict) and isinstance(found.get("step"), int)
            except (ValueError, RecursionError):
                found, whole = None, False
            yield place, found if whole else None
            place += len(line)


def _lines(run: RunFolder) -> list[dict[str, Any]]:
    found = [line for _, line in json_lines(run.path / METRICS_FILE)]
    if cut := found.count(None):
        run.notes.append(f"The page leaves out {counted(cut, 'line')} of {METRICS_FILE} that could not be read.")
    if not found:
        run.notes.append(f"{METRICS_FILE} has no line yet.")
    return [line for line in found if line is not None]


def _object(run: RunFolder, name: str) -> dict[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        run.notes.append(f"{name} is not whole and is left out.")
        return {}
    return found


def _recipe(run: RunFolder) -> dict[str, Any]:
    path = run.path / RESOLVED_FILE
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        run.notes.append(f"{RESOLVED_FILE} is not whole and is left out.")
        return {}
    return {str(name): value for name, value in found.items()}


def series(lines: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """By name, the steps and the values of all numbers that were logged."""
    found: dict[str, list[list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and is_number(value):
                steps, values = found.setdefault(name, [[], []])
                steps.append(line["step"])
                values.append(value)
    return {name: _thinned(*curve) for name, curve in found.items()}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def significant(value: float) -> float:
    """The number as the page has it."""
    return float(f"{value:.5g}")


def _thinned(steps: list[float], values: list[float]) -> list[list[float]]:
    size = math.ceil(len(steps) / MOST_POINTS)
    groups = range(0, len(steps), size)
    means = [significant(math.fsum(values[n : n + size]) / len(values[n : n + size])) for n in groups]
    return [[steps[min(n + size, len(steps)) - 1] for n in groups], means]
