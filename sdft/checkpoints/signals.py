"""Ctrl-C, and SIGTERM, which machines send before they take a process away: training ends with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2

#: Seconds within which a second signal is still the first: a terminal's Ctrl-C reaches all processes of a launch, and
#: the launcher passes it on to them.
ECHO = 1.0


class FinishOnSignal(TrainerCallback):
    """Within its `with` block the first signal ends training with a checkpoint, and says so at once on stderr.

    A step whose rollouts are being written is left as it is, and the step before it saved; otherwise the step is
    finished and saved. A second signal acts as it would have without this. Of several processes it is enough that one
    is told: all of them save, at the same step. `stopped` is the number of the signal that ended training, and `late`
    of one that came when its last step was done: there is no checkpoint then that was not asked for, and the model is
    still to be saved.

    >>> with FinishOnSignal() as finish:
    ...     trainer.add_callback(finish)
    ...     trainer.train()
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.silent, self.noted, self.stopped, self.late = silent, 0, 0, 0
        self._before: dict[int, Any] = {}
        self._noted_at = 0.0

    def __enter__(self) -> FinishOnSignal:
        self.noted = self.stopped = self.late = 0
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._as_before()
        noted, self.noted = self.noted, 0  # what trains after the block was told nothing
        if noted and not (self.stopped or self.late) and error is None:  # it came when training was over
            signal.raise_signal(noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            if time.monotonic() - self._noted_at >= ECHO:
                self._as_before()
                signal.raise_signal(number)
            return
        self.noted, self._noted_at = number, time.monotonic()
        if not self.silent:
            bar = "\n" if os.isatty(STDERR) else ""
            # print may be at work just now, and would not be interrupted by itself.
            os.write(STDERR, f"{bar}sdft: stopping after this step; again to stop now\n".encode())

    def _as_before(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was told to stop; all of them must ask, and training must then end."""
        self.stopped = _of_any_process(self.noted, device)
        return bool(self.stopped)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed(args.device):
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.stopped:
            self.late = _of_any_process(self.noted, args.device)


def _of_any_process(number: int, device: torch.device) -> int:
    if not distributed.is_initialized():
        return number
    numbers = torch.tensor(number, device=device)
    distributed.all_reduce(numbers, op=distributed.ReduceOp.MAX)
    return int(numbers)
