"""output_dir belongs to one run at a time: `run.json` in it says to which, and a lock on that keeps other runs out.

Every checkpoint names its run in the same way. The system takes the lock away with the process that has it, however
that ends, so that a run that was killed is in nobody's way. One process of a launch, the main one, has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from sdft.checkpoints import files as checkpoint
from sdft.checkpoints.resume import checkpoint_to_resume, last_checkpoint, read_record, run_of
from sdft.early_checks import check_writable
from sdft.environment import made_with
from sdft.errors import UsageError
from sdft.run_files import (
    COMPLETIONS_FILE,
    CURVES_FILE,
    METRICS_FILE,
    RECORD,
    REPORT_FILE,
    RESOLVED_FILE,
    SUMMARY_FILE,
)

logger = logging.getLogger(__name__)

#: What a run leaves besides its checkpoints and its model.
REPORTS = (METRICS_FILE, COMPLETIONS_FILE, SUMMARY_FILE, CURVES_FILE, REPORT_FILE, RESOLVED_FILE)
CHECKPOINTS = "checkpoint-*"

_held: dict[Path, Claim] = {}


@dataclass
class Claim:
    """A run's hold on its folder; `file` is the locked record, in the main process alone.

    `steps` is how many the run had that ended here and left its model: perhaps more than any checkpoint has.
    """

    folder: Path
    run: str
    resume: str | None = None
    steps: int = 0
    replaces: bool = False
    file: IO[str] | None = None
    before: str = ""
    made_with: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """Make the folder this run's as training begins: what it replaces goes, and so do reports of an earlier end."""
        if self.file is None:
            return
        gone = [self.folder / name for name in (SUMMARY_FILE, CURVES_FILE, REPORT_FILE)]
        if self.replaces:
            gone += [self.folder / name for name in REPORTS]
            checkpoint.remove_checkpoints(self.folder, [path.name for path in self.folder.glob(CHECKPOINTS)])
        for path in gone:
            path.unlink(missing_ok=True)
        self.made_with = made_with()
        self.before = self.record(run=self.run, made_with=self.made_with)

    def finish(self, steps: int) -> None:
        """Note that the run has ended after so many steps, and that the folder has its model."""
        self.before = self.record(run=self.run, made_with=self.made_with, steps=steps)

    def record(self, **values: Any) -> str:
        """Write the record, with the process that has the folder."""
        return self._write(json.dumps({**values, "process": os.getpid(), "host": socket.gethostname()}) + "\n")

    def end(self) -> None:
        """Leave the record as it was before, unless training has begun."""
        self._write(self.before)

    def _write(self, text: str) -> str:
        if self.file is not None:
            self.file.seek(0)
            self.file.truncate()
            self.file.write(text)
            self.file.flush()
        return text


@contextlib.contextmanager
def claimed(
    folder: str | Path,
    wanted: str | bool | None = None,
    *,
    overwrite: bool = False,
    main: bool = True,
    run: str | None = None,
    allow_pickle: bool = True,
) -> Iterator[Claim]:
    """The folder for a run: a new one, one that goes on from the checkpoint `wanted`, or `run`, which has it already.

    UsageError where another run is under way in it or has left something there, unless a new one is to `overwrite` it.
    Within the block this process may claim it again. A folder in which nothing was left is as it was before.
    """
    path = Path(folder).absolute()
    if path in _held:
        claim = _held[path]
        claim.resume = checkpoint_to_resume(wanted, folder, allow_pickle=allow_pickle)
        yield claim
        return
    if not main:
        found, steps = _to_resume(wanted, path, allow_pickle)
        yield Claim(path, run or "", found, steps)
        return
    check_writable(folder)
    with _locked(path, folder) as file:
        checkpoint.recover(path)
        found, steps = _to_resume(wanted, path, allow_pickle)
        before = read_record(path)
        left = results_in(path)
        replaces = False
        if left and (run is None or before.get("run") not in (None, run)):
            if found is None and not steps:
                if not overwrite:
                    raise UsageError(
                        f"output_dir is {str(folder)!r}, which holds another run ({_listed(left)}); it must be another "
                        "folder, unless overwrite_output_dir is true (that run then goes) or resume_from_checkpoint is "
                        "last (it then goes on)"
                    )
                replaces = True
            elif found is not None and not _is_of(Path(found), path):
                raise UsageError(
                    f"resume_from_checkpoint is {found!r}, a checkpoint of another run than the one that output_dir "
                    f"holds, which is {str(folder)!r}; output_dir must be that run's, or a new folder"
                )
        resumed = None if found is None else run_of(found) or before.get("run")
        claim = Claim(path, run or resumed or uuid.uuid4().hex, found, steps, replaces, file)
        claim.before = (path / RECORD).read_text("utf-8") if before else ""
        claim.record(**before)
        _held[path] = claim
        try:
            yield claim
        finally:
            del _held[path]
            claim.end()


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """A folder of several runs, for one command at a time. UsageError where another is in it, or a run has left its
    own results right there.
    """
    path = Path(folder).absolute()
    check_writable(folder)
    with _locked(path, folder) as file:
        left = [name for name in results_in(path) if name not in (REPORT_FILE, RESOLVED_FILE)]
        if left:
            raise UsageError(
                f"output_dir is {str(folder)!r}, which holds a run of sdft train ({_listed(left)}); it must be another "
                "folder"
            )
        claim = Claim(path, "", file=file)
        claim.record()
        try:
            yield
        finally:
            claim.end()


@contextlib.contextmanager
def _locked(path: Path, named: str | Path) -> Iterator[IO[str]]:
    """The folder's record, made if need be and locked; it and the folder go again if no run has left anything there."""
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    record = path / RECORD
    while True:
        file = record.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            holder = read_record(path)
            raise UsageError(
                f"output_dir is {str(named)!r}, where another run is under way (process {holder.get('process')} on "
                f"{holder.get('host')}); it must be another folder, or that run must end first"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked against other runs: %s", path, error)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(record)):
                break
        file.close()  # the run that had it has taken it away just now
    try:
        yield file
    finally:
        if not results_in(path) or not os.fstat(file.fileno()).st_size:  # which nobody has written
            record.unlink(missing_ok=True)
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def results_in(folder: Path) -> list[str]:
    """The names of what a run has left in its folder: checkpoints, a model, reports with something in them."""
    patterns = (CHECKPOINTS, "adapter_config.json", *checkpoint.WEIGHTS, "pytorch_model*", *REPORTS)
    found = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns)]
    return sorted(path.name for path in found if path.is_dir() or path.stat().st_size)


def _to_resume(wanted: str | bool | None, folder: Path, allow_pickle: bool) -> tuple[str | None, int]:
    """The checkpoint that is wanted, or None where the folder's own run ended, after so many steps, and left none."""
    has_model = any(path for pattern in checkpoint.WEIGHTS for path in folder.glob(pattern))
    steps = int(read_record(folder).get("steps", 0)) if has_model and wanted in (True, "last") else 0
    if steps and last_checkpoint(folder) is None:
        return None, steps
    return checkpoint_to_resume(wanted, folder, allow_pickle=allow_pickle), steps


def _is_of(found: Path, folder: Path) -> bool:
    """Whether a checkpoint is of the run that the folder holds; where neither says so, whether it is in there."""
    of, held = run_of(found), run_of(folder)
    return of == held if of and held else found.absolute().parent == folder


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
