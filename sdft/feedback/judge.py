"""A judge by a shell command, which reads a step's rollouts as JSON and writes what the teacher is to see.

It reads a list of objects: `row`, `completion`, `finished`, `group` and `step` of each rollout. It writes a list as
long, each an object with `messages` (a chat, a text, or null to leave the rollout out) and if it likes `weight` and
`log`, or null, which leaves the rollout out too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from sdft.data.rows import WHERE
from sdft.errors import TrainingError, UsageError, shown
from sdft.feedback.interface import Feedback, Rollout
from sdft.settings.checks import check_between

GIVEN = ("row", "completion", "finished", "group", "step")
TAKEN = {"messages", "weight", "log"}
#: Seconds, some twelve days.
LONGEST = 1e6


def judge(rollouts: Sequence[Rollout], *, command: str, timeout: float = 600.0) -> list[Feedback]:
    """What `command` says of the rollouts, in at most `timeout` seconds; TrainingError where it fails.

    Without rollouts it is not asked.
    """
    if not (isinstance(command, str) and command.strip()):
        raise UsageError(f"command of feedback_args is {shown(command)}; it must be a shell command")
    check_between("timeout of feedback_args", timeout, 0, LONGEST, closed_above=True)
    if not rollouts:
        return []
    given = json.dumps([_given(rollout) for rollout in rollouts], default=str).encode()
    process = subprocess.Popen(
        command, shell=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        written, complaint = process.communicate(given, timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)  # with what the shell has started
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _failed(command, f"has not ended after {timeout:g} seconds") from error
        raise
    if process.returncode:
        last = (complaint.decode(errors="replace").strip().splitlines() or ["without a word"])[-1]
        raise _failed(command, f"ended with exit code {process.returncode}: {last}")
    try:
        found = json.loads(written)
    except ValueError as error:
        raise _failed(command, f"wrote what is no JSON: {error}") from error
    if not isinstance(found, list) or len(found) != len(rollouts):
        raise _failed(command, f"must write a list of {len(rollouts)} judgements, one for each rollout")
    return [_read(each, rollout, command) for each, rollout in zip(found, rollouts, strict=True)]


def _given(rollout: Rollout) -> dict[str, Any]:
    columns = {name: value for name, value in rollout.row.items() if name != WHERE}
    return {**{name: getattr(rollout, name) for name in GIVEN}, "row": columns}


def _read(found: Any, rollout: Rollout, command: str) -> Feedback:
    if found is not None and not (isinstance(found, dict) and "messages" in found and found.keys() <= TAKEN):
        raise _failed(command, f"must write of {rollout.where} an object of messages, weight and log, or null")
    return Feedback(**found) if found else Feedback(None)


def _failed(command: str, what: str) -> TrainingError:
    return TrainingError(f"feedback's command {command!r} {what}")
