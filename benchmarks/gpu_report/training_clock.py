"""Seconds and memory of a training step by phase, whoever's trainer it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

GIBIBYTE = 2**30

PHASES = ("teacher", "forward", "loss", "backward", "optimizer", "rest")


@dataclass
class Phases:
    """Seconds and peak memory of what is going on; what goes on within a phase belongs to it."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    _within: bool = False

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._within:
            yield
            return
        self._within, started = True, self.now()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started
            if self.device == "cuda":
                peak = torch.cuda.max_memory_allocated() / GIBIBYTE
                self.peak[name] = max(self.peak.get(name, 0.0), peak)
            self._within = False

    def around(self, function: Any, name: str) -> Any:
        """The same function, as a phase."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return wrapped

    def clear(self) -> None:
        self.seconds.clear()
        self.peak.clear()


class Clock(TrainerCallback):
    """Times the optimizer, and the whole of each step."""

    def __init__(self, phases: Phases) -> None:
        self.phases = phases
        self.wholes: list[float] = []
        self.taken: list[tuple[dict[str, float], dict[str, float]]] = []
        self._open: contextlib.ExitStack | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.phases.clear()
        self.began = self.phases.now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._open = contextlib.ExitStack()
        self._open.enter_context(self.phases.phase("optimizer"))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._open is not None:
            self._open.close()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        whole = self.phases.now() - self.began
        found = dict(self.phases.seconds)
        found["rest"] = whole - sum(found.values())
        self.taken.append((found, dict(self.phases.peak)))
        self.wholes.append(whole)
