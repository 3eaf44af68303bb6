"""The loss of a chunk of tokens in plain torch, in place: for CPU, and any device without Triton.

Logits lie with the vocabulary along the rows, (V, C), since matrix products of few tokens run faster into that
layout, and the vocabulary is worked through in tiles small enough to stay in the last-level cache from one
operation to the next, each of which is one pass. Where student and teacher share a head, one product of twice as
many tokens makes both models' logits. Each logit's exponential is taken once (twice for mixtures), as a power of two:
the pass that subtracts the maximum also multiplies by the factor that turns u into z, in bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sdft_kernels.backends.interface import ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunking import TILE_TOKENS, Held
from sdft_kernels.divergences import (
    MASKED,
    MIXTURES,
    NATS,
    PLAIN,
    LogitOptions,
    Objective,
    Shares,
    Sums,
    Tile,
    bounded,
    column_dot,
    finish,
    is_mixture,
    log_ratio_of,
)
from sdft_kernels.tokens import TokenRows, TokenScores, reads_are_free

#: Bytes of both models' logits in a tile; a call's scratch is twice that. Smaller tiles make slower products, larger
#: ones leave the cache: of 1, 2, 3 and 4 MiB, 3 was fastest on two cores with 32 MiB of last-level cache.
TILE_BYTES = 3 << 20

#: Whether the teacher's hidden state of a token of weight 0 may hold anything.
TEACHER_MAY_BE_ANYTHING = False

#: Matrix products are slower where the number of tokens is no multiple of this, so zeros fill up the last chunk.
TOKENS_ALIGNED = TILE_TOKENS["cpu"]


class LogitTiles:
    """An array of logits, (V, width), and two more arrays of one tile's size.

    Without `keep` the first array has one tile's size too, which is enough where the first pass is the only one.
    """

    def __init__(self, like: Tensor, width: int, vocab: int, dtype: torch.dtype, *, keep: bool) -> None:
        self.vocab, self.keep = vocab, keep
        self.tile = min(vocab, max(64, TILE_BYTES // (width * dtype.itemsize) // 16 * 16))
        self._kept = like.new_empty((vocab if keep else self.tile) * width, dtype=dtype)
        self._passing = [like.new_empty(self.tile * width, dtype=dtype) for _ in range(2)]

    def tiles(self, width: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """For each tile its part of the vocabulary, its rows of the first array, and both others, (v, width) each."""
        for start in range(0, self.vocab, self.tile):
            part = slice(start, min(start + self.tile, self.vocab))
            size = (part.stop - part.start) * width
            kept = self._kept[start * width if self.keep else 0 :]
            buffers = [buffer[:size].view(-1, width) for buffer in (kept, *self._passing)]
            yield part, buffers[0], buffers[1], buffers[2]


def held(dtypes: Dtypes, objective: Objective, *, with_gradient: bool) -> Held:
    """The bytes of the loss's workspace: both models' logits, in whose place the gradient's A and B are left."""
    return Held(2 * dtypes.wide.itemsize)


