"""What a function of feedback is given and returns: it sees all rollouts of a step, and says what the teacher sees.

>>> def feedback(rollouts):
...     return [Feedback(rollout.shown("4"), log="shown the answer") for rollout in rollouts]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft.data.chats import teacher_chat
from sdft.data.rows import WHERE
from sdft.templates import TEMPLATES, Message, shows_demonstration


@dataclass(frozen=True)
class Rollout:
    """A completion that the student has just written.

    `row` is the row of its prompt, with every column that it was read with, and `completion` the text without special
    tokens. `finished` says whether it came to an end of its own. Rollouts of one prompt in one step have the same
    `group`. `step` counts from 1.
    """

    row: Mapping[str, Any]
    completion: str
    finished: bool
    group: int
    step: int
    template: list[Message] = field(repr=False, default_factory=lambda: TEMPLATES["paper"])

    def shown(self, demonstration: str) -> list[Message]:
        """What the teacher sees with this text for the demonstration, under the run's template; under "paper" where
        that shows none."""
        template = self.template if shows_demonstration(self.template) else TEMPLATES["paper"]
        return teacher_chat({**self.row, "demonstration": demonstration, "teacher_prompt": None}, template)

    @property
    def where(self) -> str:
        """The row's file and number."""
        return str(self.row.get(WHERE, f"row {self.group + 1} of the step"))


@dataclass(frozen=True)
class Feedback:
    """What a rollout counts, and what the teacher sees before it.

    `messages` are the teacher's chat, or a text by the user; None leaves the rollout out of the loss. The loss is the
    mean over tokens weighted by `weight`, a number of at least 0. `log` is written to completions.jsonl.
    """

    messages: list[Message] | str | None
    weight: float = 1.0
    log: str = ""


#: Called once a step, in each process with its own rollouts: all of a prompt are in one process, side by side.
FeedbackFunction = Callable[[Sequence[Rollout]], Sequence[Feedback]]


def by_prompt(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """For each rollout, those of the same prompt, itself among them."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    return [groups[rollout.group] for rollout in rollouts]
