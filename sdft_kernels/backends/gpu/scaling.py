"""Multiplying a gradient by a number that only the device knows, as a Triton kernel.

The upstream gradient of a loss is mostly 1, which the host cannot see without waiting for the device. The kernel sees
it, and leaves the gradient alone: a pass over a head's worth of memory less.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 4
#: So many programs, each with its share of the values, keep a large device busy: 132 multiprocessors run eight each.
PROGRAMS = 1056


def scale(values: Tensor, factor: Tensor) -> None:
    """values ← values · factor in place: contiguous values, and a factor (1,) in the accumulation dtype."""
    count = values.numel()
    if count:
        grid = (min(PROGRAMS, triton.cdiv(count, BLOCK)),)
        scale_kernel[grid](values, factor, count, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def scale_kernel(values_pointer, factor_pointer, count, BLOCK: tl.constexpr):
    """Rounds once, from the factor's dtype to the values'."""
    factor = tl.load(factor_pointer)
    if factor != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, count, step):
            places = start + tl.arange(0, BLOCK)
            values = tl.load(values_pointer + places, mask=places < count)
            scaled = values.to(factor.dtype) * factor
            tl.store(values_pointer + places, scaled.to(values_pointer.dtype.element_ty), mask=places < count)
