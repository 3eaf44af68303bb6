"""The memory that is free on a device."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch

#: Where Linux says what is free, and what a container may have.
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def give_back(device: torch.device) -> None:
    """Have memory that is no longer used go back to where `free_memory` counts it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free once caches are given back; None where the system does not say."""
    give_back(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [bytes_ for bytes_ in (_free_in_system(), _free_in_container()) if bytes_ is not None]
    return min(found, default=None)


def _free_in_system() -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return _numbers(MEMINFO)["MemAvailable:"] * 1024
    return None


def _free_in_container() -> int | None:
    """What is left of the limit; files that were read, which the system drops when it needs room, count as free."""
    with contextlib.suppress(OSError, ValueError, KeyError):  # of which a limit of "max" is one
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        return limit - used + _numbers(CGROUP / "memory.stat")["inactive_file"]
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}
