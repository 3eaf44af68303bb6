"""Feedback in a step: the function is called, what it returns is checked, and becomes the teacher's token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from sdft.data import ROW, WHERE, Limits, Options, Row, check_ids, encode_prompt
from sdft.data.encode import Overlong
from sdft.data.rows import as_chat
from sdft.errors import TrainingError, UsageError, kind_of, shown
from sdft.feedback.find import bound, find_feedback, name_of
from sdft.feedback.interface import Feedback, FeedbackFunction, Rollout
from sdft.rollouts.interface import LENGTH, Completion
from sdft.settings.checks import check_not_below
from sdft.settings.config import SDFTConfig
from sdft.templates import Message, is_messages

logger = logging.getLogger(__name__)


class Taught(NamedTuple):
    """What is known of a rollout's teacher: its prompt, what the rollout counts (0: it is left out), text to log."""

    prompt: list[int] | None
    weight: float = 1.0
    log: str | None = None


@dataclass(frozen=True)
class FeedbackStage:
    """A function of feedback, by its name in errors, and how its chats become token ids that the teacher can read."""

    name: str
    function: FeedbackFunction
    tokenizer: PreTrainedTokenizerBase
    options: Options
    template: list[Message]
    limits: Limits
    overlong: str

    def __call__(self, asked: Sequence[tuple[Row, int]], completions: Sequence[Completion], step: int) -> list[Taught]:
        """What is known of each completion's teacher; `asked` has the row of each, one row's side by side."""
        rollouts, group = list[Rollout](), -1
        for number, ((row, _), completion) in enumerate(zip(asked, completions, strict=True)):
            group += number == 0 or row is not asked[number - 1][0]
            text = str(self.tokenizer.decode(completion.tokens, skip_special_tokens=True))
            rollouts.append(Rollout(row[ROW], text, completion.end != LENGTH, group, step, self.template))
        try:
            found = self.function(rollouts)
        except (UsageError, TrainingError):
            raise
        except Exception as error:  # it is a user's code
            raise TrainingError(
                f"feedback {self.name} failed at step {step}: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, Sequence) or len(found) != len(rollouts):
            got = f"{len(found)}" if isinstance(found, Sequence) else f"a {type(found).__name__}"
            raise UsageError(
                f"feedback {self.name} returned {got} for {len(rollouts)} rollouts; it must be one for each"
            )
        each = list[Taught]()
        for number, (rollout, one, completion) in enumerate(zip(rollouts, found, completions, strict=True)):
            where = f"feedback {self.name}, rollout {number + 1} ({rollout.where})"
            each.append(self._taught(where, one, len(completion.tokens)))
        return each

    def _taught(self, where: str, one: Any, tokens: int) -> Taught:
        if not isinstance(one, Feedback):
            raise UsageError(f"{where}: it is a {type(one).__name__}; it must be a Feedback")
        check_not_below(f"{where}: weight", one.weight, 0)
        if not isinstance(one.log, str):
            raise UsageError(f"{where}: log is {kind_of(one.log)}; it must be text")
        chat = one.messages
        if chat is None or one.weight == 0:
            return Taught(None, 0.0, one.log)
        if not (isinstance(chat, str) and chat.strip()) and not is_messages(chat):
            raise UsageError(
                f"{where}: messages is {shown(chat)}; it must be None, a text, or a list of messages, each with a role "
                "and a content"
            )
        chat = as_chat(chat, "messages", where)
        try:
            ids = encode_prompt(chat, self.tokenizer, where, options=self.options)
            check_ids({WHERE: where}, "teacher prompt", ids, self.tokenizer, tokens, self.limits)
        except Overlong as error:
            if self.overlong == "error":
                raise UsageError(f"{error} (with overlong: skip it would be left out)") from error
            return Taught(None, 0.0, f"{one.log} (left out: the teacher's prompt is too long)".strip())
        return Taught(ids, float(one.weight), one.log)


def stage_of(
    given: Callable[..., Any] | None, args: SDFTConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> FeedbackStage | None:
    """The stage of the function that the trainer is `given`, or that `args` name; None where there is none.

    `limits` are the teacher's. UsageError where it cannot be called.
    """
    if given is not None and args.feedback is not None:
        raise UsageError(f"feedback is given, and is {args.feedback!r} in args too; it must be set in one of the two")
    if given is not None and not callable(given):
        raise UsageError(f"feedback is {kind_of(given)}; it must be a function of rollouts")
    if args.method != "sdft":
        return None
    function = find_feedback(args)
    if given is not None:
        args.feedback = name_of(given)
        function = bound(args.feedback, given, args.feedback_args or {})
    if function is None:
        return None
    options, template = args.teacher_options, args.template
    return FeedbackStage(str(args.feedback), function, tokenizer, options, template, limits, args.overlong)
