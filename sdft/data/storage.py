"""Where rows are kept: in a list, or in a file on disk, of which memory holds one number a row (`rows_on_disk`)."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from sdft.errors import UsageError

Each = TypeVar("Each")
#: What keeps the rows that it is given: `list`, or what `on_disk` returns.
Keep = Callable[[Iterable[Any]], Sequence[Any]]


class StoredRows(Sequence[Each], Generic[Each]):
    """Rows in a file that has no name and is gone with this object, or with the process, however that ends.

    Each is read anew whenever it is asked for, so that what is done to one does not stay.
    """

    def __init__(self, rows: Iterable[Each], folder: str) -> None:
        self._starts = array("Q", [0])
        with _failing_clearly(folder):
            self._file = tempfile.TemporaryFile(dir=folder, prefix="rows-")  # noqa: SIM115  it is open as long as this
        weakref.finalize(self, self._file.close)
        for number, row in enumerate(rows, start=1):
            written = _as_bytes(row, number)
            with _failing_clearly(folder):
                self._starts.append(self._starts[-1] + self._file.write(written))
        with _failing_clearly(folder):
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Each: ...
    @overload
    def __getitem__(self, place: slice) -> list[Each]: ...
    def __getitem__(self, place: int | slice) -> Each | list[Each]:
        if isinstance(place, slice):
            return [self._read(each) for each in range(*place.indices(len(self)))]
        return self._read(range(len(self))[place])

    def __iter__(self) -> Iterator[Each]:
        return (self._read(place) for place in range(len(self)))

    def _read(self, place: int) -> Each:
        start, end = self._starts[place], self._starts[place + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))  # of our own writing, seen by nobody


@contextlib.contextmanager
def _failing_clearly(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"rows_on_disk is True, and rows cannot be written in {folder}: {error}") from error


def _as_bytes(row: Any, number: int) -> bytes:
    try:
        return pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # an object says by itself how it is written, and may raise anything
        raise UsageError(f"rows_on_disk is True, and row {number} cannot be written to a file: {error}") from error


def on_disk(output_dir: str) -> Keep:
    """What keeps rows in a file beside the run: in `output_dir`, or in the first folder above it that is there."""
    place = Path(output_dir).absolute()
    folder = next(str(each) for each in (place, *place.parents) if each.is_dir())

    def keep(rows: Iterable[Any]) -> Sequence[Any]:
        return StoredRows(rows, folder)

    return keep
