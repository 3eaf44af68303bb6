"""A `transformers.Trainer` whose runs go on from where they were, and end with what they have."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from sdft._compat import load_best_model, optimizer_steps
from sdft.checkpoints.claim import Claim, claimed
from sdft.checkpoints.files import write_text
from sdft.checkpoints.resume import Resuming, steps_done
from sdft.checkpoints.signals import FinishOnSignal
from sdft.checkpoints.whole_saves import WholeSaves
from sdft.errors import UsageError
from sdft.memory.exhausted import explained
from sdft.progress.phases import Phases
from sdft.run_files import RECORD
from sdft.settings.config import SDFTConfig

logger = logging.getLogger(__name__)


class Left(Exception):
    """Leaves the Trainer's loop between two steps."""


class Runs(WholeSaves):
    """Trains from the start or from a checkpoint, and does nothing where nothing is left to do.

    While it trains output_dir is its own; see `sdft.checkpoints.claim`. Among its callbacks there may be a
    `FinishOnSignal`.
    """

    args: SDFTConfig
    _run: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.phases = Phases(self.args.device)
        self._between = BetweenSteps(self.phases)
        self.add_callback(self._between)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from a checkpoint if one is named: "last", or True, is the newest in output_dir.

        From a checkpoint of the last step the trained model is loaded, and nothing else is done.
        """
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise UsageError("train is called where torch keeps no gradients (no_grad, inference_mode); it must not be")
        if torch.is_autocast_enabled(self.args.device.type):
            raise UsageError("train is called within torch.autocast; it must not be, but bf16 or fp16 may be set")
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
            if claim.steps and claim.resume is None:
                raise UsageError(
                    f"resume_from_checkpoint is {resume_from_checkpoint!r}, and the run in {claim.folder} ended after "
                    f"{claim.steps} steps: it has left its model there, and no checkpoint to go on from"
                )
            if self.args.dataloader_drop_last:
                self.total_steps()
            self._run, self.newest = claim.run, claim.resume
            resuming = stack.enter_context(Resuming(claim.resume))
            begins = Begins(claim)
            # Whether the checkpoint fits is asked before the folder becomes this run's, and both before any other
            # callback cuts its reports.
            self.callback_handler.callbacks[:0] = [resuming, begins]
            stack.callback(self.remove_callback, resuming)
            stack.callback(self.remove_callback, begins)
            self.phases.failed = None
            try:
                with explained(self.phases):
                    return super().train(claim.resume, *args, **kwargs)
            except Left:
                return self._leave()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.phases("save"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.phases("save"):
            super().save_model(output_dir, _internal_call)

    def save_beside(self, folder: str) -> None:
        if self.is_world_process_zero():
            write_text(os.path.join(folder, RECORD), json.dumps({"run": self._run}) + "\n")

    def total_steps(self) -> int:
        """How many optimizer steps the whole run has; UsageError where the rows make no batch."""
        if not len(self.get_train_dataloader()):
            raise UsageError(
                f"dataloader_drop_last is True, and the rows do not make one batch for each process "
                f"(per_device_train_batch_size is {self.args.per_device_train_batch_size}): there is no step to make"
            )
        return optimizer_steps(self)

    @property
    def _listening(self) -> list[FinishOnSignal]:
        return [each for each in self.callback_handler.callbacks if isinstance(each, FinishOnSignal)]

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process was told to stop."""
        return any(each.noted for each in self._listening)

    def leave_if_asked(self) -> None:
        """If any process was told to stop, leave the step, none of which the weights have seen; all processes ask."""
        told = [each.agreed(self.args.device) for each in self._listening]
        if any(told):
            raise Left

    def _leave(self) -> TrainOutput:
        """Do what the Trainer does at the end of its loop."""
        if self.state.global_step >= self.state.max_steps:
            if self.is_world_process_zero():
                logger.warning("the run is complete: it has all of its %d steps", self.state.max_steps)
            load_best_model(self)
        elif self.state.global_step and not (self.newest and steps_done(self.newest) == self.state.global_step):
            self._between.restore()
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, math.nan, {})


class Begins(TrainerCallback):
    """Makes the folder the run's once the optimizer and its schedule are there, so that settings which these refuse
    cost no earlier run; leaves before that if no step is left: the Trainer makes one before it looks."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise Left
        self.claim.begin()


class BetweenSteps(TrainerCallback):
    """Ends the phase of a step. `restore` gives the random numbers back as the last step left them."""

    restore: Callable[[], None]

    def __init__(self, phases: Phases) -> None:
        self.phases = phases

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.phases.begin(None)
        self.restore = random_state()


def random_state() -> Callable[[], None]:
    """A function that brings back the state that the process's random numbers have now."""
    own, of_cpu = random.getstate(), torch.get_rng_state()
    of_numpy = np.random.get_state()  # noqa: NPY002  the global one, which checkpoints have too
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(own)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_cpu)
        torch.cuda.set_rng_state_all(of_gpus)

    return restore
