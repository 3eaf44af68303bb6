"""Feedback on rollouts: the part of the method's settings that says who gives it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from sdft.errors import UsageError, shown
from sdft.settings.checks import matching
from sdft.settings.setting import setting

#: The functions that come with the package, each in a module of `sdft.feedback` by its name, and what rows must have.
FEEDBACKS = {"sdpo": ("answer",), "successes": ("answer",), "judge": ()}
#: Of those that look at a prompt's other rollouts, what of feedback_args has them keep one that is alone.
ALONE = {"sdpo": "verdict", "successes": "itself"}


@dataclass
class FeedbackSettings:
    """Who says what the teacher sees of a rollout, once it is written."""

    feedback: str | None = setting(
        None,
        "What makes the teacher's prompt of each rollout after it was written, in place of teacher_template: sdpo (a "
        "right rollout of the same prompt, and what is wrong with this one), successes (a right rollout as the "
        "demonstration), judge (a shell command), or module:function of your own. It can leave rollouts out.",
    )
    feedback_args: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "What feedback is told beside the rollouts, as {scorer: contains} for sdpo."},
    )

    def __post_init__(self) -> None:
        if self.feedback is not None:
            self.feedback = matching(self.feedback, FEEDBACKS) or self.feedback
            if not isinstance(self.feedback, str) or not (
                self.feedback in FEEDBACKS or re.fullmatch(r"[\w.]+:[\w.<>]+", self.feedback)
            ):
                raise UsageError(
                    f"feedback is {shown(self.feedback)}; it may be {', '.join(FEEDBACKS)} or module:function, and a "
                    "function itself is given to SDFTTrainer"
                )
        args = self.feedback_args
        if args is not None and not (isinstance(args, dict) and all(isinstance(name, str) for name in args)):
            raise UsageError(f"feedback_args is {shown(args)}; it must be a mapping of names to values")
