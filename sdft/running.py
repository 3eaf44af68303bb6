"""A `transformers.Trainer` whose runs go on from where they were, and end with what they have."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from sdft._compat import load_best_model
from sdft.checkpoint import write_text
from sdft.claim import claimed
from sdft.config import SDFTConfig
from sdft.resuming import RECORD, Resuming, steps_done
from sdft.saving import WholeSaves

logger = logging.getLogger(__name__)


class Left(Exception):
    """Leaves the Trainer's loop between two steps."""


class Runs(WholeSaves):
    """Trains from the start or from a checkpoint, and does nothing where nothing is left to do.

    While it trains output_dir is its own; see `sdft.claim`.
    """

    args: SDFTConfig
    _run: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(LeaveWhenDone())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint if one is named: "last", or True, is the newest in output_dir.

        From a checkpoint of the last step the trained model is loaded, and nothing else is done.
        """
        with contextlib.ExitStack() as stack:
            claim = stack.enter_context(
                claimed(
                    str(self.args.output_dir),
                    resume_from_checkpoint,
                    overwrite=self.args.overwrite_output_dir,
                    main=self.is_world_process_zero(),
                    run=self._run,
                )
            )
            self._run = claim.run
            if claim.resume is None or not self.is_complete(claim.resume):
                claim.begin()
            resuming = stack.enter_context(Resuming(claim.resume))
            self.add_callback(resuming)
            stack.callback(self.remove_callback, resuming)
            try:
                return super().train(claim.resume, *args, **kwargs)
            except Left:
                return self._leave()

    def save_beside(self, folder: str) -> None:
        if self.is_world_process_zero():
            write_text(os.path.join(folder, RECORD), json.dumps({"run": self._run}) + "\n")

    def total_steps(self) -> int:
        """How many optimizer steps the whole run has."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def is_complete(self, checkpoint: str) -> bool:
        """Whether the checkpoint is of the run's last step, or a later one."""
        return steps_done(checkpoint) >= self.total_steps()

    def _leave(self) -> TrainOutput:
        """Do what the Trainer does at the end of its loop."""
        if self.is_world_process_zero():
            logger.warning("the run is complete: it has %d of %d steps", self.state.global_step, self.state.max_steps)
        load_best_model(self)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, math.nan, {})


class LeaveWhenDone(TrainerCallback):
    """The Trainer makes a step before it looks whether there is one left."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise Left
