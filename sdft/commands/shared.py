"""What the commands share."""

from __future__ import annotations

import warnings

import torch
from transformers.utils import logging

from sdft.evaluation.exam import Answers


def accuracy_of(answers: Answers | None) -> float | None:
    return None if answers is None else answers.accuracy


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet() -> None:
    """Leave the terminal to the run's own progress and table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft asks every model that it wraps by the old name (PeftModel.__init__), and transformers warns of that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
