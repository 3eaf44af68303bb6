"""The report's files, made from recorded rows: report.json, report.md, and a plot for each stage that has one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.plan import STAGES, Stage
from benchmarks.gpu_report.process import Outcome


def write(folder: Path, heading: dict[str, str], outcomes: dict[str, Outcome], *, complete: bool) -> None:
    """Writes report.json, and once `complete` report.md and the plots."""
    recorded = {
        **heading,
        "complete": complete,
        "stages": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    path = folder / "report.json"
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(recorded, indent=1))
    beside.replace(path)  # whole at any moment
    if complete:
        (folder / "report.md").write_text(from_recorded(folder, recorded))


def from_recorded(folder: Path, recorded: dict[str, Any]) -> str:
    """report.md of what report.json holds; draws the plots beside it."""
    parts = [_top(recorded)]
    for stage in STAGES:
        found = recorded["stages"].get(stage.name)
        if found is None:
            continue
        parts.append(f"\n## {stage.title}\n")
        took = f"{found['seconds']:.0f} s of {found['budget']:.0f} s"
        parts.append(f"{found['status'].capitalize()} in {took}." + (f" {found['reason']}" if found["reason"] else ""))
        parts.append("")
        parts.append(_section(stage, found["rows"], folder))
    return "\n".join(parts) + "\n"


def _top(recorded: dict[str, Any]) -> str:
    tests = recorded["stages"].get("correctness", {}).get("rows", [])
    counts = {kind: sum(row.get("outcome") == kind for row in tests) for kind in ("passed", "failed", "skipped")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none ran"
    toy = " Toy sizes: the numbers say nothing." if recorded["toy"] == "yes" else ""
    return "\n".join(
        [
            f"# {recorded['device']}, {recorded['date']}",
            "",
            f"{recorded['machine']}. {recorded['versions']}. `{recorded['command']}`.{toy}",
            "",
            f"Tests on the device: {said}.",
        ]
    )


def _section(stage: Stage, rows: list[dict[str, Any]], folder: Path) -> str:
    """A stage's table and plot; where making them fails, which says why, the rows are still in report.json."""
    if not rows:
        return "No rows."
    module = stage.module()
    try:
        text = module.table(rows)
        draw = getattr(module, "draw", None)
        if draw is not None:
            draw(rows, folder / f"{stage.name}.png")
            text += f"\n\n![{stage.title}]({stage.name}.png)"
    except Exception as error:  # told in the report; the others go on
        return f"Its table could not be made: {type(error).__name__}: {error}. The rows are in report.json."
    return text


def problems(outcomes: dict[str, Outcome]) -> list[str]:
    """A sentence for each stage that did not end, and for each test or case that failed."""
    found = [f"{name}: {outcome.status}: {outcome.reason}" for name, outcome in outcomes.items() if outcome.reason]
    for name, outcome in outcomes.items():
        for row in outcome.rows:
            if row.get("outcome") == "failed":
                found.append(f"{name}: {row['case']} failed")
            elif "error" in row:
                found.append(f"{name}: {row['case']}: {row['error']}")
    return found
