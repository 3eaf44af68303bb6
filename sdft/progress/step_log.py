"""What the log says of the steps since it last spoke: means over tokens and completions, time, memory."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from torch import Tensor

from sdft.progress.phases import PHASES, Phases
from sdft.reach import FAR

logger = logging.getLogger(__name__)

ENOUGH_TO_JUDGE = 8  # completions, by how many of which are cut, and how they begin
#: The share of the teacher's first tokens out of reach that is worth saying (docs/choosing.md has what was measured).
TOO_FAR = 0.2

WHOLE_RUN = "run"  # in peaks beside the phases


def named_peaks(peaks: dict[str, float]) -> dict[str, float]:
    """The peaks by their names in the log; phases that were not gone through are left out."""
    names = {phase: f"{phase}_peak_memory_mib" for phase in PHASES} | {WHOLE_RUN: "peak_memory_mib"}
    return {names[phase]: peak for phase, peak in peaks.items() if peak}


class StepLog:
    """Sums over micro-batches, which stay on the device, and over processes, once a line is asked for."""

    def __init__(self, accelerator: Accelerator, phases: Phases, max_completion_length: int) -> None:
        self.accelerator, self.phases, self.max_completion_length = accelerator, phases, max_completion_length
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._totals: dict[str, float] = {}
        self._highest: dict[str, float] = {}
        self._judged, self._warned_of_cuts = (0, 0), False
        self._begun, self._out_of_reach = 0, 0.0

    def __bool__(self) -> bool:
        """Whether there is anything to say."""
        return bool(self._sums)

    def add(self, **sums: Tensor | float) -> None:
        """Add to the sums whose means the next line shows; of what ends in _max the largest counts."""
        for name, value in sums.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach()
            if name.endswith("_max"):
                self._maxima[name] = torch.maximum(value, self._maxima.get(name, value))
            else:
                self._sums[name] = self._sums.get(name, 0) + value

    def line(self) -> dict[str, float]:
        """What there is to say of the steps since the last line; every process must ask."""
        sums = self._take()
        line: dict[str, float] = {}
        for name in ("student_entropy", "teacher_entropy", "base_kl", "token_weight", "clipped"):
            if name in sums and sums["tokens"]:  # no mean is there of no token
                line[name] = sums[name] / sums["tokens"]
        if sums.get("begun"):
            line["out_of_reach"] = sums["out_of_reach"] / sums["begun"]
            self._warn_of_reach(int(sums["begun"]), sums["out_of_reach"])
        if sums.get("squared_importance"):
            line["rollout_gap"] = sums["rollout_gap"] / sums["tokens"]
            line["effective_share"] = sums["importance"] ** 2 / (sums["tokens"] * sums["squared_importance"])
        if sums.get("passes"):
            line["draft_accepted"] = sums["accepted"] / max(sums["drafted"], 1)
            line["tokens_per_pass"] = sums["written_by_drafts"] / sums["passes"]
        line |= self._take_maxima()
        if sums.get("completions"):
            line["completion_length"] = sums["completion_length"] / sums["completions"]
            line["finished"] = sums["finished"] / sums["completions"]
            if "left_out" in sums:
                line["left_out"] = sums["left_out"] / sums["completions"]
            if "behind" in sums:
                line["rollout_lag"] = sums["behind"] / sums["completions"]
            self._warn_of_cuts(int(sums["completions"]), int(sums["finished"]))
        return line | self._spent(sums) | named_peaks(self._take_peaks())

    def spent(self) -> dict[str, float]:
        """What the run has taken so far of time and memory, as a line says it of its steps."""
        self._take()
        self._take_peaks()
        return self._spent(self._totals) | named_peaks(self._highest)

    def _take(self) -> dict[str, float]:
        """The sums over all processes since they were last taken."""
        self.add(**{f"{name}_seconds": seconds for name, seconds in self.phases.take().items()})
        names = sorted(self._sums)
        values = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
        sums = dict(zip(names, values, strict=True))
        self._sums = {}
        for name, value in sums.items():
            self._totals[name] = self._totals.get(name, 0.0) + value
        return sums

    def _take_maxima(self) -> dict[str, float]:
        """The largest values of all processes since they were last taken."""
        names = sorted(self._maxima)
        if not names:
            return {}
        values = self.accelerator.gather(torch.stack([self._maxima[name] for name in names])[None]).amax(0).tolist()
        self._maxima = {}
        return dict(zip(names, values, strict=True))

    def _take_peaks(self) -> dict[str, float]:
        """The peak of memory so far, and of each phase since they were last taken: the highest of all processes."""
        peaks = self.phases.peaks
        peaks.note(self.phases.now)
        taken = peaks.take()
        values = torch.tensor(
            [[peaks.most, *(taken.get(name, 0.0) for name in PHASES)]], device=self.accelerator.device
        )
        highest = self.accelerator.gather(values).amax(0).tolist()
        found = dict(zip((WHOLE_RUN, *PHASES), highest, strict=True))
        for name, value in found.items():
            self._highest[name] = max(value, self._highest.get(name, 0.0))
        return found

    def _spent(self, sums: dict[str, float]) -> dict[str, float]:
        """Seconds by phase, of a process, and tokens a second, of all of them."""
        seconds = {name: sums[f"{name}_seconds"] / self.accelerator.num_processes for name in PHASES}
        spent = {f"{name}_seconds": value for name, value in seconds.items() if value}
        of_step = seconds["rollout"] + seconds["feedback"] + seconds["score"] + seconds["learn"]
        if of_step and sums.get("tokens"):
            spent["tokens_per_second"] = sums["tokens"] / of_step
        if seconds["rollout"] and sums.get("completion_length"):
            spent["rollout_tokens_per_second"] = sums["completion_length"] / seconds["rollout"]
        return spent

    def _warn_of_cuts(self, completions: int, finished: int) -> None:
        """Say it once if most completions do not come to an end; too few to judge by are judged with the next."""
        self._judged = (self._judged[0] + completions, self._judged[1] + finished)
        completions, finished = self._judged
        if completions < ENOUGH_TO_JUDGE or self._warned_of_cuts:
            return
        self._judged = (0, 0)
        if finished < completions / 2:
            self._warned_of_cuts = True
            if self.accelerator.is_main_process:
                logger.warning(
                    "%d of the last %d completions were cut at max_completion_length=%d: raise it, or name in "
                    "rollout_stop what ends an answer",
                    completions - finished,
                    completions,
                    self.max_completion_length,
                )

    def _warn_of_reach(self, begun: int, out_of_reach: float) -> None:
        """Say of the first completions, once there are enough, if the teacher would begin them out of reach."""
        if self._begun >= ENOUGH_TO_JUDGE:
            return
        self._begun, self._out_of_reach = self._begun + begun, self._out_of_reach + out_of_reach
        share = self._out_of_reach / self._begun
        if self._begun >= ENOUGH_TO_JUDGE and share >= TOO_FAR and self.accelerator.is_main_process:
            logger.warning(
                "the first %d completions begin far from where the teacher would: %.0f %% of its probability of their "
                "first token is on tokens that are %d times less likely to the student, which the divergence hardly "
                "teaches (divergence: forward_kl does)",
                self._begun,
                100 * share,
                FAR,
            )
