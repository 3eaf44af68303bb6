"""Rows as they come, each with its number (from 1): files of several formats, folders and hub datasets.

A line of JSONL has the number of its line, and any other row its place. A file's format is that of its name, under a
compression's ending or not: `.parquet`, `.csv`, `.tsv`, and JSON otherwise, with an object a line or one list of all.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from sdft.errors import UsageError

#: What opens a compressed file, by the ending of its name; and an ending that Python cannot open.
COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ZSTD = ".zst"
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".txt")
#: A dataset on the hub: owner/name:split, or owner/name/configuration:split.
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<configuration>[\w.-]+))?:(?P<split>[\w.%\[\]:+-]+)")

#: What to say of a file that is not JSON.
FORMS = " (a file is JSONL, with a row a line, or a JSON list, CSV or Parquet)"

#: Rows of Parquet that are in memory at once.
AT_ONCE = 1000

#: What `save_to_disk` leaves in a folder: the first where there are splits.
SAVED = ("dataset_dict.json", "state.json")

Numbered = Iterator[tuple[int, Any]]


def read_source(source: str | Path) -> Numbered:
    """The rows of a file, of a folder that `datasets` has saved (folder:split where it has several), or of the hub.

    They come one by one, so that all of them need not be in memory.
    """
    path, name = Path(source), str(source)
    if path.is_file():
        return _read_file(path)
    if is_saved_folder(name):
        return _read_saved(name)
    if path.is_dir():
        raise UsageError(f"{name} is a folder; it must be a file of rows, or a folder that datasets has saved")
    if is_hub_name(name):
        return _read_hub(name)
    raise UsageError(f"{name} is not there: no such file")


def _is_rows_file(name: str) -> bool:
    """Whether a name ends as that of a file of rows does."""
    return Path(name).suffix.lower() in (*FORMATS, *COMPRESSIONS, ZSTD)


def is_hub_name(name: str) -> bool:
    """Whether a name can only be that of a dataset on the hub."""
    return HUB_NAME.fullmatch(name) is not None and not _is_rows_file(name) and not os.path.exists(name)


def is_saved_folder(name: str) -> bool:
    """Whether `datasets` has saved this folder, or that before the last colon."""
    return any(os.path.isfile(os.path.join(_folder_of(name), mark)) for mark in SAVED)


def _folder_of(name: str) -> str:
    return name if os.path.isdir(name) else name.rpartition(":")[0] or name


def _read_file(path: Path) -> Numbered:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes.pop() if suffixes and suffixes[-1] in (*COMPRESSIONS, ZSTD) else None
    if compressed == ZSTD:
        raise UsageError(f"{path} is compressed by zstd; it must be unpacked first, or packed by gzip, bzip2 or xz")
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        if compressed:
            raise UsageError(f"{path} is Parquet in a {compressed[1:]} file; it must be Parquet alone")
        yield from _read_parquet(path)
        return
    opener = COMPRESSIONS[compressed] if compressed else open
    try:
        with cast(Any, opener)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            if kind in (".csv", ".tsv"):
                yield from _read_table(lines, path, "\t" if kind == ".tsv" else _separator(lines))
            else:
                yield from _read_json(lines, path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is neither JSON or CSV in UTF-8 nor a .parquet file: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if not compressed:
            raise
        raise UsageError(f"{path} cannot be unpacked: {error}") from error


def _read_parquet(path: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path)
            rows = (row for batch in file.iter_batches(AT_ONCE) for row in batch.to_pylist())
            yield from _numbered(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from error


def _separator(lines: IO[str]) -> str:
    """What is between the columns' names: a comma, or a semicolon where some spreadsheets write that instead."""
    first = lines.readline()
    lines.seek(0)
    return ";" if first.count(";") > first.count(",") else ","


def _read_table(lines: IO[str], path: Path, separator: str) -> Numbered:
    """Rows of text by the names in the first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a demonstration may be long
    table = csv.reader(lines, delimiter=separator, strict=True)
    try:
        names = next(table, [])
        _check_names(names, path)
        for number, cells in enumerate(table, start=1):
            if cells and len(cells) != len(names):
                raise UsageError(f"{path}, row {number} has {len(cells)} cells; it must have {len(names)}, as line 1")
            if cells:
                yield number, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as a table: {error} near line {table.line_num}") from error


def _check_names(names: list[str], path: Path) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{path} has the column {twice!r} twice; it must have it once")


def _read_json(lines: IO[str], path: Path) -> Numbered:
    """JSONL, or one list of all rows, which may go over several lines and is parsed as a whole."""
    first = next((line for line in lines if line.strip()), "").strip()
    several = any(line.strip() for line in lines)
    lines.seek(0)
    if first.startswith("[") and not (several and first.endswith("]")):
        yield from enumerate(parse(lines.read(), str(path), FORMS), start=1)
        return
    if several and first == "{":  # the beginning of one object over several lines
        raise UsageError(f"{path} begins with an object over several lines; it must be a list of rows, or one a line")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse(line, f"{path}, row {number}", FORMS)


def parse(text: str, where: str, hint: str = "") -> Any:
    """What a text in JSON is.

    UsageError, by `where` and with the `hint`, for one that is not, and for a name that an object has twice.
    """
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, where))
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}{hint}") from error
    except RecursionError as error:
        raise UsageError(f"{where} cannot be read: it is nested too deeply") from error
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


def _read_saved(name: str) -> Numbered:
    """What `datasets` saved in a folder by `save_to_disk`, of which a colon and a name choose a split."""
    folder = _folder_of(name)
    split = name[len(folder) + 1 :]
    saved = _datasets(name).load_from_disk(folder)
    if not isinstance(saved, dict):
        if split:
            raise UsageError(f"{name} names a split, and {folder} has one dataset without splits")
        return _numbered(saved)
    if split not in saved:
        raise UsageError(
            f"{name} names no split of the folder; it may be {' or '.join(f'{folder}:{n}' for n in saved)}"
        )
    return _numbered(saved[split])


def _read_hub(name: str) -> Numbered:
    named, datasets = cast(re.Match[str], HUB_NAME.fullmatch(name)), _datasets(name)
    try:
        yield from _numbered(datasets.load_dataset(named["name"], named["configuration"], split=named["split"]))
    except Exception as error:  # of the hub, of the network, or of the dataset's own files
        said = " ".join(str(error).split())
        raise UsageError(f"{name} cannot be loaded as a dataset of the hub: {said}") from error


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UsageError(f"{source} is a dataset, which takes a package: pip install datasets") from error
    return datasets


def _numbered(rows: Iterable[Any]) -> Numbered:
    """Rows of a table, whose columns give each object in them all names that one of them has: without what is null."""
    return enumerate(map(without_nulls, rows), start=1)


def without_nulls(row: Any) -> Any:
    """A row of a table whose objects have no names that are null; columns of the row itself stay."""
    return {name: _bare(value) for name, value in row.items()} if isinstance(row, dict) else row


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(each) for name, each in value.items() if each is not None}
    return [_bare(each) for each in value] if isinstance(value, list) else value
