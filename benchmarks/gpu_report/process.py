"""A stage in a process of its own, so that one that hangs, or breaks the GPU's context, does not stop the others.

Its rows come on a descriptor of their own; all that it prints goes to the log. Its standard input is a pipe whose other
end the report holds: when the report is gone, however it ended, the stage and all that it started end too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_report.errors import CutOff
from benchmarks.gpu_report.paths import ROOT, without_paths
from benchmarks.gpu_report.plan import Stage
from benchmarks.gpu_report.stage import Row, Settings, finite

#: Seconds past its budget, or past its last row, after which a stage's process is ended.
GRACE = 10
#: Key of the line after the last row, where a stage says itself that its time was too short.
CUT_OFF = "cut off"
#: The longest line of the log.
LINE_BYTES = 1 << 16


@dataclass
class Outcome:
    """What became of a stage: "done", "cut off" or "failed", with the reason, and the rows that it gave."""

    status: str
    reason: str | None
    seconds: float
    budget: float
    rows: list[Row] = field(default_factory=list)


@dataclass
class Log:
    """What stages print, without paths. Where it cannot be written, on a full disk, `lost` says why and all goes on."""

    path: Path
    lost: str | None = None
    last: str = ""  # line of the stage, which is its reason if it fails
    _begun: bytes = b""  # a line whose end is still to come

    def begin(self, stage: str) -> None:
        self._write(f"--- {stage}\n")
        self.last = ""

    def take(self, part: bytes) -> None:
        *lines, self._begun = (self._begun + part).split(b"\n")
        if len(self._begun) > LINE_BYTES:
            lines, self._begun = [*lines, self._begun], b""
        said = [without_paths(line.decode(errors="replace")) for line in lines]
        self.last = next((line.strip() for line in reversed(said) if line.strip()), self.last)
        self._write("".join(f"{line}\n" for line in said))

    def end(self) -> None:
        if self._begun:
            self.take(b"\n")

    def _write(self, text: str) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self.lost = str(error.strerror)


def environment(device: str) -> dict[str, str]:
    """Of a stage's process. What chooses the interpreter, or the GPU, is the report's own choice."""
    found = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    found |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        found |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    return found


def run_apart(
    stage: Stage, outcome: Outcome, *, device: str, toy: bool, log: Log, looked: Callable[[], object]
) -> None:
    """Runs a stage, whose outcome is filled in; `looked` is called after each look for rows, several times a second."""
    rows, rows_end = os.pipe()
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--stage", stage.path, f"--seconds={outcome.budget}"]
    command += [f"--rows={rows_end}", f"--device={device}", *(["--toy"] if toy else [])]
    log.begin(stage.name)
    started = time.monotonic()
    # A process group of its own: the tests and compilers that a stage starts end with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(device),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(rows_end,),
        start_new_session=True,
    )
    os.close(rows_end)
    assert process.stdout is not None
    taken = _Rows(outcome.rows)
    sources = {rows: taken.take, process.stdout.fileno(): log.take}
    try:
        ended = _attend(process, sources, started + outcome.budget + GRACE, looked)
    finally:
        _end(process)
        for source, take in sources.items():
            _drain(source, take)
        os.close(rows)
        process.stdout.close()
        log.end()
        outcome.seconds = time.monotonic() - started
    outcome.status, outcome.reason = "done", None
    if not ended:
        outcome.status, outcome.reason = "cut off", f"it had not ended {GRACE} s after its time or its last row"
    elif taken.cut_off is not None:
        outcome.status, outcome.reason = "cut off", taken.cut_off
    elif process.returncode < 0:
        outcome.status = "failed"
        outcome.reason = f"ended by signal {-process.returncode}" + (f": {log.last[:500]}" if log.last else "")
    elif process.returncode:
        outcome.status, outcome.reason = "failed", log.last[:500] or f"exit status {process.returncode}"


@dataclass
class _Rows:
    """Rows of lines of JSON, of which the last may be there in part; and why the stage says that it is cut off."""

    rows: list[Row]
    cut_off: str | None = None
    _begun: bytes = b""

    def take(self, part: bytes) -> None:
        *lines, self._begun = (self._begun + part).split(b"\n")
        for line in lines:
            row = {k: without_paths(v) if isinstance(v, str) else v for k, v in json.loads(line).items()}
            if CUT_OFF in row:
                self.cut_off = row[CUT_OFF]
            else:
                self.rows.append(row)


def _attend(
    process: subprocess.Popen[bytes],
    sources: Mapping[int, Callable[[bytes], None]],
    until: float,
    looked: Callable[[], object],
) -> bool:
    """Takes what the sources give until the process ends; whether it did in time. The first source is its rows."""
    rows = next(iter(sources))
    with selectors.DefaultSelector() as selector:
        for source, take in sources.items():
            os.set_blocking(source, False)
            selector.register(source, selectors.EVENT_READ, take)
        while process.poll() is None:
            if time.monotonic() > until:
                return False
            for key, _ in selector.select(0.1):
                part = os.read(key.fd, 1 << 16)
                if part:
                    key.data(part)
                    continue
                selector.unregister(key.fd)
                if key.fd == rows:  # there is nothing more to come but its exit
                    until = min(until, time.monotonic() + GRACE)
            looked()
    return True


def _drain(source: int, take: Callable[[bytes], None]) -> None:
    """What a process that has ended left in a pipe."""
    with contextlib.suppress(BlockingIOError):
        while part := os.read(source, 1 << 16):
            take(part)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started. One that a driver holds cannot be ended, and the others go on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    if process.stdin is not None:
        process.stdin.close()


def run_here(path: str, settings: Settings, rows: int) -> None:
    """The stage itself, in its own process: its rows go to the descriptor, one a line."""
    threading.Thread(target=_end_with_the_report, daemon=True).start()
    os.set_inheritable(rows, False)
    with os.fdopen(rows, "w", buffering=1) as file:
        try:
            for row in importlib.import_module(path).run(settings):
                file.write(json.dumps(finite(row), allow_nan=False) + "\n")
        except CutOff as cut:
            file.write(json.dumps({CUT_OFF: str(cut)}) + "\n")


def _end_with_the_report() -> None:
    """Nothing is ever written to standard input: it ends when the report does."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpid(), signal.SIGKILL)
