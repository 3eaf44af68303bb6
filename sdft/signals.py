"""SIGTERM, which machines send before they take a process away: the step is finished and saved, and training ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState


class FinishOnSignal(TrainerCallback):
    """Within its `with` block the first signal ends training after a checkpoint of the step under way.

    A second one acts as it would have without this. Of several processes it is enough that one is told: all of them
    save, at the same step. `stopped` says whether training was ended, and `late` whether the signal came when its last
    step was done: there is no checkpoint then that was not asked for, and the model is still to be saved.

    >>> with FinishOnSignal() as finish:
    ...     trainer.add_callback(finish)
    ...     trainer.train()
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        self.number, self.noted, self.stopped, self.late = number, False, False, False

    def __enter__(self) -> FinishOnSignal:
        self._before = signal.signal(self.number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.signal(self.number, self._before)
        if self.noted and not (self.stopped or self.late) and error is None:  # it came when training was over
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.signal(number, self._before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _any_process(self.noted, args.device):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.late = not self.stopped and _any_process(self.noted, args.device)


def _any_process(flag: bool, device: torch.device) -> bool:
    if not distributed.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
    return bool(flags)
