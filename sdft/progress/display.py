"""How far training is, while it runs: on a terminal a line that is always up to date, elsewhere one for each log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft.progress.counts import Count
from sdft.progress.phases import PHASES

EVERY = 0.2  # seconds between two looks at the rollouts, which on a GPU have to be waited for


class Progress:
    """What a trainer tells of the step that it is at; nobody listens to this one."""

    def phase(self, name: str | None) -> None:
        """Another phase of those in `sdft.progress.phases` has begun, or none."""

    def rollouts(self, count: Count, rollouts: int, most: int) -> None:
        """A token of so many rollouts has been written, which have so many tokens at most."""

    def learned(self, pieces: int, of: int) -> None:
        """So many pieces of the step have been learned from."""


def memory_of(logs: dict[str, float]) -> str:
    """The peak of memory in a line of the log, and the phase that had it."""
    peaks = {phase: logs.get(f"{phase}_peak_memory_mib", 0.0) for phase in PHASES}
    highest = max(peaks, key=lambda phase: peaks[phase])
    return f"{peaks[highest]:.0f} MiB in {highest}" if peaks[highest] else ""


class Display(Progress, TrainerCallback):
    """Shows it on `file`, unless `silent`; to be closed when the run ends, however it does."""

    def __init__(self, *, silent: bool = False, file: TextIO | None = None) -> None:
        self.file = sys.stderr if file is None else file
        self.silent, self.live = silent, not silent and self.file.isatty()
        self.bar = tqdm(disable=True)
        self.shown = self.began = self.phase_began = 0.0
        self.doing, self.loss, self.memory = "", "", ""

    def close(self) -> None:
        self.bar.close()

    # On a terminal: what is going on

    def phase(self, name: str | None) -> None:
        self.doing, self.phase_began = name or "", time.perf_counter()
        self._show()

    def rollouts(self, count: Count, rollouts: int, most: int) -> None:
        if self._is_due():
            tokens, ended = count()
            rate = tokens / max(time.perf_counter() - self.phase_began, 1e-9)
            self.doing = (
                f"rollout: {tokens} of at most {most} tokens, {ended} of {rollouts} finished, {rate:.0f} tokens/s"
            )
            self._show()

    def learned(self, pieces: int, of: int) -> None:
        self.doing = f"learn: {pieces} of {of} pieces"
        self._show()

    def _is_due(self) -> bool:
        return self.live and time.perf_counter() - self.shown >= EVERY

    def _show(self, *, now: bool = False) -> None:
        if now or self._is_due():
            self.shown = time.perf_counter()
            self.bar.set_postfix_str(", ".join(filter(None, (self.loss, self.memory, self.doing))))

    # The Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.silent = self.silent or not state.is_world_process_zero
        self.live = self.live and not self.silent
        self.began, self.first = time.perf_counter(), state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            disable=not self.live,
            file=self.file,
            dynamic_ncols=True,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar:10}| {elapsed}, {remaining} left{postfix}",
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = f"loss {logs['loss']:.3f}"
        self.memory = memory_of(logs)
        if self.live:
            self._show(now=True)
        elif not self.silent:
            each = (time.perf_counter() - self.began) / (state.global_step - self.first)
            left = tqdm.format_interval(each * (state.max_steps - state.global_step))
            rate = f"{logs['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in logs else ""
            facts = [
                f"step {state.global_step} of {state.max_steps}",
                self.loss,
                f"{each:.1f} s a step",
                f"{left} left",
            ]
            print(f"training: {', '.join(filter(None, (*facts, rate, self.memory)))}", file=self.file, flush=True)
