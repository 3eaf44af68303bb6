"""Large CPU memory kept from one call to the next: memory taken anew costs a fault for each page of it.

That is what a call's workspace and a head's gradient are. A tensor made here gives its memory back when nothing holds
it any longer, as when an optimizer's `zero_grad` drops a gradient; the next one of about its size takes it over. Until
then the pages are the system's to take whenever memory is short (MADV_FREE).
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

#: Bytes below which glibc's malloc keeps what was freed itself.
LEAST = 32 << 20

#: How many pieces are kept: of a step, the workspace and the gradient.
KEPT = 2

_spare: list[mmap.mmap] = []


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty` on the CPU; a storage of this memory cannot be resized."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST or not hasattr(mmap, "MADV_FREE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _taken(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)  # what the storage holds
    weakref.finalize(view, _give_back, memory).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(*shape)


def _taken(size: int) -> mmap.mmap | None:
    """A spare piece of so many bytes, up to twice as many."""
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
