"""What ends a report, or one of its stages, before its end."""

from __future__ import annotations

import signal


class Refused(Exception):
    """The report cannot be made here; the message says why, in a sentence."""


class CutOff(Exception):
    """A stage's time was over before its work was; the message says what is missing."""


class Stopped(BaseException):
    """Ctrl-C, or another signal that asks the report to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