def loss_workspace(
    like: Tensor, tokens: int, vocab: int, dtypes: Dtypes, objective: Objective, *, with_gradient: bool
) -> LogitTiles:
    """A workspace for chunks of up to `tokens` tokens, with both models side by side."""
    keep = with_gradient or is_mixture(objective.divergence)
    return LogitTiles(like, 2 * aligned(tokens), vocab, dtypes.wide, keep=keep)


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: HeadOperands,
    teacher: HeadOperands,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: LogitTiles,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    dtype, tokens, width = rows.loss.dtype, len(rows.loss), aligned(len(rows.loss))
    columns = _Columns(student_hidden, teacher_hidden, student, teacher, dtype)
    labels = padded_labels(rows.labels, width, models=2)
    capped = objective.student.softcap is not None and gradients.any
    mixture = is_mixture(objective.divergence)
    unit = _bits(objective.student, dtype)
    teacher_unit = _bits(objective.teacher, dtype)
    seen: list[_TileSoftmax] = []
    sums: list[Sums] = []
    at_peaks: list[Tensor] = []
    for part, kept, passing, scratch in workspace.tiles(2 * width):
        # A mixture's second pass starts from logits.
        logits, exponentials = (kept, passing) if mixture else (passing, kept)
        columns.multiply(part, logits)
        student_logits, teacher_logits = logits.split(width, 1)
        _transform(student_logits, student.bias, part, objective.student)
        _transform(teacher_logits, teacher.bias, part, objective.teacher)
        if teacher_unit != unit:
            teacher_logits.mul_(teacher_unit / unit)
        seen.append(_softmax(logits, exponentials, scratch, unit, None if labels is None else labels - part.start))
        if mixture:
            at_peaks.append(_at_peak(student_logits, teacher_logits))
        else:
            slope = _slope(student_logits, seen[-1], unit, scratch) if capped else None
            sums.append(PLAIN[objective.divergence](_tile(logits, exponentials, seen[-1])))
            if slope is not None:
                _apply(slope, exponentials)
    softmax = _WholeSoftmax(seen, labels, workspace.tile, unit)
    shares = softmax.shares(at_peaks)
    if mixture:
        for number, (_, kept, passing, scratch) in enumerate(workspace.tiles(2 * width)):
            student_logits, teacher_logits = kept.split(width, 1)
            slope = _slope(student_logits, seen[number], unit, scratch) if capped else None
            tile = _tile(passing, kept, seen[number])
            log_ratio = log_ratio_of(student_logits, teacher_logits, shares.log_ratio[number].to(dtype), tile.teacher)
            kept.exp2_()
            assert shares.peak_ratio is not None
            sums.append(MIXTURES[objective.divergence](tile, log_ratio, shares.peak_ratio, objective.beta))
            if slope is not None:
                _apply(slope, kept)

    loss, x, y = finish(objective.divergence, objective.beta, _stack(sums), shares)
    store_rows(rows, objective, loss, softmax.entropy, softmax.logprob)
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, width - tokens))
        factor = factor * (objective.student.scale / objective.student.temperature)
        masked = _masked(student.bias, objective.student)
        x, y = (factor * x).to(dtype), (factor * y).to(dtype)
        _carry_back(columns.student, student, masked, x, y, gradients, workspace)


def store_rows(rows: TokenRows, objective: Objective, loss: Tensor, entropy: Tensor, logprob: Tensor | None) -> None:
    """A chunk's values into `rows`, from (width,), or (2 width,) for the student and then the teacher."""
    tokens, width = len(rows.loss), len(loss)
    rows.loss.copy_(loss[:tokens])
    rows.student_entropy.copy_(entropy[:tokens])
    rows.teacher_entropy.copy_(entropy[width:][:tokens])
    if logprob is not None and rows.student_logprob is not None and rows.teacher_logprob is not None:
        rows.student_logprob.copy_(logprob[:tokens])
        rows.teacher_logprob.copy_(logprob[width:][:tokens])
        if rows.old_logprobs is not None:
            rows.weight.mul_(importance_weight(rows.student_logprob, rows.old_logprobs, objective.importance_clip))


class _Columns:
    """The hidden states of a chunk, (width, H) for each model, which make the columns of its logits: first the
    student's, then the teacher's."""

    def __init__(
        self, student: Tensor, teacher: Tensor, head: HeadOperands, teacher_head: HeadOperands, dtype: torch.dtype
    ) -> None:
        width = aligned(len(student))
        self.student, self._teacher = padded(student, width, dtype), padded(teacher, width, dtype)
        self._weight, self._teacher_weight = head.weight, teacher_head.weight
        shared = head.weight is teacher_head.weight
        self._both = torch.cat((self.student, self._teacher)) if shared else None

    def multiply(self, part: slice, out: Tensor) -> None:
        """out ← both models' products of a tile of the vocabulary, (v, 2 width)."""
        if self._both is not None:
            _multiply(self._weight, self._both, part, out)
        else:
            student, teacher = out.chunk(2, 1)
            _multiply(self._weight, self.student, part, student)
            _multiply(self._teacher_weight, self._teacher, part, teacher)


def _multiply(weight: Tensor, hidden: Tensor, part: slice, out: Tensor) -> None:
    """out ← a tile of the head times hidden states; (v, H), (C, H) → (v, C)."""
    torch.mm(weight[part].to(hidden.dtype), hidden.T, out=out)


def _masked(bias: Tensor | None, options: LogitOptions) -> Tensor | None:
    """Which entries the bias masks, (V, 1); None if none, as far as the host may look."""
    if bias is None:
        return None
    masked = bias * math.copysign(1.0, options.scale) <= MASKED
    return None if reads_are_free(masked) and not masked.any() else masked.unsqueeze(1)


