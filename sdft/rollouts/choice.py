"""How the next token is chosen, in transformers' words: what the back-ends that run on transformers have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from sdft.attention import of_any_length
from sdft.errors import Diverged
from sdft.forward import evaluating
from sdft.rollouts.interface import Completion, Request, Sampling
from sdft.rollouts.row_sampler import RowSampler, sample_rows


def padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (rows, tokens), padded on the left, and a mask that is 0 where there is padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def token_choice(
    sampling: Sampling, requests: Sequence[Request], device: torch.device
) -> tuple[GenerationConfig, LogitsProcessorList, RowSampler | None]:
    """`sampling` in transformers' words: the one place where it is said how the next token is chosen.

    Where requests have seeds, the last processor is a RowSampler, which is given beside them.
    """
    settings = generation_settings(sampling)
    seeds = [request.seed for request in requests if request.seed is not None]
    if len(seeds) < len(requests):
        return settings, LogitsProcessorList(), None
    sampler = RowSampler(seeds, device, with_logprobs=sampling.logprobs)
    return settings, sample_rows(settings, sampler), sampler


def drawn(outputs: Sequence[list[int]], sampler: RowSampler | None) -> list[Completion]:
    """Completions of these tokens, with the log-probabilities that the sampler has kept."""
    logprobs = None if sampler is None else sampler.logprobs()
    if logprobs is None:
        return [Completion(tokens) for tokens in outputs]
    return [Completion(tokens, of_row) for tokens, of_row in zip(outputs, logprobs, strict=True)]


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


@contextlib.contextmanager
def sampling_from(model: PreTrainedModel, sampler: RowSampler | None) -> Iterator[None]:
    """Evaluation mode, and the model's own generation defaults (repetition penalties, top-k and the like) set aside, so
    that tokens come from the distribution that the loss sees; an attention for any length, since each pass has a new
    one; everything as it was afterwards."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(model), of_any_length(model.device):
            yield
        if sampler is not None:
            sampler.check()
    except RuntimeError as error:
        if "probability tensor" in str(error):
            raise Diverged("the model's logits are no longer finite, so it cannot be sampled") from error
        raise
    finally:
        model.generation_config = defaults
