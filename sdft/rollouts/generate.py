"""Rollouts: answers that a model samples, which the teacher then scores.

A back-end is a function `(model, prompts, sampling, tokenizer, seeds) -> completions`, prompts and completions as lists
of token ids. There are two, transformers' `generate` and its continuous batching; `register_backend` adds another. A
completion may go on after its end in what a back-end returns: it is cut here. With seeds, one for each prompt, both
draw the same tokens, whatever is sampled beside them; without, they draw by torch's own random numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from sdft._compat import with_cache
from sdft.errors import TrainingError, UsageError, counted
from sdft.forward import evaluating
from sdft.progress.counts import InBatches, Watch, Watched
from sdft.rollouts.continuous import generate_continuously
from sdft.rollouts.fitting import AsManyAsFit
from sdft.rollouts.kv_cache import roomy_cache
from sdft.rollouts.row_sampler import RowSampler, sample_rows, seed_of
from sdft.rollouts.stop_strings import AtStopString, just_stopped, stopped_length


@dataclass(frozen=True)
class Sampling:
    """How a completion is written: up to and with an end-of-sequence token or stop string, or `max_new_tokens` long.

    Greedy where `temperature` is None. Otherwise from softmax(logits / temperature), of which `top_k` keeps so many
    of the likeliest tokens (0: all), `top_p` the smallest set with that much probability, and `min_p` those with at
    least that share of the likeliest one's probability. `stop` needs a tokenizer wherever the sampling is used.
    A back-end tells `watch` of every token, if it can.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    watch: Watch | None = field(default=None, compare=False)


Prompts = Sequence[Sequence[int]]
Seeds = Sequence[int] | None
Backend = Callable[[PreTrainedModel, Prompts, Sampling, PreTrainedTokenizerBase | None, Seeds], list[list[int]]]


def sample(
    model: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seeds: Seeds = None,
    backend: str = "generate",
    batch_size: int | AsManyAsFit | None = None,
) -> list[list[int]]:
    """A completion for each prompt, in the prompts' order.

    With a `batch_size`, so many are sampled at once, the longest prompts first and each with those of similar length;
    `AsManyAsFit` finds the number, and sampling goes on with half of it where memory runs out.
    Raises UsageError for an unknown back-end or stop strings without a tokenizer, TrainingError for a model whose
    logits are not finite.
    """
    function = find_backend(backend)
    batches = None if sampling.watch is None else InBatches(sampling.watch)
    sampling = replace(sampling, watch=batches)
    if sampling.stop and tokenizer is None:
        raise UsageError("tokenizer is not set; it must be the model's, to find stop strings")
    completions: dict[int, list[int]] = {}
    lengths = [len(prompt) for prompt in prompts]
    fitting = batch_size if isinstance(batch_size, AsManyAsFit) else None
    size = fitting.size(model, lengths, sampling.max_new_tokens) if fitting else cast(int | None, batch_size)
    waiting = batches_by_length(lengths, size)
    while waiting:
        numbers = waiting.pop(0)
        if batches is not None and batches.left and not is_sharded(model):  # of which processes need each other's parts
            completions.update((number, []) for number in numbers)
            continue
        own = None if seeds is None or sampling.temperature is None else [seeds[number] for number in numbers]
        write = functools.partial(function, model, [prompts[number] for number in numbers], sampling, tokenizer, own)
        outputs = fitting.attempt(write, len(numbers), model.device) if fitting else write()
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
            batches.add(written)
    return [completions[number] for number in range(len(prompts))]


def generate(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seeds: Seeds = None,
) -> list[list[int]]:
    """A completion for each prompt by transformers' `generate`, in one batch; see `Sampling`."""
    return sample(model, prompts, Sampling(max_new_tokens, eos_ids, temperature, top_p, top_k), seeds=seeds)


