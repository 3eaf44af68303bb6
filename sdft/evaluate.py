"""What the model can do, and what it has forgotten.

- Accuracy: answers to held-out prompts, greedy or sampled, right where a scorer (see `sdft.scorers`) says so of them
  and the row's `answer`. Given a template, the same for the demonstration-conditioned teacher: what it cannot do, the
  student cannot learn from it.
- Forgetting: the mean over tokens of KL(base || model) on the base model's own greedy answers to general prompts,
  in nats: how far the model's distribution has moved, at each token, where the base model would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.data import Row, check_context, encode_prompt
from sdft.layout import Sample, lay_out
from sdft.loss import divergence
from sdft.models import context_length, eos_token_ids
from sdft.rollout import generate, seeded
from sdft.scorers import Scorer, exact
from sdft.templates import Message, teacher_messages


def prompts_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int,
    template: list[Message] | None = None,
) -> list[list[int]]:
    """Token ids of the rows' prompts, or with a template of the teacher's prompts, checked against the context."""
    encoded = []
    for row in rows:
        chat = teacher_messages(row["prompt"], row["demonstration"], template) if template else row["prompt"]
        ids = encode_prompt(chat, tokenizer)
        kind = "teacher prompt" if template else "prompt"
        check_context(row, kind, len(ids), max_new_tokens, context_length(model))
        encoded.append(ids)
    return encoded


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[int]]:
    """The completion of each prompt, in the prompts' order; batches hold prompts of similar length.

    Greedy where `temperature` is None or 0; else sampled, from random numbers that depend on `seed` alone and leave
    the caller's as they were.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": eos_token_ids(model, tokenizer)}
    if temperature:
        options.update(temperature=temperature, top_p=top_p, top_k=top_k)
    completions: dict[int, list[int]] = {}
    with seeded(model.device, seed), _batches(prompts, batch_size, progress) as batches:
        for numbers in batches:
            outputs = generate(model, [prompts[number] for number in numbers], **options)
            completions.update(zip(numbers, outputs, strict=True))
    return [completions[number] for number in range(len(prompts))]


@dataclass(frozen=True)
class Answers:
    """Answers to a set of rows: as token ids, as text, and whether each is right (where rows have answers).

    Where a row is answered several times, its answers follow one another.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    texts: list[str]
    right: list[bool]

    @property
    def accuracy(self) -> float | None:
        return sum(self.right) / len(self.right) if self.right else None


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int,
    scorer: Scorer = exact,
    template: list[Message] | None = None,
    temperature: float | None = None,
    samples: int = 1,
    seed: int = 0,
    progress: str | None = None,
) -> Answers:
    """Ask the model each row's prompt (with a template: the teacher's form of it) and score the answers.

    `samples` answers to each row, greedy ones or at a `temperature`, as `complete` has it.
    """
    rows = [row for row in rows for _ in range(samples)]
    prompts = prompts_for(model, tokenizer, rows, max_new_tokens, template)
    completions = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    scored = [(text, row["answer"]) for text, row in zip(texts, rows, strict=True) if row.get("answer")]
    return Answers(prompts, completions, texts, [scorer(text, expected) for text, expected in scored])


@torch.no_grad()
def forgetting(
    model: PreTrainedModel,
    base: PreTrainedModel,
    base_answers: Answers,
    *,
    batch_size: int,
    progress: str | None = None,
) -> float:
    """The mean over tokens of KL(base || model) on the base model's own greedy answers, in nats."""
    samples = [
        Sample(prompt, completion, prompt)
        for prompt, completion in zip(base_answers.prompts, base_answers.completions, strict=True)
    ]
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with _batches(samples, batch_size, progress) as batches:
        for numbers in batches:
            batch = {k: v.to(model.device) for k, v in lay_out([samples[n] for n in numbers], skip_tokens=0).items()}
            total += divergence(model, base, batch, divergence="forward_kl", reduction="sum").loss.item()
            tokens += batch["labels"].numel()
    model.train(training)
    return total / max(tokens, 1)


def _batches(items: Sequence[list[int]] | Sequence[Sample], size: int, progress: str | None) -> tqdm:
    """The items' numbers in batches, longest items first, behind a progress bar that goes at the end of a `with`."""
    order = sorted(range(len(items)), key=lambda number: len(items[number]), reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return tqdm(batches, desc=progress, leave=False, disable=progress is None, dynamic_ncols=True)
