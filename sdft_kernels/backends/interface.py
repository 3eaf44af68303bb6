"""What a back-end does for the chunk loop, and what passes between the two.

A back-end is a module with the names of `Backend`. It works through one chunk of tokens at a time, in a workspace that
it has made for all of them; the loop does not look into that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunking import Held
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores

#: Rows of logits, and a bias, have memory up to a multiple of this many elements, so that kernels load and store 16
#: bytes at a time whatever the vocabulary's size.
ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class HeadOperands:
    """A model's head (V, H), in the products' dtype, and its bias (V,) or None, in the accumulation dtype and with
    memory up to the row alignment."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class ChunkGradients:
    """Where a back-end puts a chunk's gradients. What is not wanted is None.

    The back-end writes `hidden`, (C, H). It adds to `weight`, (V, H), or writes it if this chunk is the `first`; where
    `weight` is not in the accumulation dtype, there is only this chunk. It adds to `bias`, (V,).
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    first: bool

    @property
    def any(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None


class Backend(Protocol):
    """The loss and the scores of a chunk of C tokens."""

    #: Whether a teacher's hidden state may hold anything, NaN too, where its token's weight is 0. Otherwise the loop
    #: passes zeros in its place.
    TEACHER_MAY_BE_ANYTHING: bool

    def held(self, dtypes: Dtypes, objective: Objective, *, with_gradient: bool) -> Held:
        """The bytes of workspace that the loss needs for each logit."""

    def loss_workspace(
        self, like: Tensor, tokens: int, vocab: int, dtypes: Dtypes, objective: Objective, *, with_gradient: bool
    ) -> Any:
        """A workspace for chunks of up to `tokens` tokens, on the device of `like`."""

    def process_chunk(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor | None,
        student: HeadOperands,
        teacher: HeadOperands | None,
        rows: TokenRows,
        objective: Objective,
        gradients: ChunkGradients,
        workspace: Any,
    ) -> None:
        """Fill `rows` and `gradients` from hidden states (C, Hs) and (C, Ht); an objective may have no teacher."""

    def scoring_held(self, dtypes: Dtypes) -> Held:
        """The bytes of workspace that scoring needs for each logit."""

    def scoring_workspace(self, like: Tensor, tokens: int, vocab: int, dtypes: Dtypes) -> Any:
        """A workspace for chunks of up to `tokens` tokens."""

    def score_chunk(
        self, hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions, workspace: Any
    ) -> None:
        """Fill `scores` from hidden states (C, H)."""

    def scale(self, values: Tensor, factor: Tensor) -> None:
        """Multiply `values` by `factor`, a scalar on their device, in place and without waiting for it."""
