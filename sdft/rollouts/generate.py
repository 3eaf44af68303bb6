"""Rollouts: answers that a model samples, which the teacher then scores.

A back-end (`sdft.rollouts.interface`) writes them. There are two, transformers' `generate` and its continuous batching;
`register_backend` adds another. With seeds, one for each prompt, both draw the same tokens, whatever is sampled beside
them; without, they draw by torch's own random numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from sdft._compat import with_cache
from sdft.errors import TrainingError, UsageError, counted
from sdft.progress.counts import InBatches, Watched
from sdft.rollouts.choice import drawn, padded, sampling_from, token_choice
from sdft.rollouts.continuous import generate_continuously
from sdft.rollouts.drafts import by_drafts
from sdft.rollouts.fitting import AsManyAsFit
from sdft.rollouts.interface import Backend, Completion, Request, Sampling, cut
from sdft.rollouts.kv_cache import roomy_cache, static_cache
from sdft.rollouts.row_sampler import seed_of
from sdft.rollouts.stop_strings import AtStopString, just_stopped


def write(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: str | Backend = "generate",
    batch_size: int | AsManyAsFit | None = None,
) -> list[Completion]:
    """A completion for each request, in the requests' order.

    With a `batch_size`, so many are sampled at once, the longest prompts first and each with those of similar length;
    `AsManyAsFit` finds the number, and sampling goes on with half of it where memory runs out.
    Raises UsageError for an unknown back-end or stop strings without a tokenizer, TrainingError for a model whose
    logits are not finite.
    """
    function = find_backend(backend) if isinstance(backend, str) else backend
    batches = None if sampling.watch is None else InBatches(sampling.watch)
    sampling = replace(sampling, watch=batches)
    if sampling.stop and tokenizer is None:
        raise UsageError("tokenizer is not set; it must be the model's, to find stop strings")
    if sampling.temperature is None:  # greedy decoding draws nothing
        requests = [replace(request, seed=None) for request in requests]
    completions: dict[int, Completion] = {}
    lengths = [len(request.prompt) for request in requests]
    fitting = batch_size if isinstance(batch_size, AsManyAsFit) else None
    size = fitting.size(model, lengths, sampling.max_new_tokens) if fitting else cast(int | None, batch_size)
    waiting = batches_by_length(lengths, size)
    while waiting:
        numbers = waiting.pop(0)
        if batches is not None and batches.left and not is_sharded(model):  # of which processes need each other's parts
            completions.update((number, Completion([])) for number in numbers)
            continue
        answer = functools.partial(function, model, [requests[number] for number in numbers], sampling, tokenizer)
        outputs = fitting.attempt(answer, len(numbers), model.device) if fitting else answer()
        if outputs is None:
            left = [number for batch in (numbers, *waiting) for number in batch]
            smaller = batches_by_length([lengths[number] for number in left], fitting.most if fitting else None)
            waiting = [[left[place] for place in batch] for batch in smaller]
            continue
        if len(outputs) != len(numbers):
            raise TrainingError(
                f"rollout back-end {backend!r} gave {counted(len(outputs), 'completion')} for "
                f"{counted(len(numbers), 'prompt')}"
            )
        written = [cut(output, sampling, tokenizer) for output in outputs]
        completions.update(zip(numbers, written, strict=True))
        if batches is not None:
            batches.add([completion.tokens for completion in written])
    return [completions[number] for number in range(len(requests))]


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seeds: Sequence[int] | None = None,
    backend: str | Backend = "generate",
    batch_size: int | AsManyAsFit | None = None,
) -> list[list[int]]:
    """The tokens of a completion for each prompt, drawn by its seed or by torch's own random numbers; see `write`."""
    own = [None] * len(prompts) if seeds is None else seeds
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, own, strict=True)]
    completions = write(model, requests, sampling, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
    return [completion.tokens for completion in completions]


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
    """A completion for each prompt by transformers' `generate`, in one batch; see `Sampling`."""
    return sample(model, prompts, Sampling(max_new_tokens, eos_ids, temperature, top_p, top_k), seeds=seeds)


def batches_by_length(lengths: Sequence[int], size: int | None) -> list[list[int]]:
    """Numbers of the items in batches of at most `size`, the longest first; None: all in one batch, as they are."""
    if size is None or size >= len(lengths):
        return [list(range(len(lengths)))] if lengths else []
    order = sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


# Back-ends


def by_generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Completion]:
    """transformers' `generate`: one batch, prompts padded on the left, which goes on until its last row has ended.

    Where requests have drafts, `by_drafts` writes the same tokens.
    """
    own = sampling.temperature is None or all(request.seed is not None for request in requests)
    if own and any(request.draft for request in requests):
        return by_drafts(model, requests, sampling, tokenizer)
    return _generated(model, requests, sampling, tokenizer, roomy_cache(model))


def by_compiled_generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Completion]:
    """`generate` with a cache that has its whole length from the start, whatever the drafts.

    With such a cache transformers compiles the pass of a token where the model is on a GPU, into CUDA graphs.
    """
    longest = max(len(request.prompt) for request in requests)
    return _generated(model, requests, sampling, tokenizer, static_cache(model, longest + sampling.max_new_tokens))


def _generated(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None,
    cache: Cache | None,
) -> list[Completion]:
    longest = max(len(request.prompt) for request in requests)
    ids, mask = padded([request.prompt for request in requests], min(sampling.eos_ids, default=0))
    stopping = StoppingCriteriaList()
    if sampling.stop and tokenizer is not None:
        stopping.append(AtStopString(sampling.stop, tokenizer, longest))
    if sampling.watch is not None:
        stopping.append(Watched(sampling.watch, len(requests), sampling.eos_ids, model.device))
    settings, processors, sampler = token_choice(sampling, requests, model.device)
    with sampling_from(model, sampler), torch.no_grad():
        output = cast(Any, model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=stopping,
            synced_gpus=is_sharded(model),
            **with_cache(model, cache),
        )
    return drawn(output[:, longest:].tolist(), sampler)


def by_continuous_batching(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Completion]:
    """transformers' continuous batching: no padding, and what has ended makes room for what has not begun."""
    if is_sharded(model):
        raise TrainingError(
            "rollout_backend is 'continuous', and the model's weights are sharded over processes, which would each "
            "take steps of their own; it may be generate"
        )
    settings, processors, sampler = token_choice(sampling, requests, model.device)
    stopped = None
    if sampling.stop and tokenizer is not None:
        stopped = functools.partial(just_stopped, stop=sampling.stop, tokenizer=tokenizer)
    prompts = [request.prompt for request in requests]
    with sampling_from(model, sampler):
        return drawn(generate_continuously(model, prompts, settings, processors, stopped, sampling.watch), sampler)


BACKENDS: dict[str, Backend] = {"generate": by_generate, "continuous": by_continuous_batching}


def register_backend(name: str, backend: Backend) -> None:
    """Make `backend` one that `rollout_backend` may name; SDFTConfig knows those registered before it is made."""
    BACKENDS[name] = backend


def find_backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise UsageError(f"backend is {name!r}; it may be {', '.join(BACKENDS)}")
    return BACKENDS[name]


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether each process has but a part of the weights, so that all must go on until the last has its answers."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextlib.contextmanager
def seeded(device: torch.device, *entropy: int) -> Iterator[None]:
    """Random numbers that depend on `entropy` alone, without disturbing the caller's: to sample without seeds under."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*entropy))
        yield
