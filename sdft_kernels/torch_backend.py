"""The loss of a chunk of tokens in plain torch, in place: for CPU, and any device without Triton.

Logits lie with the vocabulary along the rows, (V, C), since matrix products of few tokens run faster into that
layout, and the vocabulary is worked through in tiles small enough to stay in the last-level cache from one
operation to the next, each of which is one pass. Where student and teacher share a head, one product of twice as
many tokens makes both models' logits. Each logit's exponential is taken once (twice for mixtures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sdft_kernels.divergences import (
    MIXTURES,
    PLAIN,
    LogitOptions,
    Objective,
    Shares,
    Sums,
    Tile,
    column_dot,
    finish,
    is_mixture,
    log_ratio_in,
)
from sdft_kernels.tokens import TokenRows, TokenScores

#: Bytes of both models' logits in a tile; a call's scratch is three times that.
TILE_BYTES = 2 << 20

#: Matrix products are slower where the number of tokens is no multiple of this, so zeros fill up the last chunk.
TOKENS_ALIGNED = 16


@dataclass(frozen=True)
class Head:
    """A model's head (V, H), in any dtype, and its bias (V,) or None, in the accumulation dtype."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class ChunkGradients:
    """Where a chunk's gradients go: (C, H) to be written; (V, H) and (V,) to be added to, or written if `first`."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    first: bool

    @property
    def any(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None


class Workspace:
    """Buffers for chunks of up to `tokens` tokens: both models' logits side by side, and two arrays for a tile.

    Without `keep` there is only one tile's worth of logits: enough where nothing comes after the first pass.
    """

    def __init__(self, like: Tensor, tokens: int, vocab: int, dtype: torch.dtype, *, keep: bool) -> None:
        self.vocab, self.keep = vocab, keep
        width = 2 * _aligned(tokens)
        self.tile = min(vocab, max(64, TILE_BYTES // (width * dtype.itemsize) // 16 * 16))
        self._logits = like.new_empty((vocab if keep else self.tile) * width, dtype=dtype)
        self._exponentials, self._scratch = (like.new_empty(self.tile * width, dtype=dtype) for _ in range(2))

    def tiles(self, width: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Each tile's part of the vocabulary, logits, exponentials and scratch, (v, width)."""
        for start in range(0, self.vocab, self.tile):
            part = slice(start, min(start + self.tile, self.vocab))
            size = (part.stop - part.start) * width
            logits = self._logits[start * width if self.keep else 0 :][:size]
            yield part, *(buffer[:size].view(-1, width) for buffer in (logits, self._exponentials, self._scratch))  # type: ignore[misc]


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Head,
    teacher: Head,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: Workspace,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    dtype, tokens, width = rows.loss.dtype, len(rows.loss), _aligned(len(rows.loss))
    hidden = _padded(student_hidden, width, dtype)
    sides = [(student, hidden, objective.student), (teacher, _padded(teacher_hidden, width, dtype), objective.teacher)]
    labels = None if rows.labels is None else torch.nn.functional.pad(rows.labels, (0, width - tokens)).repeat(2)
    capped = objective.student.softcap is not None and gradients.any
    seen: list[_Softmax] = []
    sums: list[Sums] = []
    for part, logits, exponentials, scratch in workspace.tiles(2 * width):
        _multiply(sides, part, logits)
        _transform(logits[:, :width], objective.student)
        _transform(logits[:, width:], objective.teacher)
        seen.append(_softmax(logits, exponentials, scratch, None if labels is None else labels - part.start))
        if objective.divergence in PLAIN:
            slope = _slope(logits[:, :width], seen[-1].peak, objective.student) if capped else None
            sums.append(PLAIN[objective.divergence](_tile(logits, exponentials, width)))
            if slope is not None:
                _apply(slope, logits)
    softmax = _Whole(seen, width, labels, workspace.tile)
    shares = softmax.shares()
    if is_mixture(objective.divergence):
        for number, (_, logits, exponentials, _) in enumerate(workspace.tiles(2 * width)):
            torch.exp(logits, out=exponentials)
            slope = _slope(logits[:, :width], seen[number].peak, objective.student) if capped else None
            tile = _tile(logits, exponentials, width)
            log_ratio = log_ratio_in(tile, shares.log_ratio[number].to(dtype))
            sums.append(MIXTURES[objective.divergence](tile, log_ratio, objective.beta))
            if slope is not None:
                _apply(slope, logits)

    loss, x, y = finish(objective.divergence, objective.beta, _stack(sums), shares)
    rows.loss.copy_(loss[:tokens])
    rows.student_entropy.copy_(softmax.entropy[:tokens])
    rows.teacher_entropy.copy_(softmax.entropy[width:][:tokens])
    if softmax.logprob is not None and rows.student_logprob is not None and rows.teacher_logprob is not None:
        rows.student_logprob.copy_(softmax.logprob[:tokens])
        rows.teacher_logprob.copy_(softmax.logprob[width:][:tokens])
        if rows.old_logprobs is not None:
            rows.weight.mul_(importance_weight(rows.student_logprob, rows.old_logprobs, objective.importance_clip))
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, width - tokens))
        factor = factor * (objective.student.scale / objective.student.temperature)
        _carry_back(hidden, student, (factor * x).to(dtype), (factor * y).to(dtype), gradients, workspace)


