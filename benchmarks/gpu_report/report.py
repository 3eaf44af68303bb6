"""The report's files, made of its rows: report.json, report.md, and a plot for each stage that has one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.errors import Refused
from benchmarks.gpu_report.folder import ROWS, TEXT, plot
from benchmarks.gpu_report.plan import STAGES, Stage
from benchmarks.gpu_report.process import Outcome

#: What stands above the stages, each a string.
HEADING = ("machine", "device", "versions", "date", "command", "toy")
#: Sentences about one stage's rows that are printed in the end; report.md has them all.
MOST_SENTENCES = 8


@dataclass
class Report:
    """What is known so far. A file that cannot be written is told of in the end, and stops nothing."""

    folder: Path
    heading: dict[str, str]
    planned: list[str]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    complete: bool = False
    unwritten: dict[str, str] = field(default_factory=dict)  # why, by file
    broken: list[str] = field(default_factory=list)  # sentences about tables that could not be made

    def recorded(self) -> dict[str, Any]:
        stages = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        return {**self.heading, "complete": self.complete, "planned": self.planned, "stages": stages}

    def save(self) -> None:
        """report.json, which is whole at any moment."""
        self._write(ROWS, json.dumps(self.recorded(), indent=1, allow_nan=False))

    def publish(self) -> str:
        """report.md, which is returned, and the plots."""
        text, self.broken = tables(self.folder, self.recorded())
        self._write(TEXT, text)
        return text

    def problems(self) -> list[str]:
        lost = [f"{name} could not be written: {reason}" for name, reason in self.unwritten.items()]
        return problems(self.outcomes) + self.broken + lost

    def _write(self, name: str, text: str) -> None:
        try:
            write(self.folder / name, text)
            self.unwritten.pop(name, None)
        except OSError as error:
            self.unwritten[name] = str(error.strerror)


def write(path: Path, text: str) -> None:
    """The whole of a file at once: it is as it was where that fails."""
    beside = path.with_suffix(".new")
    try:
        beside.write_text(text, encoding="utf-8", errors="replace")
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def read(folder: Path) -> dict[str, Any]:
    """What report.json holds."""
    path = folder / ROWS
    if not path.is_file():
        raise Refused(f"--from is {folder}, where there is no {ROWS}")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not _is_a_report(recorded):
        raise Refused(f"{path} is not a report of this command")
    return recorded


def _is_a_report(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(key), str) for key in HEADING)
        and isinstance(found.get("stages"), dict)
        and all(_is_an_outcome(outcome) for outcome in found["stages"].values())
    )


def _is_an_outcome(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("status"), str)
        and all(isinstance(found.get(key), (int, float)) for key in ("seconds", "budget"))
        and isinstance(found.get("rows"), list)
        and all(isinstance(row, dict) and "case" in row for row in found["rows"])
    )


def tables(folder: Path, recorded: dict[str, Any]) -> tuple[str, list[str]]:
    """report.md of what report.json holds, and a sentence for each table that cannot be made; draws the plots."""
    parts, broken = [_top(recorded)], []
    for stage in STAGES:
        found = recorded["stages"].get(stage.name)
        if found is None:
            continue
        parts.append(f"\n## {stage.title}\n")
        took = f"{found['seconds']:.0f} s of {found['budget']:.0f} s"
        reason = f" {found['reason']}" if found.get("reason") else ""
        parts.append(f"{found['status'].capitalize()} in {took}.{reason}\n")
        text, wrong = _section(stage, found["rows"], folder)
        parts.append(text)
        broken += wrong
    return "\n".join(parts) + "\n", broken


def _top(recorded: dict[str, Any]) -> str:
    tests = recorded["stages"].get("correctness", {}).get("rows", [])
    counts = {kind: sum(row.get("outcome") == kind for row in tests) for kind in ("passed", "failed", "skipped")}
    said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none ran"
    toy = " Toy sizes: the numbers say nothing." if recorded["toy"] == "yes" else ""
    lines = [
        f"# {recorded['device']}, {recorded['date']}",
        f"{recorded['machine']}. {recorded['versions']}. `{recorded['command']}`.{toy}",
        *_partial(recorded),
        f"Tests on the device: {said}.",
    ]
    return "\n\n".join(lines)


def _partial(recorded: dict[str, Any]) -> list[str]:
    """A line that says what is missing, if anything is."""
    stages = recorded["stages"]
    said = [f"{name} {outcome['status']}" for name, outcome in stages.items() if outcome["status"] != "done"]
    missing = [name for name in recorded.get("planned", []) if name not in stages]
    if missing:
        said.append(f"{', '.join(missing)} not reached")
    if not said and not recorded.get("complete"):
        said.append("stopped before its end")
    return [f"**Partial:** {'; '.join(said)}."] if said else []


def _section(stage: Stage, rows: list[dict[str, Any]], folder: Path) -> tuple[str, list[str]]:
    """A stage's table and plot. Where making them fails, that is said: the rows are still in report.json."""
    if not rows:
        return "No rows.", []
    try:
        module = stage.module()
        text = module.table(rows)
    except Exception as error:  # told in the report; the others go on
        said = f"table could not be made: {type(error).__name__}: {error}"
        return f"Its {said}. The rows are in report.json.", [f"{stage.name}: its {said}"]
    path = plot(folder, stage.name)
    try:
        if hasattr(module, "draw"):
            module.draw(rows, path)
    except Exception as error:  # told in the report; the table is there
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        said = f"plot could not be drawn: {type(error).__name__}: {error}"
        missing = isinstance(error, ImportError)  # matplotlib is no part of what is proven or measured
        return f"{text}\n\nIts {said}.", [] if missing else [f"{stage.name}: its {said}"]
    if path.is_file():
        text += f"\n\n![{stage.title}]({path.name})"
    return text, []


def problems(outcomes: dict[str, Outcome]) -> list[str]:
    """A sentence for each stage that did not end or measured nothing, and for each test or case that failed."""
    found = []
    for name, outcome in outcomes.items():
        if outcome.status != "done":
            found.append(f"{name}: {outcome.status}: {outcome.reason}")
        elif all("skipped" in row for row in outcome.rows):
            found.append(f"{name}: it measured nothing")
        said = [f"{name}: {sentence}" for row in outcome.rows if (sentence := _wrong(row))]
        found += said[:MOST_SENTENCES]
        if len(said) > MOST_SENTENCES:
            found.append(f"{name}: and {len(said) - MOST_SENTENCES} more, in {TEXT}")
    return found


def _wrong(row: dict[str, Any]) -> str | None:
    if row.get("outcome") == "failed":
        return f"{row['case']} failed"
    if "error" not in row:
        return None
    method = f", {row['method']}" if "method" in row else ""
    return f"{row['case']}{method}: {row['error']}"
