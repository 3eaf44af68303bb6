"""Where a run's time goes, and how much memory it has taken.

A phase is what a run does at a time: it writes rollouts, has feedback on them, scores them, learns, saves or
evaluates. Within one phase there may be another, whose time is its own. On a GPU time is that of its stream: the CPU is
ahead of it, and making it wait at every boundary would cost what is to be measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdft.memory.peaks import Peaks

PHASES = ("rollout", "feedback", "score", "learn", "save", "eval")


class Phases:
    """The phase that is under way, if any, and the seconds and memory of each; `told` is called with another's name.

    >>> with phases("eval"):
    ...     evaluate()
    >>> phases.take()["eval"]
    """

    def __init__(self, device: torch.device) -> None:
        self.now: str | None = None
        self.failed: str | None = None  # the innermost phase that an error has left
        self.told: Callable[[str | None], None] | None = None
        self.peaks = Peaks(device)
        self._on_gpu = device.type == "cuda"
        self._began: Any = None
        self._spent: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.now
        self.begin(name)
        try:
            yield
        except BaseException:
            self.failed = self.failed or name
            raise
        finally:
            self.begin(before)

    def begin(self, name: str | None) -> None:
        """Go over to another phase, or to none."""
        time = self._time()
        if self.now is not None:
            self._spent.append((self.now, self._began, time))
        if name != self.now:
            self.peaks.note(self.now)
        if self.told is not None and name != self.now:
            self.told(name)
        self.now, self._began = name, time

    def take(self) -> dict[str, float]:
        """The seconds in each phase since this was last asked."""
        self.begin(self.now)
        seconds = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spent:
            seconds[name] += self._between(start, end)
        self._spent = []
        return seconds

    def _time(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if not self._on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
