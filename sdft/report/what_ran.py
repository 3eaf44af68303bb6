"""The tables of a report as text: what ran, what it measured, and the settings, a column for each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdft.report.run_folder import RunFolder, is_number

#: A row of a table: its name, and a cell for each run.
Row = tuple[str, list[str]]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def nats(value: float) -> str:
    return f"{value:.3f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def mebibytes(value: float) -> str:
    return f"{value:,.0f} MiB"


NUMBERS: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("optimizer steps", str),
    "accuracy_before": ("held-out accuracy, before", percent),
    "accuracy_after": ("held-out accuracy, after", percent),
    "accuracy_teacher": ("held-out accuracy, by the teacher", percent),
    "general_accuracy_before": ("general accuracy, before", percent),
    "general_accuracy_after": ("general accuracy, after", percent),
    "forgetting": ("forgetting, nats a token", nats),
    "loss_first": ("loss, first tenth of the steps", nats),
    "loss_last": ("loss, last tenth of the steps", nats),
    "tokens_per_second": ("tokens a second", lambda value: f"{value:,.1f}"),
    "training_seconds": ("training took", duration),
    "total_seconds": ("the whole command took", duration),
    "peak_memory_mib": ("peak memory", mebibytes),
}


def numbers(run: RunFolder) -> dict[str, str]:
    """What the summary says, each by its name in the table."""
    return {
        label: shape(run.summary[name]) for name, (label, shape) in NUMBERS.items() if is_number(run.summary.get(name))
    }


def headline(run: RunFolder) -> str:
    """What was trained and how, in a few words."""
    if run.continual is not None and not run.lines:
        model, skills, methods = run.continual.model, ", ".join(run.continual.skills), ", ".join(run.continual.methods)
        return f"{model} learns {skills} by {methods}" if model and methods else ""
    said = {**run.recipe, **run.summary}
    how = {"sft": "cross-entropy on the demonstrations"}.get(said.get("method", ""), "self-distillation")
    if said.get("method") == "sdft":
        divergence = str(said.get("divergence")).replace("_", " ").replace("kl", "KL")
        how += f" ({divergence}, {said.get('teacher')} teacher)"
    steps = max((line["step"] for line in run.lines), default=0)
    return f"{said['model']}: {steps} steps of {how}" if "model" in said else f"{steps} steps logged"


def facts(run: RunFolder) -> dict[str, str]:
    """Where it is, which machine and packages it ran with, and the commit it began from."""
    found = {"folder": str(run.path.resolve())}
    made_with = run.record.get("made_with")
    if not isinstance(made_with, dict):
        return found
    packages = made_with.get("packages")
    named = packages.items() if isinstance(packages, dict) else ()
    devices = made_with.get("devices")
    found |= {
        "started": str(made_with.get("started", "")),
        "git commit": str(made_with.get("git_commit", "no repository")),
        "machine": "; ".join(map(str, devices)) if isinstance(devices, list) else "",
        "system": str(made_with.get("system", "")),
        "packages": ", ".join(
            [f"Python {made_with.get('python', '')}", *(f"{name} {version}" for name, version in named)]
        ),
    }
    return {name: value for name, value in found.items() if value}


def settings(run: RunFolder) -> dict[str, str]:
    """The recipe, each value as a recipe has it."""
    words = {None: "not set", True: "true", False: "false"}
    return {
        name: words[value] if value is None or isinstance(value, bool) else str(value)
        for name, value in run.recipe.items()
    }


def beside(columns: Sequence[Mapping[str, str]], order: Sequence[str] = ()) -> list[Row]:
    """The columns as rows, in an order, or in that in which names first come; a cell that a column lacks is empty."""
    names = dict.fromkeys(name for column in columns for name in column)
    ordered = [*(name for name in order if name in names), *(name for name in names if name not in order)]
    return [(name, [column.get(name, "") for column in columns]) for name in ordered]


def differing(rows: Sequence[Row]) -> list[Row]:
    """Those of which not all cells are the same."""
    return [row for row in rows if len(set(row[1])) > 1]


def bars(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """What was answered before and after, and by the teacher, in percent: a chart for each set of prompts."""
    found = []
    for title, sets in (
        ("held-out prompts answered", {"before": "accuracy_before", "after": "accuracy_after"}),
        ("general prompts answered", {"before": "general_accuracy_before", "after": "general_accuracy_after"}),
    ):
        if title.startswith("held-out"):
            sets |= {"teacher, shown the demonstration": "accuracy_teacher"}
        heights = {when: [_percentage(run.summary.get(name)) for run in runs] for when, name in sets.items()}
        measured = {when: values for when, values in heights.items() if any(value is not None for value in values)}
        if measured:
            found.append({"title": title, "labels": [run.name for run in runs], "sets": list(measured.items())})
    return found


def _percentage(value: Any) -> float | None:
    return round(100 * value, 2) if is_number(value) else None
