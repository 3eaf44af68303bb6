"""Engines: rollout back-ends with weights of their own, which are given the student's before they write rollouts.

Weights that do not reach a layer raise no error by themselves. So at the first push, and after some others, the
log-probabilities of a short completion are compared with the model's own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft import _compat
from sdft.errors import TrainingError
from sdft.forward import evaluating
from sdft.models.adapters import is_adapted, is_tied, merged_weights
from sdft.rollouts.interface import Backend, Completion, Request, Sampling

PROBE_TOKENS = 32  # of the completion that engine and model are compared by
CHECK_EVERY = 50  # pushes; and after those whose number is a power of two, for what is wrong shows early


class Engine(ABC):
    """vLLM with weights of its own: of the type `dtype`, on `device`, for requests of at most `longest` tokens.

    `probe` is the prompt of the comparison.
    """

    def __init__(self, *, longest: int, dtype: torch.dtype, device: torch.device, probe: Sequence[int]) -> None:
        self.longest, self.dtype, self.device, self.probe, self.pushes = longest, dtype, device, probe, 0
        self.probe_sampling = Sampling(min(PROBE_TOKENS, longest - len(probe)), temperature=1.0, logprobs=True)

    @contextlib.contextmanager
    def serving(self, model: PreTrainedModel) -> Iterator[Backend]:
        """The engine with the weights that the model has now, as a back-end."""
        self.push(model)
        if self.pushes % CHECK_EVERY == 0 or self.pushes & (self.pushes - 1) == 0:  # or 1, 2, 4, 8 and so on
            self.check(model)
        yield self.answer

    def push(self, model: PreTrainedModel) -> None:
        """Give the engine all of the model's weights, and have it forget what it computed from the last ones."""
        self.pushes += 1
        self.load(model)

    @abstractmethod
    def load(self, model: PreTrainedModel) -> None:
        """What `push` does, once."""

    @abstractmethod
    def answer(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Completion]:
        """A completion for each request, by the engine's weights: those of `model` when they were last pushed."""

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """TrainingError if the engine draws tokens with other probabilities than the model's, beyond rounding."""
        request = Request(self.probe, seed=self.pushes)
        (written,) = self.answer(model, [request], self.probe_sampling)
        input_ids = torch.tensor([[*self.probe, *written.tokens]], device=model.device)
        with evaluating(model):
            logits = model(input_ids=input_ids, use_cache=False).logits[0, len(self.probe) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(-1, input_ids[0, len(self.probe) :, None])[:, 0]
        gap = (own.cpu() - torch.tensor(written.logprobs)).abs().mean().item()
        if not gap <= (limit := largest_gap(self.dtype, self.device)):
            raise TrainingError(
                f"vLLM draws tokens with other log-probabilities than {type(model).__name__} has: they differ by "
                f"{gap:.2g} nats in the mean of {len(own)} tokens after push {self.pushes} of its weights, where "
                f"{limit:g} is rounding in {self.dtype}; rollout_backend may be generate"
            )


def translated(request: Request, sampling: Sampling) -> dict[str, Any]:
    """How to answer the request, in the words of vLLM's SamplingParams, which its server has too.

    Without a seed it is drawn by one of torch's own random numbers.
    """
    seed = request.seed
    if seed is None and sampling.temperature is not None:
        seed = int(torch.randint(2**62, ()))
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature or 0.0,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": seed,
        "stop_token_ids": sorted(sampling.eos_ids),
        "ignore_eos": True,  # of vLLM's own knowledge
        "logprobs": 0 if sampling.logprobs else None,  # 0: those of the tokens drawn, and no others
    }


def largest_gap(dtype: torch.dtype, device: torch.device) -> float:
    """By how many nats a token's log-probability in the engine may differ from the model's own, in the mean.

    Two ways to compute SmolLM2 in bfloat16 were 0.05 apart. On a GPU products in float32 may be of TF32, whose numbers
    have an eighth of bfloat16's error.
    """
    if dtype != torch.float32:
        return 0.25
    return 0.03 if device.type == "cuda" else 1e-3


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by the names that they have in its files, without an adapter's layers around them."""
    tied = set() if is_untied_by_adapter(model) else set(model.all_tied_weights_keys)
    for weights in merged_weights(model):
        yield from _compat.names_in_files(model, {n: w for n, w in weights.items() if n not in tied}).items()


def is_untied_by_adapter(model: PreTrainedModel) -> bool:
    """Whether embeddings and head, which are tied, may come to differ by an adapter in one of them."""
    return is_tied(model) and (is_adapted(model.get_input_embeddings()) or is_adapted(model.get_output_embeddings()))
