"""Rollouts in fewer passes, where a text is known that they may resemble: the same tokens as without it.

Each row's next token is where its scores and the row's own noise peak (`sdft.rollouts.row_sampler`), so it depends on
the tokens before it alone. A pass reads a row's last token and a few tokens of its draft after it, which gives the
scores for all of them at once. Tokens are then drawn one after the other, for as long as what was drawn is what the
draft had; from the first that is not, the scores were of another text, and are left.

Rows follow their drafts over different lengths. Keys and values of what was read in vain stay in the cache, masked, and
each token is told its position; now and then they are taken out, with the rows that have ended.

How many tokens of drafts a pass reads is for its time to say: what passes of some length have taken so far, and how
often the drafts were right, also where none was read.
"""

from __future__ import annotations

import functools
import itertools
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from sdft._compat import with_cache
from sdft.forward import evaluating
from sdft.rollouts.choice import drawn, padded, sampling_from, token_choice
from sdft.rollouts.interface import Completion, Request, Sampling
from sdft.rollouts.kv_cache import RoomyLayer, roomy_cache
from sdft.rollouts.row_sampler import RowSampler
from sdft.rollouts.stop_strings import just_stopped

#: The most tokens of a row in a pass.
LONGEST = 32
#: Rows that have ended, and places that were read in vain, are taken out once they are this share of all.
IDLE = 0.25


def by_drafts(
    model: PreTrainedModel,
    requests: Sequence[Request],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Completion]:
    """Completions in one batch, with the help of the requests' drafts: greedy ones, or with a seed for each request.

    `check_drafts` says which models can.
    """
    _, processors, sampler = token_choice(sampling, requests, model.device)
    batch = _Batch(model, requests, sampling, tokenizer)
    with sampling_from(model, sampler), torch.no_grad():
        logits = batch.read_prompts()
        while True:
            batch.draw(logits, processors, sampler)
            if not batch.open or (sampling.watch is not None and sampling.watch(batch.count)):
                break
            logits = batch.read()
    completions = drawn([row.tokens for row in batch.rows], sampler)
    return [
        replace(
            completion, drafted=row.drafted, accepted=row.accepted, passes=row.passes, foreseen=min(row.foreseen, count)
        )
        for completion, row in zip(completions, batch.rows, strict=True)
        for count in [len(completion.tokens)]
    ]


@dataclass
class _Row:
    """A completion on its way, and where it stands in its draft."""

    number: int
    prompt: int  # its tokens
    draft: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    foreseen: int = 0
    right: float = 0.5  # how often the draft has had the next token of late
    place: int = 0  # in the draft, of the token that is expected next
    lost: bool = False  # whether the last token was another, so that the place is a guess

    def __post_init__(self) -> None:
        self._places: dict[tuple[int, int], list[int]] = {}  # in the draft, after each two tokens
        for place, pair in enumerate(itertools.pairwise(self.draft), start=2):
            self._places.setdefault(pair, []).append(place)

    def proposal(self, most: int) -> Sequence[int]:
        """What the draft has next, at most so many tokens; nothing while the place is a guess."""
        return () if self.lost else self.draft[self.place : self.place + most]

    def follow(self, token: int) -> None:
        """Take the token that was drawn, and find it in the draft."""
        self.tokens.append(token)
        expected = self.place < len(self.draft) and self.draft[self.place] == token
        self.right += (expected - self.right) / 8
        self.foreseen += expected
        self.place += 1
        if expected:
            self.lost = False
        elif found := self._places.get(cast(tuple[int, int], tuple(self.tokens[-2:]))):
            self.place, self.lost = next((place for place in found if place >= self.place), found[0]), False
        else:
            self.lost = True  # the token may stand for the draft's: if the next is right, it did


