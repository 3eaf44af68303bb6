"""Signals that ask the report to end: it writes what there is, and ends what it started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu_report.errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def raised() -> Iterator[None]:
    """The first of them raises Stopped, those after it are ignored. One that was ignored before, as under nohup, is."""

    def stop(number: int, _: Any) -> None:
        for taken in before:
            signal.signal(taken, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: handler for number in NUMBERS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
