"""Large CPU memory. New memory costs a page fault for each of its pages.

A call's workspace is kept for the next: a tensor made by `kept` gives its memory back when nothing holds it any longer,
and the next tensor of about its size takes it over. Until then the system may take the pages whenever memory is short
(MADV_FREE). A head's gradient, which its owner may resize, is torch's own memory in huge pages, of which there
are few (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes below which glibc's malloc keeps what was freed itself.
LEAST = 32 << 20

#: How many pieces are kept: the loss's workspace and scoring's.
KEPT = 2

_spare: list[mmap.mmap] = []


def huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like `torch.empty` on the CPU, but in huge pages where the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.nbytes >= LEAST and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - first
        # A wish, which a system that knows no such pages refuses.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor


def kept(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like `torch.empty` on the CPU, but in memory that an earlier such tensor has left; it cannot be resized."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST or not hasattr(mmap, "MADV_FREE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _taken(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)  # what the storage holds
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(*shape)


def _taken(size: int) -> mmap.mmap | None:
    """A spare piece of memory that has at least `size` bytes and at most twice as many."""
    for memory in list(_spare):
        if size <= len(memory) <= 2 * size:
            try:
                _spare.remove(memory)
            except ValueError:  # another thread was first
                continue
            return memory
    return None


def _give_back(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_FREE)
    except OSError:  # a system that knows no such advice
        return
    _spare.append(memory)
    del _spare[:-KEPT]
