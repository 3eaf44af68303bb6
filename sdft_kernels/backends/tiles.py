"""A slab of the vocabulary for a chunk of tokens in plain torch: its logits, its softmax, and its gradient's products.

Logits lie with the vocabulary along the rows, (v, C); torch.py says why, and what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_kernels.backends.interface import ChunkGradients, HeadOperands
from sdft_kernels.chunking import TILE_TOKENS
from sdft_kernels.divergences import MASKED, NATS, LogitOptions, Shares, bounded, column_dot
from sdft_kernels.tokens import reads_are_free

#: Bytes of both models' logits in a tile; a call's scratch is twice that. Smaller tiles make slower products, larger
#: ones leave the cache: of 1, 2, 3 and 4 MiB, 3 was fastest on two cores with 32 MiB of last-level cache.
TILE_BYTES = 3 << 20

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


@dataclass
class TileSoftmax:
    """The softmax of one tile's logits, (v, C): maxima, Σ exp, Σ exp · bits and the labels' logits, (C,) each.

    The sums are of bits above the maximum, and of two to their power. Maxima and labels' logits are as they came.
    """

    peak: Tensor
    total: Tensor
    dot: Tensor
    label: Tensor | None


def softmax_of(
    logits: Tensor,
    exponentials: Tensor,
    scratch: Tensor,
    unit: float,
    labels: Tensor | None,
    *,
    inexact_masks: bool = False,
) -> TileSoftmax:
    """Turns logits into bits by `unit`, subtracts each token's maximum, and writes two to the power of the result.

    Masked logits that something but a power of two has multiplied are rounded by more than there are exponents; in a
    tile of nothing else they would lie above their maximum. `labels` count from the tile's start. The label's logit
    means nothing for a label outside the tile.
    """
    peak = logits.amax(0)
    label = None if labels is None else at_labels(logits, labels)
    torch.add(-peak * unit, logits, alpha=unit, out=logits)
    if inexact_masks:
        logits.clamp_(max=0)
    torch.exp2(logits, out=exponentials)
    return TileSoftmax(peak, exponentials.sum(0), column_dot(exponentials, logits, scratch), label)


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """A tile's logits at labels that count from its start, (C,); of a label outside the tile it means nothing."""
    return logits.gather(0, labels.clamp(0, len(logits) - 1).unsqueeze(0)).squeeze(0)


