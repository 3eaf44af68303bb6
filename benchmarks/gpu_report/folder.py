"""The folder of a report: made, held by one run at a time, and without an earlier report's files."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu_report.errors import Refused
from benchmarks.gpu_report.plan import STAGES

ROWS, TEXT, LOG = "report.json", "report.md", "log.txt"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # as root is told of a read-only disk
            pass
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Refused(f"--out is {folder}, where no file can be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Refused(f"--out is {folder}, to which another run writes its report") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def plot(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.png"


def clear(folder: Path, *, keep_rows: bool = False) -> None:
    """Removes an earlier report; its rows and its log may be kept, to make the rest of again."""
    made = [folder / TEXT, *(plot(folder, stage.name) for stage in STAGES)]
    for path in made if keep_rows else (*made, folder / ROWS, folder / LOG):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Refused(f"{path} is in the way: {error.strerror}") from error
