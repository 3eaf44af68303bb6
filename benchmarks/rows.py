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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json and --csv."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there, with machine and versions")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the same rows as CSV")


def write(rows: Sequence[Any], given: argparse.Namespace) -> None:
    """Dataclass instances, one a row, to the files that were asked for."""
    values = [asdict(row) for row in rows]
    if given.json:
        given.json.write_text(json.dumps({**machine.describe(), "rows": values}, indent=1))
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(values[0]))
            writer.writeheader()
            writer.writerows(values)
