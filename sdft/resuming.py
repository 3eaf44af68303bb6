"""Going on from a checkpoint, which fits only a run with the settings that it was saved with."""

from __future__ import annotations

import math
import pickle
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft.errors import TrainingError, UsageError

#: What loading a checkpoint raises that is of other settings, or damaged.
DOES_NOT_FIT = (ValueError, KeyError, RuntimeError, pickle.UnpicklingError)


class Resuming(TrainerCallback):
    """Within its `with` block, UsageError in one sentence if the checkpoint does not fit the run.

    What goes wrong once it is loaded is the training's own, and stays as it is. Without a checkpoint nothing is done.

    >>> with Resuming("runs/mine/checkpoint-20") as resuming:
    ...     trainer.add_callback(resuming)
    ...     trainer.train(resume_from_checkpoint=resuming.checkpoint)
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint, self._loading = checkpoint, checkpoint is not None

    def __enter__(self) -> Resuming:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_clear = isinstance(error, UsageError | TrainingError | torch.OutOfMemoryError)
        if self._loading and isinstance(error, DOES_NOT_FIT) and not is_clear:
            raise self._refusal(" ".join(str(error).strip().splitlines()[:2])) from error

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loading:
            optimizer = kwargs["optimizer"]
            group = optimizer.param_groups[0]
            # An optimizer takes the state of another kind, and fails only when it steps.
            missing = set(getattr(optimizer, "defaults", ())) - set(group)
            if missing:
                raise self._refusal(f"its optimizer has no {' and no '.join(sorted(missing))}")
            peak = float(group.get("initial_lr", args.learning_rate))
            # The schedule would go on from the checkpoint's, whatever the run says. Some optimizers keep it in float32.
            if not math.isclose(peak, args.learning_rate, rel_tol=1e-6):
                raise self._refusal(f"its learning_rate is {peak:g}, and the run's {args.learning_rate:g}")
        self._loading = False

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"resume_from_checkpoint is {self.checkpoint!r}, which does not fit: {reason}; the settings of the model, "
            "what of it learns and the optimizer must be those that it was saved with"
        )
