"""Rows as files have them, each with its number (from 1): JSONL and Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft.errors import UsageError


def read_file(path: Path) -> list[tuple[int, Any]]:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; it must be a JSONL or Parquet file")
    if not path.is_file():
        raise UsageError(f"{path} is not there: no such file")
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1))
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{path} cannot be read as Parquet: {error}") from error
    with path.open(encoding="utf-8-sig") as lines:
        try:
            return [
                (number, _parse(line, f"{path}, row {number}")) for number, line in enumerate(lines, 1) if line.strip()
            ]
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is neither JSONL in UTF-8 nor a .parquet file: {error}") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=lambda pairs: _object(pairs, where))
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error} (a file is JSONL, with a row a line, or Parquet)") from error
    except RecursionError as error:
        raise UsageError(f"{where} is not a row: it is nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UsageError(f"{where} cannot be read: {str(error).partition(';')[0]}") from error


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """An object of a row, which has each of its names once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{where} has {name} twice; it must have it once")
        found[name] = value
    return found
