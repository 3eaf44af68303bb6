"""From token ids to the tensors of a forward pass: right-padded sequences and the positions that the loss reads.

With causal attention a token never sees what comes after it, so padding on the right needs no attention mask, every
token has its true position (counted from 0, the default everywhere), and attention runs its fastest path. Only the
hidden states at `positions`, those that predict a completion token, ever reach the output head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]  # tensors by name, and under "samples" what they were made of, where that is to be logged


@dataclass(frozen=True)
class Sample:
    """One completion, after the prompt that the student saw and the one that the teacher sees (none for "sft")."""

    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None = None

    def __len__(self) -> int:
        return max(len(self.prompt), len(self.teacher_prompt or ())) + len(self.completion)


def lay_out(samples: Sequence[Sample], skip_tokens: int) -> Batch:
    """The tensors of a micro-batch; the first `skip_tokens` tokens of each completion stay out of the loss.

    `input_ids` (rows, length) and `positions` (N,), flat into it; the same for the teacher; `labels` (N,), the
    completion tokens in the order of the positions.
    """
    batch = {"labels": torch.tensor([token for s in samples for token in s.completion[skip_tokens:]], dtype=torch.long)}
    batch["input_ids"], batch["positions"] = _pack(
        [s.prompt for s in samples], [s.completion for s in samples], skip_tokens
    )
    teacher_prompts = [s.teacher_prompt for s in samples if s.teacher_prompt is not None]
    if teacher_prompts:
        batch["teacher_input_ids"], batch["teacher_positions"] = _pack(
            teacher_prompts, [s.completion for s in samples], skip_tokens
        )
    return batch


def _pack(prompts: Sequence[list[int]], completions: Sequence[list[int]], skip_tokens: int) -> tuple[Tensor, Tensor]:
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions: list[int] = []
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        first = number * length + len(row) - len(completion) - 1  # the last prompt token predicts the first of these
        positions.extend(range(first + skip_tokens, first + len(completion)))
    return ids, torch.tensor(positions, dtype=torch.long)


def split(samples: Sequence[Sample], parts: int, skip_tokens: int) -> list[Batch]:
    """The micro-batches of `group`, laid out."""
    return [lay_out(members, skip_tokens) for members in group(samples, parts)]


def group(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """`parts` groups of about equal size, samples of similar length together so that little is padding.

    The longest come first: a step that does not fit into memory fails at once.
    """
    ordered = sorted(samples, key=len, reverse=True)
    bounds = [part * len(ordered) // parts for part in range(parts + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(bounds)]