def _multiply(sides: list[tuple[Head, Tensor, LogitOptions]], part: slice, logits: Tensor) -> None:
    """Products of a tile of each head with its hidden states, side by side; one product where the head is shared."""
    (student, hidden, _), (teacher, teacher_hidden, _) = sides
    width, dtype = len(hidden), hidden.dtype
    if _same(student.weight, teacher.weight):
        torch.mm(student.weight[part].to(dtype), torch.cat((hidden, teacher_hidden)).T, out=logits)
    else:
        torch.mm(student.weight[part].to(dtype), hidden.T, out=logits[:, :width])
        torch.mm(teacher.weight[part].to(dtype), teacher_hidden.T, out=logits[:, width:])
    for head, half in ((student, logits[:, :width]), (teacher, logits[:, width:])):
        if head.bias is not None:
            half.add_(head.bias[part].unsqueeze(1))


def _carry_back(
    hidden: Tensor, head: Head, x: Tensor, y: Tensor, gradients: ChunkGradients, workspace: Workspace
) -> None:
    """The logits' gradient x A + y B a tile at a time, and its products with the head and the hidden states."""
    width = len(hidden)
    kept = 0 if gradients.first else 1
    total = hidden.new_zeros(hidden.T.shape)  # (H, C): products of few tokens run faster into that layout
    for number, (part, logits, _, _) in enumerate(workspace.tiles(2 * width)):
        gradient = logits[:, :width].mul_(x[number]).addcmul_(logits[:, width:], y[number])
        if gradients.hidden is not None:
            total.addmm_(head.weight[part].to(hidden.dtype).T, gradient)
        if gradients.weight is not None:
            gradients.weight[part].addmm_(gradient, hidden, beta=kept)
        if gradients.bias is not None:
            gradients.bias[part].mul_(kept).add_(gradient.sum(1))
    if gradients.hidden is not None:
        gradients.hidden.copy_(total[:, : len(gradients.hidden)].T)


@dataclass
class _Softmax:
    """Of one tile's (v, C) logits: maxima, Σ exp, Σ exp · logit and the labels' logits, (C,), less the maximum."""

    peak: Tensor
    total: Tensor
    dot: Tensor
    label: Tensor | None


def _softmax(logits: Tensor, exponentials: Tensor, scratch: Tensor, labels: Tensor | None) -> _Softmax:
    """Takes each token's maximum off the logits and leaves their exponentials. `labels` count from the tile's start;
    what is said of one outside is of no use."""
    peak = logits.amax(0)
    torch.exp(logits.sub_(peak), out=exponentials)
    label = None if labels is None else logits.gather(0, labels.clamp(0, len(logits) - 1).unsqueeze(0)).squeeze(0)
    return _Softmax(peak, exponentials.sum(0), column_dot(exponentials, logits, scratch), label)