def _carry_back(
    hidden: Tensor,
    head: HeadOperands,
    masked: Tensor | None,
    x: Tensor,
    y: Tensor,
    gradients: ChunkGradients,
    workspace: LogitTiles,
) -> None:
    """Computes the logits' gradient a tile at a time, and multiplies it with head and hidden states.

    It is x A + y B, and 0 at masked entries.
    """
    width = len(hidden)
    before = 0 if gradients.first else 1
    total = hidden.new_zeros(hidden.T.shape)  # (H, C): products of few tokens run faster into that layout
    for number, (part, kept, passing, _) in enumerate(workspace.tiles(2 * width)):
        a, b = kept.split(width, 1)
        gradient = torch.mul(a, x[number], out=passing.view(2, -1, width)[0]).addcmul_(b, y[number])
        if masked is not None:
            gradient.masked_fill_(masked[part], 0)
        if gradients.hidden is not None:
            total.addmm_(head.weight[part].to(hidden.dtype).T, gradient)
        if gradients.weight is not None and gradients.weight.dtype == gradient.dtype:
            gradients.weight[part].addmm_(gradient, hidden, beta=before)
        elif gradients.weight is not None:  # there is only this chunk
            gradients.weight[part].copy_(gradient @ hidden)
        if gradients.bias is not None:
            gradients.bias[part] += gradient.sum(1)
    if gradients.hidden is not None:
        gradients.hidden.copy_(total[:, : len(gradients.hidden)].T)


@dataclass
class _TileSoftmax:
    """The softmax of one tile's logits, (v, C): maxima, Σ exp, Σ exp · bits and the labels' logits, (C,) each.

    The sums are of bits above the maximum, and of two to their power. Maxima and labels' logits are as they came.
    """

    peak: Tensor
    total: Tensor
    dot: Tensor
    label: Tensor | None


def _softmax(logits: Tensor, exponentials: Tensor, scratch: Tensor, unit: float, labels: Tensor | None) -> _TileSoftmax:
    """Turns logits into bits by `unit`, subtracts each token's maximum, and writes two to the power of the result.

    `labels` count from the tile's start. The label's logit means nothing for a label outside the tile.
    """
    peak = logits.amax(0)
    label = None if labels is None else logits.gather(0, labels.clamp(0, len(logits) - 1).unsqueeze(0)).squeeze(0)
    torch.add(-peak * unit, logits, alpha=unit, out=logits)
    torch.exp2(logits, out=exponentials)
    return _TileSoftmax(peak, exponentials.sum(0), column_dot(exponentials, logits, scratch), label)


