"""Large arrays on a CPU: memory that a call takes for itself and gives back costs a fault for each page of it.

Both remedies are requests that another system, or a kernel without them, may ignore.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

from sdft_kernels.tokens import reads_are_free

#: Bytes of a large page on x86-64, and on 64-bit Arm with small pages of 4 KiB.
LARGE_PAGE = 2 << 20

#: The workspace of the last call, at most one.
_spare: list[Tensor] = []


def on_large_pages(tensor: Tensor) -> Tensor:
    """The same tensor, its memory on the CPU given in pages of 2 MiB when it is first written, if Linux has some.

    Of 545 MB, a head's gradient, the first writing took 0.18 s longer than the second on two cores, and 0.05 s with
    large pages. NumPy asks for them too.
    """
    if sys.platform == "linux":
        _advise(tensor, mmap.MADV_HUGEPAGE)
    return tensor


def take(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """So many uninitialised numbers on the CPU: those of an earlier call, or new ones on large pages."""
    spare = _spare.pop() if _spare else None
    if spare is not None and spare.dtype == dtype and len(spare) >= count:
        return spare
    return on_large_pages(like.new_empty(count, dtype=dtype))


def give_back(tensor: Tensor) -> None:
    """Keeps what `take` gave for the next call, for which its pages need no new faults; until then the system may take
    them back whenever memory is short."""
    if sys.platform == "linux" and reads_are_free(tensor):
        _advise(tensor, 8)  # MADV_FREE, which Python has no name for before 3.13
        _spare[:] = [tensor]


def _advise(tensor: Tensor, advice: int) -> None:
    """madvise for the large pages that lie whole within the tensor."""
    if reads_are_free(tensor):
        start, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
        first, past = -(-start // LARGE_PAGE) * LARGE_PAGE, (start + size) // LARGE_PAGE * LARGE_PAGE
        if first < past:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(past - first), advice)