def of_tiles(values: list[Tensor], labels: Tensor, tile: int) -> Tensor:
    """The value, (C,), of the tile that has each label."""
    return torch.stack(values).gather(0, (labels // tile).unsqueeze(0)).squeeze(0)


class WholeSoftmax:
    """The softmax of the whole vocabulary, computed in float64 from the softmax of each tile.

    A number for each token is (C,), a number for each tile and token (tiles, C).
    """

    def __init__(self, tiles: list[TileSoftmax], labels: Tensor | None, tile: int, unit: float) -> None:
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
        self.label_u: Tensor | None = None
        if labels is not None:
            label = of_tiles([t.label for t in tiles if t.label is not None], labels, tile)
            self.label_u = label
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


def multiply(weight: Tensor, hidden: Tensor, part: slice, out: Tensor) -> None:
    """out ← a tile of the head times hidden states; (v, H), (C, H) → (v, C)."""
    torch.mm(weight[part].to(hidden.dtype), hidden.T, out=out)


def bits(options: LogitOptions, dtype: torch.dtype) -> float:
    """The factor that turns u into z in bits, rounded to `dtype`."""
    return torch.tensor(options.factor / NATS, dtype=dtype, device="cpu").item()


def transform(logits: Tensor, bias: Tensor | None, part: slice, options: LogitOptions) -> None:
    """Turns a tile of products into u, in place."""
    if bias is not None:
        logits.add_(bias[part].unsqueeze(1))
    if options.inner != 1:
        logits.mul_(options.inner)
    if options.softcap is not None:
        logits.tanh_()


def slope_of(student: Tensor, seen: TileSoftmax, unit: float, scratch: Tensor) -> Tensor:
    """The soft cap's derivative, 1 - tanh², from z in bits less its maximum."""
    width = student.shape[1]
    z = torch.add(student, seen.peak[:width] * unit, out=scratch[:, :width])
    return z.div_(unit).square_().neg_().add_(1)


def apply_slope(slope: Tensor, logits: Tensor) -> None:
    """Multiplies the gradient's A and B by the soft cap's slope."""
    for half in logits.split(slope.shape[1], 1):
        half.mul_(slope)


def masked_entries(bias: Tensor | None, options: LogitOptions) -> Tensor | None:
    """Which entries the bias masks, (V, 1); None if none, as far as the host may look."""
    if bias is None:
        return None
    masked = bias * math.copysign(1.0, options.scale) <= MASKED
    return None if reads_are_free(masked) and not masked.any() else masked.unsqueeze(1)


@dataclass
class Target:
    """Labels of a chunk's columns, (each, width), as many for each column, and what the gradient of their logits lacks.

    A label outside the vocabulary is none.
    """

    labels: Tensor
    weight: Tensor

    @classmethod
    def of(cls, labels: Tensor, u: Tensor, options: LogitOptions, weight: Tensor) -> Target:
        """For a cross-entropy of this weight from the labels' u, (width,) or (each, width); a masked entry's is a
        constant."""
        labels, u, weight = (values.view(-1, values.shape[-1]) for values in (labels, u, weight))
        if options.softcap is not None:
            return cls(labels, weight * (1 - u.double().square()))
        return cls(labels, torch.where(u > MASKED, weight, 0))

    def subtract(self, part: slice, gradient: Tensor) -> None:
        """From the gradient of a tile of the vocabulary, (v, width)."""
        here = (self.labels >= part.start) & (self.labels < part.stop)
        rows = (self.labels - part.start).clamp_(0, len(gradient) - 1)
        gradient.scatter_add_(0, rows, torch.where(here, -self.weight, 0))


def take_out(logits: Tensor, labels: Tensor, found: Tensor) -> None:
    """Moves a tile's u at labels that count from its start, (each, width), into `found`, and masks them in the tile."""
    here = (labels >= 0) & (labels < len(logits))
    rows = labels.clamp(0, len(logits) - 1)
    found.copy_(torch.where(here, logits.gather(0, rows), found))
    # Of labels elsewhere, nothing is less than infinity.
    logits.scatter_reduce_(0, rows, torch.where(here, MASKED, torch.inf).to(logits.dtype), "amin")


def u_of_labels(labels: Tensor, u: Tensor, ids: Tensor, u_of_ids: Tensor) -> Tensor:
    """u of labels, (width,), from what the logits have there, and what was taken out at `ids`, (each, width)."""
    taken = ids == labels
    return torch.where(taken.any(0), torch.where(taken, u_of_ids, 0).sum(0), u)


@dataclass
class GradientParts:
    """What makes the logits' gradient: the coefficients of the workspace's arrays, (tiles, width) each, and what is
    subtracted at labels."""

    coefficients: list[Tensor]
    target: Target | None = None

    def times(self, factor: Tensor, dtype: torch.dtype) -> GradientParts:
        """The same, multiplied by a factor of each column, (width,)."""
        target = self.target
        if target is not None:
            target = Target(target.labels, (factor * target.weight).to(dtype))
        return GradientParts([(factor * each).to(dtype) for each in self.coefficients], target)


def carry_back(
    hidden: Tensor,
    head: HeadOperands,
    masked: Tensor | None,
    made: GradientParts,
    gradients: ChunkGradients,
    workspace: LogitTiles,
) -> None:
    """Computes the logits' gradient a tile at a time, and multiplies it with head and hidden states.

    At masked entries it is 0.
    """
    width, arrays = len(hidden), len(made.coefficients)
    before = 0 if gradients.first else 1
    total = hidden.new_zeros(hidden.T.shape)  # (H, C): products of few tokens run faster into that layout
    for number, (part, kept, passing, _) in enumerate(workspace.tiles(arrays * width)):
        first, *others = kept.split(width, 1)
        gradient = torch.mul(first, made.coefficients[0][number], out=passing.view(arrays, -1, width)[0])
        for array, coefficient in zip(others, made.coefficients[1:], strict=True):
            gradient.addcmul_(array, coefficient[number])
        if made.target is not None:
            made.target.subtract(part, gradient)
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
