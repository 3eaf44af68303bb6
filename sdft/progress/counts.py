"""Watching completions while they are written: how many tokens there are, and whether to leave the rest unwritten."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

#: The tokens that have been written, and the completions that have come to their end.
Count = Callable[[], tuple[int, int]]

#: Called after each token; True leaves the completions as they are. To count makes a GPU wait, so only now and then.
Watch = Callable[[Count], bool]


class InBatches:
    """One watch over batches that are written in turn; `left` says whether what is left stays unwritten."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.left = watch, False
        self._tokens = self._ended = 0

    def __call__(self, count: Count) -> bool:
        def of_all() -> tuple[int, int]:
            tokens, ended = count()
            return self._tokens + tokens, self._ended + ended

        self.left = self.watch(of_all) or self.left
        return self.left

    def add(self, completions: Sequence[Sequence[int]]) -> None:
        """Count a batch that is done."""
        self._tokens += sum(map(len, completions))
        self._ended += len(completions)


class Watched(StoppingCriteria):
    """Has a watch look at a batch of `generate` after each token; completions end with one of `eos_ids`."""

    def __init__(self, watch: Watch, rows: int, eos_ids: Collection[int], device: torch.device) -> None:
        self.watch = watch
        self.ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self.unfinished = torch.ones(rows, dtype=torch.bool, device=device)
        self.written = torch.zeros((), dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.written += self.unfinished.sum()
        self.unfinished &= ~torch.isin(input_ids[:, -1], self.ends)
        return torch.full((len(input_ids),), self.watch(self._count), device=input_ids.device)

    def _count(self) -> tuple[int, int]:
        return int(self.written), int((~self.unfinished).sum())
