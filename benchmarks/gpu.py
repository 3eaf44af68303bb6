"""The GPU that is there: which of the roofline's it is, how long a call takes on it, and the most memory of one.

Times are by CUDA events, from a call's first launch to the end of its last. On a CPU, where only toys run, they are
the host's, and there is no count of memory.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.roofline import GPUS, Gpu

MEBIBYTE = 2**20

Call = Callable[[], object]


def this_gpu() -> Gpu | None:
    """The roofline's entry for the GPU that is there."""
    name, gib = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory / 2**30
    known = next((gpu for gpu in GPUS if gpu.name in re.split(r"[\s-]", name)), None)
    # Of an A100 and an H100 there are slower ones, with 40 GB, on PCIe, or as the two of an NVL.
    slower = gib < 60 or any(word in name for word in ("PCIe", "NVL", "MIG"))
    return None if slower else known


def milliseconds(call: Call, device: str, times: int = 1) -> float:
    """Of one of `times` calls in a row."""
    if device != "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begun) * 1e3 / times
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(times):
        call()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / times


def median_milliseconds(call: Call, device: str, *, seconds: float = 0.2) -> float:
    """A median over at least five times, of as many as fill `seconds`; each of a millisecond at least, so that a short
    launch is one of several. Two unmeasured calls go before: the first compiles what compiles. On a CPU, one call."""
    if device != "cuda":
        return milliseconds(call, device)
    call()
    guess = max(milliseconds(call, device), 1e-3)
    times = max(1, min(100, round(1 / guess)))
    rounds = max(5, min(50, round(seconds * 1e3 / (guess * times))))
    return statistics.median(milliseconds(call, device, times) for _ in range(rounds))


def wall_seconds(call: Call, device: str) -> float:
    """From here to the end of everything launched, compilation and all."""
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def most_memory(call: Call, device: str) -> int | None:
    """Bytes above what was there before; None on a CPU."""
    if device != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def mebibytes(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / MEBIBYTE


def free_bytes(device: str) -> int:
    """Memory that a call could still have: what torch keeps in reserve is counted as taken. A GiB for a toy."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 2**30


def release(device: str, *, thorough: bool = False) -> None:
    """Gives back what nothing holds any longer; `thorough` where something broke, since looking through all that the
    peers' packages have imported takes a quarter of a second."""
    gc.collect(2 if thorough else 1)
    if device == "cuda":
        torch.cuda.empty_cache()