class _Whole:
    """The softmax of the whole vocabulary from its tiles', in float64; both models' tokens side by side."""

    def __init__(self, tiles: list[_Softmax], width: int, labels: Tensor | None, tile: int) -> None:
        self.width = width
        peak, self.total, dot = (torch.stack([getattr(t, n) for t in tiles]).double() for n in ("peak", "total", "dot"))
        largest = peak.amax(0)
        self.below = peak - largest
        self.scale = self.below.exp()
        whole = (self.scale * self.total).sum(0)
        self.log_sum = whole.log()
        self.scale /= whole
        self.entropy = self.log_sum - (self.scale * (dot + self.below * self.total)).sum(0)
        self.logsumexp = largest + self.log_sum
        self.logprob: Tensor | None = None
        self.is_largest: Tensor | None = None
        if labels is not None:
            picked = torch.stack([t.label for t in tiles if t.label is not None]).double() + self.below
            picked = picked.gather(0, (labels // tile).unsqueeze(0)).squeeze(0)
            self.logprob, self.is_largest = picked - self.log_sum, picked >= 0

    def shares(self) -> Shares:
        """Of the student's tokens, in the first half, and the teacher's."""
        p, q = self.scale.split(self.width, 1)
        p_total, q_total = self.total.split(self.width, 1)
        constant = self.below - self.log_sum
        log_p, log_q = constant.split(self.width, 1)
        return Shares(p, q, p * p_total, q * q_total, log_p - log_q)


def _stack(sums: list[Sums]) -> Sums:
    """All tiles' sums as one, (tiles, C) in float64."""

    def of(name: str) -> Tensor | None:
        values = [getattr(tile, name) for tile in sums]
        return None if values[0] is None else torch.stack(values).double()

    return Sums(**{field.name: of(field.name) for field in fields(Sums)})


def _tile(logits: Tensor, exponentials: Tensor, width: int) -> Tile:
    return Tile(*logits.split(width, 1), *exponentials.split(width, 1))


def score_rows(logits: Tensor, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` from (R, V) products of hidden states and a head, which are overwritten."""
    tokens, vocab = logits.shape
    size = max(1, min(tokens, TILE_BYTES // (logits.element_size() * vocab)))
    buffers = [logits.new_empty((size, vocab)) for _ in range(2)]
    for start in range(0, tokens, size):
        tile, rows = logits[start : start + size].T, scores[start : start + size]
        _transform(tile, options)
        found = _softmax(tile, *(buffer[: tile.shape[1]].T for buffer in buffers), rows.labels)  # type: ignore[call-arg]
        whole = _Whole([found], 0, rows.labels, vocab)
        rows.entropy.copy_(whole.entropy)
        rows.logsumexp.copy_(whole.logsumexp)
        if whole.logprob is not None and rows.logprob is not None and rows.top1 is not None:
            rows.logprob.copy_(whole.logprob)
            rows.top1.copy_(whole.is_largest)  # type: ignore[arg-type]


def importance_weight(logprob: Tensor, old_logprob: Tensor, clip: float | None) -> Tensor:
    """min(exp(logprob - old_logprob), clip): how much likelier the sampled token is now than when sampled."""
    ratio = torch.exp(logprob - old_logprob)
    return ratio if clip is None else ratio.clamp_(max=clip)


def _transform(logits: Tensor, options: LogitOptions) -> None:
    """y → z in place."""
    if options.softcap is not None:
        logits.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap / options.temperature)
    elif options.scale != options.temperature:
        logits.mul_(options.scale / options.temperature)


def _slope(logits: Tensor, peak: Tensor, options: LogitOptions) -> Tensor:
    """The soft cap's derivative, 1 - tanh²(y / softcap), from z less its maximum."""
    assert options.softcap is not None
    tanh = (logits + peak[: logits.shape[1]]).mul_(options.temperature / options.softcap)
    return tanh.square_().neg_().add_(1)


def _apply(slope: Tensor, logits: Tensor) -> None:
    """The gradient's A and B by the soft cap's slope."""
    for half in logits.split(slope.shape[1], 1):
        half.mul_(slope)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _aligned(tokens: int) -> int:
    return -(-tokens // TOKENS_ALIGNED) * TOKENS_ALIGNED


def _padded(hidden: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(C, H) as (width, H), the rest zeros, in the accumulation dtype."""
    return torch.nn.functional.pad(hidden.to(dtype), (0, 0, 0, width - len(hidden)))
