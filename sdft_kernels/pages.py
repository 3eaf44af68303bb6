"""A CPU workspace kept from one call to the next: memory that is taken anew costs a fault for each page of it."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

#: The workspace of the last call, at most one.
_spare: list[Tensor] = []

#: madvise: the system may take these pages whenever memory is short; until then they stay, and need no faults.
_MADV_FREE = 8


def take(like: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """So many uninitialised numbers on the CPU, or more: those of an earlier call, or new ones."""
    spare = _spare.pop() if _spare else None
    if spare is not None and spare.dtype == dtype and len(spare) >= count:
        return spare
    return like.new_empty(count, dtype=dtype)


def give_back(tensor: Tensor) -> None:
    """Keeps what `take` gave for the next call, its pages free for the system to take back until then."""
    if sys.platform == "linux":
        start, size = tensor.data_ptr(), tensor.numel() * tensor.itemsize
        first, past = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < past:  # a system that knows no such advice says so in a result that changes nothing here
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(past - first), _MADV_FREE)
        _spare[:] = [tensor]
