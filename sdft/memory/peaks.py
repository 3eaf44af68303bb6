"""The most memory that a run has taken, and in each phase of it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch

#: Linux keeps a process's largest resident set here, and starts anew when a 5 is written.
RESIDENT, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peaks:
    """Peaks in MiB: on a GPU of what torch has allocated there, else of what the process has resident.

    Where a process may not start its peak anew, each phase has the peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.most = device, 0.0
        self._of: dict[str, float] = {}

    def note(self, phase: str | None) -> None:
        """The time since the last note belonged to this phase, or to none."""
        peak = self._since_last()
        self.most = max(self.most, peak)
        if phase is not None:
            self._of[phase] = max(peak, self._of.get(phase, 0.0))

    def take(self) -> dict[str, float]:
        """The peak of each phase since this was last asked."""
        taken, self._of = self._of, {}
        return taken

    def _since_last(self) -> float:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        peak = _most_resident()
        with contextlib.suppress(OSError):
            FORGET.write_text("5")
        return peak


def _most_resident() -> float:
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in RESIDENT.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
