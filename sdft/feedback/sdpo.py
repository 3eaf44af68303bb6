"""Self-distillation policy optimisation (SDPO, arXiv 2601.20802): the teacher sees an attempt that succeeded.

A verifier, one of `sdft.evaluation.scorers`, says whether a rollout is right. The teacher is shown a right rollout of
the same prompt other than the one that it scores, and where that one is wrong what the verifier says of it. A rollout
with neither is left out. Order and wording of the prompt follow the authors' code (lasgroup/SDPO).
"""

from __future__ import annotations

from collections.abc import Sequence

from sdft.feedback.interface import Feedback, Rollout, by_prompt
from sdft.feedback.successes import named_scorer, right
from sdft.settings.checks import check_switch
from sdft.templates import Message, as_messages, last_by_user

SOLUTION = "\n\nCorrect solution:\n\n{}"
ATTEMPT = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{}"
REQUEST = "\n\nCorrectly solve the original question."


def sdpo(rollouts: Sequence[Rollout], *, scorer: str = "exact", verdict: bool = False) -> list[Feedback]:
    """Feedback on each rollout by the named scorer and its siblings.

    With `verdict`, a wrong rollout without a right sibling is kept: the teacher is shown it, and that it is wrong.
    """
    judge = named_scorer(scorer)
    check_switch("verdict of feedback_args", verdict)
    found = []
    for rollout, siblings in zip(rollouts, by_prompt(rollouts), strict=True):
        solved = next((each for each in siblings if each is not rollout and right(each, judge)), None)
        wrong = not right(rollout, judge)
        parts = [] if solved is None else [SOLUTION.format(solved.completion)]
        if wrong and verdict and solved is None:
            parts.append(ATTEMPT.format(f"{rollout.completion}\n\nThis is wrong."))
        log = f"{'wrong' if wrong else 'right'}, {'no sibling is right' if solved is None else 'a sibling is right'}"
        found.append(Feedback(asked_again(rollout, "".join([*parts, REQUEST])) if parts else None, log=log))
    return found


def asked_again(rollout: Rollout, more: str) -> list[Message]:
    """The prompt, with more text after its last message by the user."""
    messages = as_messages(rollout.row["prompt"])
    place = last_by_user(messages)
    last = {**messages[place], "content": messages[place]["content"] + more}
    return [*messages[:place], last, *messages[place + 1 :]]
