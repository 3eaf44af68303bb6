"""A benchmark's rows in files: JSON with machine, versions and date, and CSV."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine

#: Where tables and plots go that no other place was named for.
FOLDER = Path("runs/benchmarks")


def add_arguments(parser: argparse.ArgumentParser, name: str | None = None) -> None:
    """--json and --csv; with the benchmark's `name` also --plot, and CSV and plot are written in any case."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there, with machine and versions")
    of_csv, of_plot = "the same rows as CSV", "the plot, PNG or SVG"
    if name is None:
        parser.add_argument("--csv", type=Path, metavar="FILE", help=of_csv)
        return
    csv, plot = FOLDER / f"{name}.csv", FOLDER / f"{name}.png"
    parser.add_argument("--csv", type=Path, metavar="FILE", default=csv, help=f"{of_csv} (default {csv})")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=plot, help=f"{of_plot} (default {plot})")


def write(rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Dataclass instances, one a row, to the files that were asked for."""
    values = [asdict(row) for row in rows]
    for path in (given.json, given.csv):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if given.json:
        given.json.write_text(json.dumps({**machine.describe(), "rows": values}, indent=1))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(values[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(values)
