"""Texts that rollouts may resemble, known before they are written: drafts (`sdft.rollouts.drafts`)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from sdft.rollouts.interface import Completion

#: Where drafts come from: the row's demonstration, or the last rollout of the same prompt, of an earlier epoch.
DEMONSTRATION, HISTORY = "demonstration", "history"


class KnownTexts:
    """The drafts of a process's rollouts, from one of these sources; none from any other.

    `number` tells the rollouts of one prompt apart. What was written is kept as long as the process lives. `right` is
    the share of the last completions' tokens that their drafts had.
    """

    def __init__(self, source: str) -> None:
        self.source, self.right = source, 0.5
        self._written: dict[tuple[bytes, int], array[int]] = {}

    def draft(self, row: dict[str, Any], number: int) -> Sequence[int]:
        """What the next rollout of the row may resemble; empty where nothing is known."""
        if self.source == DEMONSTRATION:
            return row["draft_ids"]
        return self._written.get(_key(row, number), ()) if self.source == HISTORY else ()

    def note(self, row: dict[str, Any], number: int, completion: Completion) -> None:
        """Keep what was written to the row, and how far its draft had it."""
        if completion.passes and completion.tokens:
            self.right += (completion.foreseen / len(completion.tokens) - self.right) / 8
        if self.source == HISTORY:
            self._written[_key(row, number)] = array("i", completion.tokens)


def _key(row: dict[str, Any], number: int) -> tuple[bytes, int]:
    return array("i", row["prompt_ids"]).tobytes(), number