def batches_by_length(lengths: Sequence[int], size: int | None) -> list[list[int]]:
    """Numbers of the items in batches of at most `size`, the longest first; None: all in one batch, as they are."""
    if size is None or size >= len(lengths):
        return [list(range(len(lengths)))] if lengths else []
    order = sorted(range(len(lengths)), key=lambda number: lengths[number], reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def cut(tokens: Sequence[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """The tokens up to the completion's end: what follows is padding, or was written before the end was noticed."""
    kept = list(tokens[: sampling.max_new_tokens])
    for position, token in enumerate(kept):
        if token in sampling.eos_ids:
            kept = kept[: position + 1]
            break
    return kept[: _stopped(kept, sampling, tokenizer)]


def finished(tokens: Sequence[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Whether a completion came to an end of its own, rather than to `max_new_tokens`."""
    ended = bool(tokens) and tokens[-1] in sampling.eos_ids
    return ended or _stopped(tokens, sampling, tokenizer) is not None


def _stopped(tokens: Sequence[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    return stopped_length(tokens, sampling.stop, tokenizer) if tokenizer is not None else None


# Back-ends


def by_generate(
    model: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seeds: Seeds = None,
) -> list[list[int]]:
    """transformers' `generate`: one batch, prompts padded on the left, which goes on until its last row has ended."""
    longest = max(map(len, prompts))
    pad_id = min(sampling.eos_ids, default=0)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    stopping = StoppingCriteriaList()
    if sampling.stop and tokenizer is not None:
        stopping.append(AtStopString(sampling.stop, tokenizer, longest))
    if sampling.watch is not None:
        stopping.append(Watched(sampling.watch, len(prompts), sampling.eos_ids, model.device))
    settings, processors = token_choice(sampling, seeds, model.device)
    with _generating(model, processors), torch.no_grad():
        output = cast(Any, model).generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=stopping,
            synced_gpus=is_sharded(model),
            **with_cache(model, roomy_cache(model)),
        )
    return cast(list[list[int]], output[:, longest:].tolist())


def by_continuous_batching(
    model: PreTrainedModel,
    prompts: Prompts,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seeds: Seeds = None,
) -> list[list[int]]:
    """transformers' continuous batching: no padding, and what has ended makes room for what has not begun."""
    if is_sharded(model):
        raise TrainingError(
            "rollout_backend is 'continuous', and the model's weights are sharded over processes, which would each "
            "take steps of their own; it may be generate"
        )
    settings, processors = token_choice(sampling, seeds, model.device)
    stopped = None
    if sampling.stop and tokenizer is not None:
        stopped = functools.partial(just_stopped, stop=sampling.stop, tokenizer=tokenizer)
    with _generating(model, processors):
        return generate_continuously(model, prompts, settings, processors, stopped, sampling.watch)


def token_choice(
    sampling: Sampling, seeds: Seeds, device: torch.device
) -> tuple[GenerationConfig, LogitsProcessorList]:
    """`sampling` in transformers' words: the one place where it is said how the next token is chosen."""
    settings = generation_settings(sampling)
    return settings, LogitsProcessorList() if seeds is None else sample_rows(settings, seeds, device)


def generation_settings(sampling: Sampling) -> GenerationConfig:
    """`sampling` as a GenerationConfig."""
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(sampling.eos_ids) or None,
        pad_token_id=min(sampling.eos_ids, default=0),
        use_cache=True,
    )
    if sampling.temperature is not None:
        settings.update(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p or None,
        )
    return settings


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
def _generating(model: PreTrainedModel, processors: LogitsProcessorList) -> Iterator[None]:
    """Evaluation mode, and the model's own generation defaults (repetition penalties, top-k and the like) set aside, so
    that tokens come from the distribution that the loss sees; everything as it was afterwards."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model):
            yield
        for processor in processors:
            if isinstance(processor, RowSampler):
                processor.check()
    except RuntimeError as error:
        if "probability tensor" in str(error):
            raise TrainingError("the model's logits are no longer finite, so it cannot be sampled") from error
        raise
    finally:
        model.generation_config = defaults


@contextlib.contextmanager
def seeded(device: torch.device, *entropy: int) -> Iterator[None]:
    """Random numbers that depend on `entropy` alone, without disturbing the caller's: to sample without seeds under."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*entropy))
        yield
