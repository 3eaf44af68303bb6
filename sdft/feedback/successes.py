"""Demonstrations by the student: the teacher is shown, by the run's template, a rollout of the prompt that is right."""

from __future__ import annotations

from collections.abc import Sequence

from sdft.errors import UsageError
from sdft.evaluation.scorers import SCORERS, Scorer, scorer_of
from sdft.feedback.interface import Feedback, Rollout, by_prompt
from sdft.settings.checks import check_switch, chosen_or_own


def successes(rollouts: Sequence[Rollout], *, scorer: str = "exact", itself: bool = False) -> list[Feedback]:
    """Feedback on each rollout of a prompt that has a right one; those of other prompts are left out.

    The shortest right rollout is shown. A rollout is its own demonstration only with `itself`.
    """
    judge = named_scorer(scorer)
    check_switch("itself of feedback_args", itself)
    found = []
    for rollout, siblings in zip(rollouts, by_prompt(rollouts), strict=True):
        solved = [each for each in siblings if right(each, judge) and (itself or each is not rollout)]
        if solved:
            shown = min((each.completion for each in solved), key=len)
            found.append(Feedback(rollout.shown(shown), log=f"{len(solved)} right of {len(siblings)}"))
        else:
            found.append(Feedback(None, log=f"no demonstration among {len(siblings)}"))
    return found


def named_scorer(name: str) -> Scorer:
    """The scorer that feedback_args name."""
    setting = "scorer of feedback_args"
    return scorer_of(chosen_or_own(setting, name, SCORERS), setting)


def right(rollout: Rollout, judge: Scorer) -> bool:
    """Whether a rollout is right; UsageError where its row has no answer to compare with."""
    if not rollout.row.get("answer"):
        raise UsageError(f"{rollout.where} has no answer, which rollouts are compared with")
    return judge(rollout.completion, rollout.row["answer"])
