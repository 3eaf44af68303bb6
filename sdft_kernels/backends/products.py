"""The four matrix products of the loss, with float32 results whatever the inputs.

Rounding a logit of 20 to bfloat16 moves it by 0.06, as much as teacher and student differ, so half-precision
inputs must give float32 logits. CUDA's matrix product does that itself (`out_dtype`). Elsewhere the weight is
upcast a slab of the vocabulary at a time, so that no float32 copy of a whole head exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes of float32 weights that are upcast at once where the matrix product cannot widen by itself.
SLAB_BYTES = 16 << 20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax arithmetic and accumulated weight gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(operands: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the logits' gradient: the operands' own where products of it accumulate in float32."""
    widens = device.type == "cuda" and torch.version.hip is None
    return operands if widens else accumulation_dtype(operands)


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of a call.

    Products take their operands in `operands`. Logits, softmax arithmetic, values of tokens and sums over chunks are
    `wide`. The logits' gradient is in `gradient`, and the head's is returned in `head_gradient`.
    """

    operands: torch.dtype
    wide: torch.dtype
    gradient: torch.dtype
    head_gradient: torch.dtype

    @classmethod
    def of(cls, operands: torch.dtype, head: torch.dtype, device: torch.device) -> Dtypes:
        """From the dtype of the products' operands and that of the head.

        The head's gradient has the head's own dtype where a single product can make all of it, which then needs no
        float32 buffer. It is never float16, because a sum over tokens may leave that type's range.
        """
        wide, gradient = accumulation_dtype(operands), gradient_dtype(operands, device)
        own = head == operands == gradient == torch.bfloat16
        return cls(operands, wide, gradient, head if own else wide)


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out ← hidden @ weight.T; (R, H), (V, H) → (R, V) in the accumulation dtype."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif gradient_dtype(hidden.dtype, hidden.device) == hidden.dtype:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for slab in _slabs(weight):
            torch.mm(wide, weight[slab].to(out.dtype).T, out=out[:, slab])


def hidden_gradient(logits_gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """out ← logits_gradient @ weight; (R, V), (V, H) → (R, H)."""
    if logits_gradient.dtype == weight.dtype == out.dtype:
        torch.mm(logits_gradient, weight, out=out)
    elif logits_gradient.dtype == weight.dtype and out.dtype == accumulation_dtype(weight.dtype):
        torch.mm(logits_gradient, weight, out_dtype=out.dtype, out=out)
    elif logits_gradient.dtype == weight.dtype and gradient_dtype(weight.dtype, weight.device) == weight.dtype:
        # Under autocast the hidden states may be of a third type, which no product gives.
        out.copy_(torch.mm(logits_gradient, weight, out_dtype=accumulation_dtype(weight.dtype)))
    else:
        total = logits_gradient.new_zeros(out.shape)
        for slab in _slabs(weight):
            total.addmm_(logits_gradient[:, slab], weight[slab].to(total.dtype))
        out.copy_(total)


def add_weight_gradient(logits_gradient: Tensor, hidden: Tensor, total: Tensor, *, first: bool) -> None:
    """total += logits_gradient.T @ hidden; (R, V), (R, H) → (V, H). What `total` held before `first` is dropped."""
    kept = 0 if first else 1
    if logits_gradient.dtype == total.dtype:
        total.addmm_(logits_gradient.T, hidden.to(total.dtype), beta=kept)
    else:
        torch.addmm(total, logits_gradient.T, hidden, out_dtype=total.dtype, beta=kept, out=total)


def _slabs(weight: Tensor) -> Iterator[slice]:
    rows = max(1, SLAB_BYTES // (4 * max(1, weight.shape[1])))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))
