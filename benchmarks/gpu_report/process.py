"""A stage in a process of its own, so that one that hangs, or breaks the GPU's context, does not stop the others."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_report.plan import Stage
from benchmarks.gpu_report.stage import Row, Settings

ROOT = Path(__file__).parents[2]

#: Seconds past its budget after which a stage's process is ended: it was to begin nothing new by then.
GRACE = 10


@dataclass
class Outcome:
    """What became of a stage: "done", "cut off" or "failed", with the reason, and the rows that it gave."""

    status: str
    reason: str | None
    seconds: float
    budget: float
    rows: list[Row] = field(default_factory=list)


def run_apart(
    stage: Stage, *, device: str, toy: bool, seconds: float, log: Path, seen: Callable[[Row], object]
) -> Outcome:
    """Runs a stage; `seen` is told of each row as it comes. What the process prints goes to the log."""
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--stage", stage.path, f"--seconds={seconds}"]
    command += [f"--device={device}", *(["--toy"] if toy else [])]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.monotonic()
    outcome = Outcome("done", None, 0.0, seconds)
    with log.open("a") as errors:
        errors.write(f"--- {stage.name}\n")
        errors.flush()
        # A process group of its own: the tests and compilers that a stage starts end with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            ended = _read(process, started + seconds + GRACE, outcome.rows, seen)
        finally:
            _end(process)
    outcome.seconds = time.monotonic() - started
    if not ended:
        outcome.status, outcome.reason = "cut off", f"it had not ended {GRACE} s after its {seconds:.0f} s"
    elif process.returncode:
        outcome.status, outcome.reason = "failed", _last_line(log) or f"exit status {process.returncode}"
    return outcome


def _read(process: subprocess.Popen[str], until: float, rows: list[Row], seen: Callable[[Row], object]) -> bool:
    """Takes rows as the process prints them; whether it ended before the time was over."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    pending = ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if not selector.select(min(left, 1.0)):
                continue
            part = os.read(process.stdout.fileno(), 1 << 16).decode()
            if not part:
                process.wait(timeout=max(1.0, left))
                return True
            *lines, pending = (pending + part).split("\n")
            for line in lines:
                rows.append(json.loads(line))
                seen(rows[-1])
    return False


def _end(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:500]


def run_here(path: str, settings: Settings) -> None:
    """The stage itself, in its own process: its rows go to standard output, one a line, and nothing else does."""
    rows_to = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for row in importlib.import_module(path).run(settings):
        rows_to.write(json.dumps(row) + "\n")