class _Pace:
    """What a pass takes: seconds = fixed + each * tokens, fitted to the passes so far, the last ones most."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, tokens, seconds, tokens², tokens * seconds

    def __bool__(self) -> bool:
        """Whether passes of unlike lengths were seen."""
        count, x, _, xx, _ = self._sums
        return count > 0 and xx / count - (x / count) ** 2 > 1e-6

    def add(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [0.95 * old + value for old, value in zip(self._sums, new, strict=True)]

    def seconds(self, tokens: int) -> float:
        """How long a pass over so many tokens may take; each counts for something, whatever was measured."""
        count, x, y, xx, xy = self._sums
        each = y / x  # for all that is known
        if self:
            each = max((xy / count - x * y / count**2) / (xx / count - (x / count) ** 2), 1e-9)
        fixed = max((y - each * x) / count, 0.0)
        return fixed + each * tokens


#: What passes of a model took in the batches before.
_PACES: weakref.WeakKeyDictionary[PreTrainedModel, _Pace] = weakref.WeakKeyDictionary()


class _Batch:
    """The rows that are written together, their cache, and which of its places hold tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.model, self.requests, self.sampling, self.tokenizer = model, requests, sampling, tokenizer
        self.rows = [
            _Row(n, len(request.prompt), request.draft, right=request.draft_right) for n, request in enumerate(requests)
        ]
        self.inside = list(self.rows)  # those in the cache, in its order
        self.fed: list[Sequence[int]] = [()] * len(self.rows)  # the draft's tokens that each of them has read
        self.cache = cast(Any, roomy_cache(model))
        self.pace = _PACES.setdefault(model, _Pace())
        self.started, self.tokens_read = 0.0, 0

    @property
    def open(self) -> bool:
        """Whether there is a completion that has not come to its end."""
        return not all(row.ended for row in self.inside)

    def count(self) -> tuple[int, int]:
        """The tokens written, and the completions that have ended."""
        return sum(len(row.tokens) for row in self.rows), sum(row.ended for row in self.rows)

    def read_prompts(self) -> Tensor:
        """(rows, 1 + tokens, V): the logits of the first tokens, and those after the drafts' tokens that were read."""
        ids, self.mask = padded([request.prompt for request in self.requests], 0)
        ahead = self._ahead_of_prompts(ids.numel()) if self.pace else 0
        self.fed = [row.proposal(min(ahead, self._useful(row))) for row in self.inside]
        length = max(map(len, self.fed))
        places = self.mask.new_zeros(len(self.inside), length)
        ids, self.mask = torch.cat((ids, places), dim=1), torch.cat((self.mask, places), dim=1)
        for number, (row, fed) in enumerate(zip(self.inside, self.fed, strict=True)):
            start = ids.shape[1] - length
            ids[number, start : start + len(fed)] = torch.tensor(fed)
            self.mask[number, start : start + len(fed)] = 1
            row.drafted += len(fed)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        return self._forward(ids, positions, logits_to_keep=1 + length)

    def read(self) -> Tensor:
        """(rows, tokens, V): the logits after each row's last token, and after those of its draft that were read."""
        self._take_out()
        length = self._length()
        self.fed = [() if row.ended else row.proposal(min(length - 1, self._useful(row))) for row in self.inside]
        ids = torch.zeros(len(self.inside), length, dtype=torch.long)
        mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for number, (row, fed) in enumerate(zip(self.inside, self.fed, strict=True)):
            if not row.ended:
                read = [row.tokens[-1], *fed]
                ids[number, : len(read)], mask[number, : len(read)] = torch.tensor(read), 1
                positions[number, : len(read)] = row.prompt + len(row.tokens) - 1 + torch.arange(len(read))
                row.drafted += len(fed)
        self.mask = torch.cat((self.mask, mask), dim=1)
        return self._forward(ids, positions)

    def draw(self, logits: Tensor, processors: LogitsProcessorList, sampler: RowSampler | None) -> None:
        """Each row's next tokens, up to the first that its draft had not."""
        length = logits.shape[1]
        going = [place for place, row in enumerate(self.inside) if not row.ended]
        kept = [0] * len(self.inside)  # tokens that were read and are of the completion
        for step in range(length):
            scores = logits[going, step].to(torch.float32, copy=True)
            for processor in processors:
                if processor is not sampler:
                    scores = processor(None, scores)
            if sampler is not None:
                scores = sampler.draw(scores, [self.inside[place].number for place in going])
            tokens = scores.argmax(-1).tolist()
            if not step:
                self.pace.add(self.tokens_read, time.perf_counter() - self.started)
            going = [place for place, token in zip(going, tokens, strict=True) if self._take(place, token, step, kept)]
            if not going:
                break
        for number, count in enumerate(kept):  # what else was read in this pass is not of the completion
            self.mask[number, self.mask.shape[1] - length + count :] = 0

    def _take(self, place: int, token: int, step: int, kept: list[int]) -> bool:
        """Give a row its next token. True where the draft had it too, so that the scores after it are there."""
        row, fed = self.inside[place], self.fed[place]
        row.follow(token)
        row.passes += not step
        kept[place] = step + 1
        row.ended = (
            token in self.sampling.eos_ids
            or len(row.tokens) == self.sampling.max_new_tokens
            or (
                self.tokenizer is not None
                and bool(self.sampling.stop)
                and just_stopped(row.tokens, self.sampling.stop, self.tokenizer)
            )
        )
        right = step < len(fed) and fed[step] == token
        row.accepted += right
        return right and not row.ended

    def _useful(self, row: _Row) -> int:
        """How many tokens of its draft a row may read: after the last of them there is one more to draw."""
        return min(LONGEST, self.sampling.max_new_tokens - len(row.tokens)) - 1

    def _length(self) -> int:
        """The tokens of a row in the next pass: those with which most tokens are written in a second."""
        return max(range(1, 2 + self._most()), key=self._rate)

    def _ahead_of_prompts(self, tokens: int) -> int:
        """How much of each draft is read with the prompts: what takes least, if a token that is not written here takes
        as long as in the passes that follow."""
        later = 1 / self._rate(self._length())

        def gain(length: int) -> float:
            return self._written(length) * later - self.pace.seconds(tokens + len(self.inside) * (length - 1))

        return max(range(1, 2 + self._most()), key=gain) - 1

    def _rate(self, length: int) -> float:
        """Tokens that are written in a second of passes with so many tokens of each row."""
        return self._written(length) / self.pace.seconds(len(self.inside) * length)

    def _written(self, length: int) -> float:
        """Tokens that a pass writes which reads all but one of so many tokens of each row from its draft."""
        going = [row for row in self.inside if not row.ended]
        return sum(_expected(row.right, min(length - 1, len(row.proposal(self._useful(row))))) for row in going)

    def _most(self) -> int:
        """The tokens of a draft that the next pass could read."""
        return max(len(row.proposal(self._useful(row))) for row in self.inside if not row.ended)

    def _take_out(self) -> None:
        """Leave out of the cache the rows that have ended, and places without a token, once they are many."""
        going = [number for number, row in enumerate(self.inside) if not row.ended]
        mask = self.mask[going]
        tokens = int(mask.sum(-1).max())
        if len(going) * tokens > (1 - IDLE) * self.mask.numel():
            return
        # Places with a token come last, in their order; before them are what pads the shorter rows.
        places = mask.argsort(dim=-1, stable=True)[:, -tokens:]
        self.mask = mask.gather(-1, places)
        self.inside = [self.inside[number] for number in going]
        device = self.model.device
        for layer in self.cache.layers:
            layer.keep(torch.tensor(going, device=device), places.to(device))

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        self.started, self.tokens_read = time.perf_counter(), ids.numel()
        return _logits(self.model, self.cache, ids, self.mask, positions, **options)


