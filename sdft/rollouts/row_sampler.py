"""Sampling in which every row has random numbers of its own, whatever else is sampled beside it.

`torch.multinomial` draws for a whole batch from one generator, so that a rollout depends on the batch it is in and
on the process that samples it. Here a row's draws depend on its own seed alone: two processes sample what one would,
and so do batches of another size.

The draw is Gumbel's: with G of -log(Exponential(1)) for each token, argmax(scores + G) is distributed as
softmax(scores). Unlike searching the cumulated probabilities, whose rounding differs with the shape of the batch and
adds up over the vocabulary, it changes only where the two best tokens come within rounding of each other.

On the CPU the noise is numpy's, which takes a third of the time of torch's and has more than its 24 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sdft.errors import Diverged


def seed_of(*entropy: int) -> int:
    """A seed for a generator that depends on all of `entropy`, whole numbers of 0 or more, and on their order."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


class RowSampler(LogitsProcessor):
    """Makes greedy decoding a draw: adds to the scores of each row noise from the row's own generator.

    One seed for each row of the batch, in its order; `scores` are (rows, V) float32, after all other processors. It is
    called once for each token that is drawn. `with_logprobs`, it keeps the log-probability of each.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, *, with_logprobs: bool = False) -> None:
        self.fill: list[Callable[[Tensor], object]] = [_exponential(seed, device) for seed in seeds]
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.with_logprobs = with_logprobs
        self._logprobs: list[tuple[Sequence[int], Tensor]] = []  # of rows of these numbers, one draw after the other

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.draw(scores, range(len(scores)))

    def draw(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """The scores (len(rows), V) with the next noise of the rows of these numbers: the token is where they peak."""
        self.finite &= scores.amax(-1).isfinite().all()  # read at the end: a look at every token would stall a GPU
        noise = torch.empty_like(scores)
        for row, number in zip(noise, rows, strict=True):
            self.fill[number](row)
        noisy = torch.sub(scores, noise.log_(), out=noise)
        if self.with_logprobs:
            of_token = scores.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
            self._logprobs.append((rows, of_token - scores.logsumexp(-1)))
        return noisy

    def logprobs(self) -> list[list[float]] | None:
        """For each row the log-probabilities of the tokens drawn so far, in nats; None where they are not kept."""
        if not self.with_logprobs:
            return None
        kept: list[list[float]] = [[] for _ in self.fill]
        for rows, values in self._logprobs:
            for row, value in zip(rows, values.tolist(), strict=True):
                kept[row].append(value)
        return kept

    def check(self) -> None:
        """Diverged if there was nothing to draw from: a NaN, an infinity, or no token left."""
        if not self.finite:
            raise Diverged("the model's logits are no longer finite, so it cannot be sampled")


def _exponential(seed: int, device: torch.device) -> Callable[[Tensor], object]:
    """A function that fills a vector with the next draws from Exponential(1), none of them 0."""
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        return lambda row: row.exponential_(generator=generator)
    random = np.random.default_rng(seed)

    def fill(row: Tensor) -> None:
        row.copy_(torch.from_numpy(random.standard_exponential(row.numel()))).clamp_(min=torch.finfo(row.dtype).tiny)

    return fill


def sample_rows(settings: GenerationConfig, sampler: RowSampler) -> LogitsProcessorList:
    """Logits processors that sample as `settings` say, each row by its own seed; the last of them is the sampler.

    `settings` become greedy: the draw is then the processors'. `generate` applies its own warpers only where it draws
    itself, and after those it is given.
    """
    processors = LogitsProcessorList()
    if settings.temperature not in (None, 1.0):
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    processors.append(sampler)
    settings.update(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None)
    return processors
