"""What to say when memory has run out: in which phase, and which setting asks for less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sdft.errors import TrainingError
from sdft.progress.phases import Phases

#: By phase: the settings that bound its memory, those that cost least first.
ADVICE = {
    "rollout": "rollout_batch_size auto or a smaller one, or a smaller max_completion_length, takes less",
    "feedback": "the function of feedback, or what it calls, must take less",
    "score": "a smaller max_forward_tokens or teacher_cache_gib, or teacher_offload with full fine-tuning, takes less",
    "learn": "a smaller max_forward_tokens, activation_checkpointing, activation_offload, lora_rank or optim "
    "adamw_8bit takes less",
    "save": "what is saved is copied first, and needs room",
    "eval": "a smaller per_device_eval_batch_size or eval_completion_length takes less",
}

#: How torch says it of a CPU.
ON_CPU = "can't allocate memory"


class MemoryRanOut(TrainingError, torch.OutOfMemoryError):
    """torch's error, in a sentence with advice."""


def ran_out(error: Exception) -> bool:
    """Whether the error says that memory has run out."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and ON_CPU in str(error))


@contextlib.contextmanager
def explained(phases: Phases) -> Iterator[None]:
    """MemoryRanOut where memory runs out within."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if isinstance(error, MemoryRanOut) or not ran_out(error):
            raise
        phase = phases.failed or phases.now or "learn"
        first = str(error).split(". ", 1)[0].splitlines()[0]
        raise MemoryRanOut(f"memory ran out in {phase} ({first}); {ADVICE[phase]}") from error
