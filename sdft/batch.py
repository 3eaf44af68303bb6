"""From token ids to the tensors of a forward pass: right-padded sequences and the positions that the loss reads.

With causal attention a token never sees what comes after it, so padding on the right needs no attention mask, every
token has its true position (counted from 0, the default everywhere), and attention runs its fastest path. Only the
hidden states at `positions`, those that predict a completion token, ever reach the output head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]  # tensors by name, and in training under "samples" what they were made of


@dataclass(frozen=True)
class Sample:
    """One completion, after the prompt that the student saw and the one that the teacher sees (none for "sft").

    `demonstration` is the expert's completion of the student's prompt, where cross-entropy on it is part of the loss.
    `old_logprobs` are the log-probabilities with which the completion's tokens in the loss were drawn, where tokens get
    importance weights. `weight` is what each of them counts beside those of other completions; one of weight 0 is left
    out of the loss. `feedback` is what was said of it. `learned` are the places of the demonstration's tokens that the
    assistant wrote, where others are between its turns (None: all are its); for "sft" the completion is what is meant.
    """

    prompt: list[int]
    completion: list[int]
    teacher_prompt: list[int] | None = None
    demonstration: list[int] | None = None
    old_logprobs: list[float] | None = None
    weight: float = 1.0
    feedback: str | None = None
    learned: list[int] | None = None

    def __len__(self) -> int:
        read = self.read()
        return max(len(read.prompt), len(read.teacher_prompt or ())) + len(read.completion)

    def read(self) -> Sample:
        """The sample as far as models go through it: of one that is left out, only what its demonstration takes."""
        if self.weight:
            return self
        prompt = self.prompt if self.demonstration is not None else self.prompt[:1]
        old_logprobs = None if self.old_logprobs is None else list[float]()
        teacher_prompt = None if self.teacher_prompt is None else self.teacher_prompt[:1]
        return replace(
            self, prompt=prompt, completion=[], teacher_prompt=teacher_prompt, old_logprobs=old_logprobs, weight=1.0
        )


def lay_out(samples: Sequence[Sample], skip_tokens: int, normalisation: str = "token") -> Batch:
    """The tensors of a micro-batch; the first `skip_tokens` tokens of each completion stay out of the loss.

    `input_ids` (rows, length) and `positions` (N,), flat into it; the same for the teacher; `labels` (N,), the
    completion tokens in the order of the positions, with `old_logprobs` (N,) where the samples have them. `starts`,
    where there is a teacher, are the places among these of each completion's first. Tokens count alike, or by
    `token_weight` (N,): their sample's weight, where some have another than 1, and with normalisation "sequence" the
    inverse of their number in their completion.
    Demonstrations come the same way: `demonstration_input_ids`, `_positions`, `_labels` and `_token_weight`.
    """
    samples = [sample.read() for sample in samples]
    prompts, completions = [s.prompt for s in samples], [s.completion for s in samples]
    learned = [s.learned if s.demonstration is None else None for s in samples]
    places = [_places(*each, skip_tokens) for each in zip(completions, learned, strict=True)]
    batch = _completions(prompts, completions, places, normalisation, [s.weight for s in samples])
    teacher_prompts = [s.teacher_prompt for s in samples if s.teacher_prompt is not None]
    if teacher_prompts:
        batch["teacher_input_ids"], batch["teacher_positions"] = _pack(teacher_prompts, completions, places)
        ends = itertools.accumulate(map(len, places))
        batch["starts"] = torch.tensor([end - len(of) for end, of in zip(ends, places, strict=True) if of]).long()
    if samples[0].old_logprobs is not None:
        batch["old_logprobs"] = torch.tensor([value for s in samples for value in s.old_logprobs or ()])
    if samples[0].demonstration is not None:
        demonstrations = [s.demonstration or [] for s in samples]
        places = [_places(tokens, s.learned) for tokens, s in zip(demonstrations, samples, strict=True)]
        tensors = _completions(prompts, demonstrations, places, normalisation)
        batch.update({f"demonstration_{name}": tensor for name, tensor in tensors.items()})
    return batch


def demonstrations_of(batch: Batch) -> Batch:
    """The batch in which the demonstrations are the completions."""
    prefix = "demonstration_"
    return {name.removeprefix(prefix): tensor for name, tensor in batch.items() if name.startswith(prefix)}


def count_items(batch: Batch) -> float:
    """What the batch adds to the number that a step's summed loss is divided by: its tokens, or its completions."""
    weight = batch.get("token_weight")
    return float(batch["labels"].numel()) if weight is None else float(weight.double().sum())


def _places(completion: list[int], learned: list[int] | None, skip_tokens: int = 0) -> list[int]:
    """The places of a completion's tokens that are in the loss."""
    return [place for place in (range(len(completion)) if learned is None else learned) if place >= skip_tokens]


def _completions(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    places: Sequence[list[int]],
    normalisation: str,
    weights: Sequence[float] = (),
) -> Batch:
    kept = [[tokens[place] for place in of_it] for tokens, of_it in zip(completions, places, strict=True)]
    batch = {"labels": torch.tensor([token for tokens in kept for token in tokens], dtype=torch.long)}
    batch["input_ids"], batch["positions"] = _pack(prompts, completions, places)
    by_sequence, weights = normalisation == "sequence", weights or [1.0] * len(kept)
    if by_sequence or any(weight != 1 for weight in weights):
        weighted = zip(weights, kept, strict=True)
        batch["token_weight"] = torch.tensor([w / len(t) if by_sequence else w for w, t in weighted for _ in t])
    return batch


def _pack(
    prompts: Sequence[list[int]], completions: Sequence[list[int]], places: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """The sequences, and the positions of the hidden states that predict the completions' tokens at these places."""
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions: list[int] = []
    for number, (row, completion, of_it) in enumerate(zip(rows, completions, places, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        first = number * length + len(row) - len(completion) - 1  # the last prompt token predicts the first of these
        positions.extend(first + place for place in of_it)
    return ids, torch.tensor(positions, dtype=torch.long)


def group(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """`parts` groups of about equal size, samples of similar length together so that little is padding.

    The longest come first: a step that does not fit into memory fails at once.
    """
    ordered = sorted(samples, key=len, reverse=True)
    bounds = [part * len(ordered) // parts for part in range(parts + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(bounds)]


def parts_within(samples: Sequence[Sample], tokens: int) -> int:
    """The fewest groups of which each keeps to so many tokens, or has a single sample.

    What counts are the tokens, padding included, whose activations are kept for a backward pass: the student's, with
    the demonstrations where they are part of the loss.
    """
    fitting = (n for n in range(1, len(samples)) if all(_padded_tokens(g) <= tokens for g in group(samples, n)))
    return next(fitting, len(samples))


def _padded_tokens(samples: Sequence[Sample]) -> int:
    samples = [sample.read() for sample in samples]
    answers = max(len(s.prompt) + len(s.completion) for s in samples)
    demonstrations = max(0 if s.demonstration is None else len(s.prompt) + len(s.demonstration) for s in samples)
    return len(samples) * (answers + demonstrations)
