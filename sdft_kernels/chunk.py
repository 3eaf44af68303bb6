"""What a backend is given of each model, and where it puts gradients: what passes between it and the chunk loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: Rows of logits, and a bias, have memory up to a multiple of this many elements, so that kernels load and store 16
#: bytes at a time whatever the vocabulary's size.
ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Head:
    """A model's head (V, H), in the products' dtype, and its bias (V,) or None, in the accumulation dtype and with
    memory up to the row alignment."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class ChunkGradients:
    """Where a chunk's gradients go, None for what is not wanted.

    `hidden`, (C, H), is to be written; `weight`, (V, H), is to be added to, or written if `first`, and where it is not
    in the accumulation dtype there is only this chunk; `bias`, (V,), is to be added to.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    first: bool

    @property
    def any(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None
