"""Vectors over tokens: the ones that row operations read and write, and which tokens are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


def reads_are_free(tensor: Tensor) -> bool:
    """Whether the host may look at a value of this tensor without waiting: on the CPU, where there is a value."""
    return tensor.device.type == "cpu" and is_plain(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has values of its own. While a graph is traced, a tensor stands for another one."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def on_its_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, which is where Triton launches kernels and looks for the stream."""
    device = tensor.device
    real = device.type == "cuda" and device.index is not None  # which a tensor that is only traced need not have
    return torch.cuda.device(device) if real else nullcontext()


@dataclass
class _Vectors:
    """Vectors over tokens that are cut together."""

    def __getitem__(self, part: slice) -> Self:
        """The same vectors for some of the tokens: views, so that what is written there is written here."""
        vectors = [getattr(self, field.name) for field in fields(self)]
        return type(self)(*(None if vector is None else vector[part] for vector in vectors))


@dataclass
class TopTokens(_Vectors):
    """What a teacher gives of each token: K entries, (N, K), and the rest's log-probability, (N,).

    `ids` rise within a row. Those whose `logprobs` are -inf are none, and have the vocabulary's size for an id.
    `student_tail`, (N,), is written: the student's log-probability of the rest.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    student_tail: Tensor


@dataclass
class TokenRows(_Vectors):
    """What the loss reads and writes for each token, (N,), on one device.

    `weight` is read as the factor of each token's gradient and multiplied in place by its importance weight.
    The vectors from `loss` to `logsumexp` are written, and `hard_loss`. All but labels are in the accumulation dtype.
    `hard_weight` times `hard_loss` is the hard term of a divergence. Without a teacher there is nothing of one, and
    `loss` is the cross-entropy of `labels`, or the divergence from what a teacher gives of `top`.
    """

    weight: Tensor
    labels: Tensor | None
    old_logprobs: Tensor | None
    loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    logsumexp: Tensor | None = None
    hard_labels: Tensor | None = None
    hard_weight: Tensor | None = None
    hard_loss: Tensor | None = None
    top: TopTokens | None = None


@dataclass
class TokenScores(_Vectors):
    """Vectors that scoring works on, (N,), on one device: it reads `labels` and writes the others. `top1` is bool."""

    labels: Tensor | None
    logprob: Tensor | None
    top1: Tensor | None
    entropy: Tensor
    logsumexp: Tensor


class LiveTokens:
    """The tokens whose weight is not 0; the others contribute nothing, whatever their hidden states hold.

    On the CPU the others are left out. A device cannot say how many there are without making the host wait, so there
    zeros replace their rows before the products. The teacher's rows go into no gradient, and a back-end that ignores
    them itself gets them as they are.
    """

    def __init__(self, weight: Tensor | None, count: int) -> None:
        self.given = count
        self.count = count
        self._index: Tensor | None = None
        self._mask: Tensor | None = None
        self._zeros: dict[torch.dtype, Tensor] = {}
        if weight is None:
            return
        mask = weight != 0
        if not reads_are_free(weight):
            self._mask = mask
        elif not mask.all():
            self._index = mask.nonzero().squeeze(1)
            self.count = self._index.numel()

    def take(self, tensor: Tensor, part: slice = slice(None), *, cleaned: bool = True) -> Tensor:
        """The rows of an (N, ...) tensor that belong to a slice of the live tokens.

        On a device the rows of the other tokens are among them, as zeros if `cleaned`, else as they are.
        """
        if self._index is not None:
            return tensor.index_select(0, self._index[part])
        if self._mask is not None and cleaned:
            mask = self._mask[part].view(-1, *[1] * (tensor.dim() - 1))
            if tensor.dtype not in self._zeros:  # a plain 0 would be put on the device for each chunk
                self._zeros[tensor.dtype] = tensor.new_zeros(())
            return torch.where(mask, tensor[part], self._zeros[tensor.dtype])
        return tensor[part]

    @contextmanager
    def rows_of(self, tensor: Tensor, part: slice) -> Iterator[Tensor]:
        """Rows to write for a slice of the live tokens: those of the (N, ...) tensor, or others that it then gets."""
        if self._index is None:
            yield tensor[part]
        else:
            rows = tensor.new_empty((len(self._index[part]), *tensor.shape[1:]))
            yield rows
            tensor.index_copy_(0, self._index[part], rows)

    def spread(self, vector: Tensor) -> Tensor:
        """Makes a vector over all tokens of one over the live tokens, with 0 for the others."""
        if self._index is not None:
            return vector.new_zeros(self.given).index_copy_(0, self._index, vector)
        return vector if self._mask is None else vector.masked_fill(~self._mask, 0)

    @property
    def some_left_out(self) -> bool:
        """Whether there are tokens that no slice of the live ones covers."""
        return self._index is not None
