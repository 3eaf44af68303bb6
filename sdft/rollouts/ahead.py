"""Rollouts a step ahead: those of the next step are written, in a thread, while this one learns.

They are drawn by the weights before the step's update, so that importance weights have to correct the loss by one
step. A step ends when both are done: what comes between steps (saving, evaluating, the end of an epoch) finds no thread
at work and random numbers as they were. The first step of an epoch, and of a run that goes on, writes its own rollouts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft.checkpoints.runs import random_state
from sdft.data import Row
from sdft.progress.phases import Phases
from sdft.rollouts.interface import Completion

#: Writes rollouts, with weights that stay as they are.
Writing = Callable[[], list[Completion]]


class RolloutsAhead(TrainerCallback):
    """Has `begin` say, once a step begins, what writes the rollouts of the rows that it is given: the next step's."""

    def __init__(self, begin: Callable[[list[Row]], Writing], phases: Phases) -> None:
        self.begin, self.phases = begin, phases
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._iterator: Iterator[list[Row]] | None = None
        self._next: list[list[Row]] = []
        self._written: tuple[int, Future[list[Completion]]] | None = None
        self._restore: Callable[[], None] | None = None

    def batches(self, iterator: Iterator[list[Row]], count: int) -> list[list[Row]]:
        """The step's batches out of an epoch's; those of the step after are taken out, too, and kept."""
        if iterator is not self._iterator:
            self._iterator, self._next = iterator, list(itertools.islice(iterator, count))
        batches, self._next = self._next, list(itertools.islice(iterator, count))
        return batches

    def take(self, step: int) -> list[Completion] | None:
        """The rollouts of this step, if they were written; what went wrong with them is raised."""
        found, self._written = self._written, None
        return found[1].result() if found is not None and found[0] == step else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._wait()  # for the thread of a run that an error has ended
        self._written = self._iterator = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = [row for batch in self._next for row in batch]
        if not rows or state.global_step + 1 >= state.max_steps:
            return
        with self.phases("rollout"):
            write = self.begin(rows)
        self._restore = random_state()
        self._written = state.global_step + 1, self.pool.submit(write)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        with self.phases("rollout"):
            self._wait()

    def _wait(self) -> None:
        if self._written is not None:
            wait([self._written[1]])
        if self._restore is not None:  # an engine in this process has drawn from them
            self._restore()
            self._restore = None