def _expected(right: float, drafted: int) -> float:
    """The tokens that a pass writes where each of so many drafted ones is right that often, given those before it."""
    return drafted + 1 if right >= 1 else (1 - right ** (drafted + 1)) / (1 - right)


def _logits(
    model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any
) -> Tensor:
    device = model.device
    return cast(Any, model)(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=True,
        **with_cache(model, cache),
        **options,
    ).logits


@torch.no_grad()
def check_drafts(model: PreTrainedModel) -> str | None:
    """Why the model cannot read drafts: a place in its cache must be able to be masked, and none depend on it."""
    cache = roomy_cache(model)
    if cache is None or not all(isinstance(layer, RoomyLayer) for layer in cache.layers):
        return "it keeps something else than keys and values of all tokens"
    ids = torch.arange(2, 10)[None] % model.config.get_text_config().vocab_size
    count = ids.shape[1]
    with evaluating(model):
        expected = cast(Any, model)(input_ids=ids.to(model.device), use_cache=False).logits[0, -1].float()
        # The whole text, then a token that is masked, then the last token anew at its own position.
        others = torch.cat((ids[:, :-1], torch.ones_like(ids[:, :1])), dim=1)
        read = functools.partial(_logits, model, cache)
        read(others, torch.ones_like(ids), torch.arange(count)[None])
        mask = torch.ones(1, count + 1, dtype=torch.long)
        mask[0, count - 1] = 0
        try:
            measured = read(ids[:, -1:], mask, torch.tensor([[count - 1]]))[0, -1].float()
        except TypeError:
            return "it takes no positions of tokens"
    limit = max(1e-4, 16 * torch.finfo(model.dtype).eps) * float(expected.abs().max())
    if not float((measured - expected).abs().max()) <= limit:
        return "a token that is masked changes what comes after it"
    return None
