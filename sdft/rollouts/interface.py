"""What passes between training and a rollout back-end: how to sample, what to answer, and what was written.

A back-end is a function `(model, requests, sampling, tokenizer) -> completions`, one completion for each request and in
their order. A completion may go on after its end in what a back-end returns: `cut` ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.progress.counts import Watch
from sdft.rollouts.stop_strings import stopped_length

#: Why a completion ended: an end-of-sequence token, a stop string, or `max_new_tokens`.
TOKEN, STRING, LENGTH = "token", "string", "length"


@dataclass(frozen=True)
class Sampling:
    """How a completion is written: up to and with an end-of-sequence token or stop string, or `max_new_tokens` long.

    Greedy where `temperature` is None. Otherwise from softmax(logits / temperature), of which `top_k` keeps so many
    of the likeliest tokens (0: all), `top_p` the smallest set with that much probability, and `min_p` those with at
    least that share of the likeliest one's probability. `stop` needs a tokenizer wherever the sampling is used.
    With `logprobs`, a back-end says with which probability it drew each token, if it can. It tells `watch` of every
    token, if it can.
    """

    max_new_tokens: int
    eos_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    watch: Watch | None = field(default=None, compare=False)

    @property
    def truncates(self) -> bool:
        """Whether some tokens that the model could write are never drawn."""
        return self.temperature is None or self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    With a seed its completion is drawn from random numbers of its own, whatever is sampled beside it. `draft` is a
    text that the completion may resemble, and `draft_right` the share of its tokens that are expected to be right. They
    change how fast the completion is written, and no token of it.
    """

    prompt: Sequence[int]
    seed: int | None = None
    draft: Sequence[int] = ()
    draft_right: float = 0.5


@dataclass(frozen=True)
class Completion:
    """What was written to a prompt, and why it ended.

    `logprobs` are the log-probabilities, in nats, with which its tokens were drawn: after temperature, top-k, top-p and
    min-p. They are None where nobody asked, and where the back-end does not know. With a draft, so many of its tokens
    were read in so many `passes` of the model, and so many of those were right; `foreseen` are the completion's tokens
    that the draft had, whether they were read ahead or not.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    end: str = LENGTH
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    foreseen: int = 0


Backend = Callable[
    [PreTrainedModel, Sequence[Request], Sampling, PreTrainedTokenizerBase | None],
    list[Completion],
]


def cut(completion: Completion, sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None = None) -> Completion:
    """The completion up to its end, with the reason: what follows is padding, or was written before it was noticed."""
    kept, end = list(completion.tokens[: sampling.max_new_tokens]), LENGTH
    for position, token in enumerate(kept):
        if token in sampling.eos_ids:
            kept, end = kept[: position + 1], TOKEN
            break
    if sampling.stop and tokenizer is not None:
        stopped = stopped_length(kept, sampling.stop, tokenizer)
        if stopped is not None:
            end = STRING if stopped < len(kept) or end == LENGTH else end
            kept = kept[:stopped]
    logprobs = None if completion.logprobs is None else completion.logprobs[: len(kept)]
    return replace(completion, tokens=kept, logprobs=logprobs, end=end)


def finished(tokens: Sequence[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Whether the completion came to an end of its own, or stands at one: else the most tokens it may have cut it."""
    return cut(Completion(list(tokens)), sampling, tokenizer).end != LENGTH