class _WholeSoftmax:
    """The softmax of the whole vocabulary, computed in float64 from the softmax of each tile.

    A number for each token is (C,), a number for each tile and token (tiles, C).
    """

    def __init__(self, tiles: list[_TileSoftmax], labels: Tensor | None, tile: int, unit: float) -> None:
        peaks = torch.stack([t.peak for t in tiles])
        total, dot = (torch.stack([getattr(t, name) for t in tiles]).double() for name in ("total", "dot"))
        peak, dot = NATS * (peaks * unit).double(), NATS * dot  # rounded as in the tiles
        largest = peak.amax(0)
        below = peak - largest
        whole = (below.exp() * total).sum(0)
        log_sum = whole.log()
        self.share = below.exp() / whole
        self.mass = self.share * total
        self.log_share = below - log_sum
        self.entropy = log_sum - (self.share * (dot + below * total)).sum(0)
        self.logsumexp = largest + log_sum
        self.top1: Tensor | None = None
        self.logprob: Tensor | None = None
        if labels is not None:
            label = torch.stack([t.label for t in tiles if t.label is not None])
            label = label.gather(0, (labels // tile).unsqueeze(0)).squeeze(0)
            self.top1 = label >= peaks.amax(0)
            self.logprob = NATS * unit * label.double() - self.logsumexp

    def shares(self, at_peaks: list[Tensor]) -> Shares:
        """The shares of both models: the first half of the columns is the student's, the second the teacher's.

        A mixture also needs what `_at_peak` returned for each tile.
        """
        (p, q), (p_mass, q_mass), (log_p, log_q) = (
            values.chunk(2, 1) for values in (self.share, self.mass, self.log_share)
        )
        shares = Shares(p, q, p_mass, q_mass, log_p - log_q)
        if at_peaks:
            of_tiles = bounded(NATS * torch.stack(at_peaks).double() + shares.log_ratio)
            shares.peak_ratio = of_tiles.gather(0, log_p.argmax(0, keepdim=True)).squeeze(0)
        return shares


def _at_peak(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logit minus the teacher's, (C,), at the entry of a tile where the student's is largest."""
    peak = student.amax(0)
    return peak - torch.where(student == peak, teacher, -torch.inf).amax(0)


def _stack(sums: list[Sums]) -> Sums:
    """The sums of all tiles stacked, (tiles, C) in float64."""

    def of(name: str) -> Tensor | None:
        values = [getattr(tile, name) for tile in sums]
        return None if values[0] is None else torch.stack(values).double()

    return Sums(**{field.name: of(field.name) for field in fields(Sums)})


def _tile(logits: Tensor, exponentials: Tensor, seen: _TileSoftmax) -> Tile:
    (student, teacher), (p, q) = logits.chunk(2, 1), exponentials.chunk(2, 1)
    return Tile(student, teacher, p, q, seen.total[: p.shape[1]])


def scale(values: Tensor, factor: Tensor) -> None:
    """values ← values · factor in place. The values may have any shape; the factor has shape (1,)."""
    values.mul_(factor)


def scoring_held(dtypes: Dtypes) -> Held:
    """The bytes of scoring's workspace."""
    return Held(dtypes.wide.itemsize)


def scoring_workspace(like: Tensor, tokens: int, vocab: int, dtypes: Dtypes) -> LogitTiles:
    """A workspace for chunks of up to `tokens` tokens."""
    return LogitTiles(like, aligned(tokens), vocab, dtypes.wide, keep=False)


def score_chunk(
    hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions, workspace: LogitTiles
) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    width = aligned(len(hidden))
    hidden = padded(hidden, width, scores.entropy.dtype)
    labels = padded_labels(scores.labels, width, models=1)
    seen: list[_TileSoftmax] = []
    unit = _bits(options, hidden.dtype)
    for part, exponentials, logits, scratch in workspace.tiles(width):
        _multiply(head.weight, hidden, part, logits)
        _transform(logits, head.bias, part, options)
        seen.append(_softmax(logits, exponentials, scratch, unit, None if labels is None else labels - part.start))
    softmax = _WholeSoftmax(seen, labels, workspace.tile, unit)
    store_scores(scores, softmax.entropy, softmax.logsumexp, softmax.logprob, softmax.top1)


def store_scores(
    scores: TokenScores, entropy: Tensor, logsumexp: Tensor, logprob: Tensor | None, top1: Tensor | None
) -> None:
    """A chunk's values, (width,), into `scores`."""
    tokens = len(scores.entropy)
    scores.entropy.copy_(entropy[:tokens])
    scores.logsumexp.copy_(logsumexp[:tokens])
    if logprob is not None and top1 is not None:
        assert scores.logprob is not None and scores.top1 is not None
        scores.logprob.copy_(logprob[:tokens])
        scores.top1.copy_(top1[:tokens])


def importance_weight(logprob: Tensor, old_logprob: Tensor, clip: float | None) -> Tensor:
    """min(exp(logprob - old_logprob), clip): how much likelier the sampled token is now than when sampled."""
    ratio = torch.exp(logprob - old_logprob)
    return ratio if clip is None else ratio.clamp_(max=clip)


def _bits(options: LogitOptions, dtype: torch.dtype) -> float:
    """The factor that turns u into z in bits, rounded to `dtype`."""
    return torch.tensor(options.factor / NATS, dtype=dtype, device="cpu").item()


def _transform(logits: Tensor, bias: Tensor | None, part: slice, options: LogitOptions) -> None:
    """Turns a tile of products into u, in place."""
    if bias is not None:
        logits.add_(bias[part].unsqueeze(1))
    if options.inner != 1:
        logits.mul_(options.inner)
    if options.softcap is not None:
        logits.tanh_()


def _slope(student: Tensor, seen: _TileSoftmax, unit: float, scratch: Tensor) -> Tensor:
    """The soft cap's derivative, 1 - tanh², from z in bits less its maximum."""
    width = student.shape[1]
    z = torch.add(student, seen.peak[:width] * unit, out=scratch[:, :width])
    return z.div_(unit).square_().neg_().add_(1)


def _apply(slope: Tensor, logits: Tensor) -> None:
    """Multiplies the gradient's A and B by the soft cap's slope."""
    for half in logits.split(slope.shape[1], 1):
        half.mul_(slope)


def aligned(tokens: int) -> int:
    """How many columns a chunk of `tokens` tokens has: a whole number of vectors.

    A chunk smaller than one vector gets no more columns than tokens, because its memory budget allows no more.
    """
    return tokens if tokens < TOKENS_ALIGNED else -(-tokens // TOKENS_ALIGNED) * TOKENS_ALIGNED


def padded_labels(labels: Tensor | None, width: int, *, models: int) -> Tensor | None:
    """A label for each column of the logits of `models` models; columns that only fill up the chunk have label 0."""
    return None if labels is None else torch.nn.functional.pad(labels, (0, width - len(labels))).repeat(models)


def padded(hidden: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Hidden states (C, H) with rows of zeros added up to (width, H), in `dtype`."""
    return torch.nn.functional.pad(hidden.to(dtype), (0, 0, 0, width - len(hidden)))
