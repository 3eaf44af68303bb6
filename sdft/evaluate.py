"""What the model can do, and what it has forgotten.

- Accuracy: greedy answers to held-out prompts, right where they match the row's `answer`. Given a template, the same
  for the demonstration-conditioned teacher: what it cannot do, the student cannot learn from it.
- Forgetting: the mean over tokens of KL(base || model) on the base model's own greedy answers to general prompts,
  in nats: how far the model's distribution has moved, at each token, where the base model would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.data import Row, check_context, encode_prompt
from sdft.layout import Sample, lay_out
from sdft.loss import divergence
from sdft.models import context_length, eos_token_ids
from sdft.rollout import generate
from sdft.templates import Message, teacher_messages

Scorer = Callable[[str, str], bool]


def exact(completion: str, answer: str) -> bool:
    """The completion is the answer, apart from white space around it."""
    return completion.strip() == answer.strip()


def contains(completion: str, answer: str) -> bool:
    """The answer is somewhere in the completion, in upper or lower case."""
    return answer.strip().lower() in completion.lower()


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


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: str | None = None,
) -> list[list[int]]:
    """The greedy completion of each prompt, in the prompts' order; batches hold prompts of similar length."""
    eos_ids = eos_token_ids(model, tokenizer)
    completions: dict[int, list[int]] = {}
    for numbers in _batches(prompts, batch_size, progress):
        batch = [prompts[number] for number in numbers]
        outputs = generate(model, batch, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        completions.update(zip(numbers, outputs, strict=True))
    return [completions[number] for number in range(len(prompts))]


@dataclass(frozen=True)
class Answers:
    """Greedy answers to a set of rows: as token ids, as text, and whether each is right (where rows have answers)."""

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
    progress: str | None = None,
) -> Answers:
    """Ask the model each row's prompt (with a template: the teacher's form of it) and score the greedy answers."""
    prompts = prompts_for(model, tokenizer, rows, max_new_tokens, template)
    completions = greedy(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
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
    for numbers in _batches(samples, batch_size, progress):
        batch = {k: v.to(model.device) for k, v in lay_out([samples[n] for n in numbers], skip_tokens=0).items()}
        total += divergence(model, base, batch, divergence="forward_kl", reduction="sum").loss.item()
        tokens += batch["labels"].numel()
    model.train(training)
    return total / max(tokens, 1)


def _batches(items: Sequence[list[int]] | Sequence[Sample], size: int, progress: str | None) -> Iterable[list[int]]:
    order = sorted(range(len(items)), key=lambda number: len(items[number]), reverse=True)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return tqdm(batches, desc=progress, leave=False, disable=progress is None, dynamic_ncols=True)
