"""Whether rollouts have left the range of the first steps: their entropy, their length, the share that is finished."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

#: What is watched, by its name in the log.
WATCHED = ("student_entropy", "completion_length", "finished")
#: Lines of the log that the first and the last means are of.
LINES = 10
#: How many times above or below is worth a sentence.
WORTH_SAYING = 10.0


class CollapseWatch(TrainerCallback):
    """Says once when something has left its range by a factor, and with a `factor` of its own ends training."""

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self._first: dict[str, list[float]] = {name: [] for name in WATCHED}
        self._last: dict[str, deque[float]] = {name: deque(maxlen=LINES) for name in WATCHED}
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in what a run that goes on has logged before."""
        for line in state.log_history:
            self._take(line)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in self._take(logs or {}):
            if len(self._last[name]) == LINES and not self._said:
                self._judge(name, state, control)

    def _take(self, line: dict[str, Any]) -> list[str]:
        """The names of what a step's line in the log has of what is watched, once that is kept."""
        names = [name for name in WATCHED if name in line and "loss" in line]
        for name in names:
            first = self._first[name]
            (first if len(first) < LINES else self._last[name]).append(line[name])
        return names

    def _judge(self, name: str, state: TrainerState, control: TrainerControl) -> None:
        first, last = sum(self._first[name]) / LINES, sum(self._last[name]) / LINES
        factor = self.factor or WORTH_SAYING
        too_high = last > first * factor and name != "finished"  # of which more is better
        if first <= 0 or not (too_high or last < first / factor):
            return
        self._said = True
        control.should_training_stop = control.should_training_stop or self.factor is not None
        if state.is_world_process_zero:
            logger.warning(
                "%s was %.3g in the first %d lines of the log and is %.3g in the last %d, at step %d: %s",
                name,
                first,
                LINES,
                last,
                LINES,
                state.global_step,
                f"stop_on_collapse is {factor:g}, and training ends"
                if self.factor is not None
                else "rollouts may have collapsed (stop_on_collapse would end training)",
            )
