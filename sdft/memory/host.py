"""The C library's allocator, told to give large memory back at once.

glibc takes memory of up to 32 MiB from one heap, whose gaps stay with the process. A layer that is made again in the
backward pass leaves many of them: a checkpointed step of 2,048 tokens kept 1.5 GiB where 0.1 were in use.
"""

from __future__ import annotations

import ctypes
import sys

#: glibc's name for the size from which memory is mapped by itself, and so is given back when it is freed.
M_MMAP_THRESHOLD = -3

#: Smaller memory stays in the heap, where it is had faster.
THRESHOLD = 4 << 20


def give_back_at_once() -> bool:
    """Have freed memory of 4 MiB and more go back to the system; False where the C library is another."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD))
