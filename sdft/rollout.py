"""Rollouts: the student's own answers, which the teacher then scores.

Prompts are padded on the left inside `generate` and nowhere else; what comes back are plain lists of token ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from sdft.errors import TrainingError
from sdft.sampling import RowSampler, sample_rows, seed_of


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """A completion for each prompt: up to and with its end-of-sequence token, or `max_new_tokens` long.

    Greedy where `temperature` is None; otherwise sampled, with `seeds`, one for each prompt, by random numbers of each
    prompt's own, and without by torch's. The model's own generation defaults (repetition penalties, top-k and the like)
    are set aside, so that tokens come from the distribution that the loss sees.
    """
    longest = max(map(len, prompts))
    pad_id = min(eos_ids, default=0)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(eos_ids) or None, pad_token_id=pad_id, use_cache=True
    )
    if temperature is not None:
        settings.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    processors = LogitsProcessorList()
    if temperature is not None and seeds is not None:
        processors = sample_rows(settings, seeds, model.device)
    with _generating(model):
        try:
            output = cast(Any, model).generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                logits_processor=processors,
                synced_gpus=is_sharded(model),
            )
        except RuntimeError as error:
            if "probability tensor" in str(error):
                raise TrainingError("the student's logits are no longer finite, so it cannot be sampled") from error
            raise
    for processor in processors:
        if isinstance(processor, RowSampler):
            processor.check()
    return [cut(row, eos_ids) for row in output[:, longest:].tolist()]


def cut(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    """The tokens up to and with the first end-of-sequence token; what follows it is padding."""
    for position, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: position + 1]
    return tokens


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether each process has but a part of the weights, so that all must go on until the last has its answers."""
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and neutral generation defaults, and everything as it was afterwards."""
    training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
        model.train(training)


@contextlib.contextmanager
def seeded(device: torch.device, *entropy: int) -> Iterator[None]:
    """Random numbers that depend on `entropy` alone, without disturbing the run's own generators.

    With (seed, step, process) a resumed run samples the rollouts that the uninterrupted one would have, whatever was
    drawn before.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*entropy))
        yield
