"""What a stage of the report is: a module with `run(settings)`, which yields its rows, and `table(rows)`.

A row is a flat dictionary of numbers and strings that JSON can hold. It is on disk before the next one begins, so that
a stage that is cut off still counts; a stage therefore yields what matters most first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Where a stage runs, how large, and until when it may begin something new."""

    device: str  # "cuda" or "cpu"
    toy: bool  # sizes of no interest, on which all of the code runs in seconds
    deadline: float  # of time.monotonic()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def skipped(case: str, reason: str) -> Row:
    """The row of a case that was not measured."""
    return {"case": case, "skipped": reason}


def finite(row: Row) -> Row:
    """The row without numbers that are none, which JSON cannot hold: they are its error."""
    broken = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if not broken:
        return row
    said = ", ".join(f"{name} is {row[name]}" for name in broken)
    kept = {name: value for name, value in row.items() if name not in broken}
    return {**kept, "error": kept.get("error") or said}


def markdown(rows: Iterable[Row], columns: Sequence[tuple[str, str, str]]) -> str:
    """A Markdown table of rows: for each column its title, the row's key and a format; "-" where a row has no value."""
    columns = list(columns)
    lines = [
        "| " + " | ".join(title for title, _, _ in columns) + " |",
        "|" + "|".join("---" for _ in columns) + "|",
    ]
    for row in rows:
        cells = ("-" if row.get(key) is None else format(row[key], form) for _, key, form in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
