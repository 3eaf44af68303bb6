"""What each token of a rollout counts, and when rollouts have collapsed: a part of the method's settings."""

from __future__ import annotations

from dataclasses import dataclass

from sdft.settings.checks import check_between, chosen_or_own
from sdft.settings.setting import setting

UNIFORM = "uniform"
WEIGHTINGS = (UNIFORM, "teacher_confidence", "early")


@dataclass
class TokenWeightSettings:
    """Which tokens of a rollout count, and how much."""

    token_weighting: str = setting(
        UNIFORM,
        "What a rollout's token counts in the loss: uniform (all alike), teacher_confidence (exp of minus the "
        "teacher's entropy there), early (from 1 for the first token to 1/length for the last), or module:function of "
        "your own. All but uniform compare the models twice.",
    )
    divergence_clip: float | None = setting(
        None,
        "Tokens whose divergence is above this many nats count as this much in the loss and teach nothing. Compares "
        "the models twice.",
    )
    mask_truncated_completions: bool = setting(
        False, "Leave rollouts out of the loss that were cut at max_completion_length."
    )
    stop_on_collapse: float | None = setting(
        None,
        "End training once the entropy, the length or the finished share of rollouts is this many times above or below "
        "what it was in the first ten lines of the log. Not set: that it is ten times is said, and training goes on.",
    )

    def __post_init__(self) -> None:
        self.token_weighting = chosen_or_own("token_weighting", self.token_weighting, WEIGHTINGS)
        if self.divergence_clip is not None:
            check_between("divergence_clip", self.divergence_clip, 0)
        if self.stop_on_collapse is not None:
            check_between("stop_on_collapse", self.stop_on_collapse, 1)
