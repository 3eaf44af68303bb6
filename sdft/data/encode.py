"""Rows in, token ids out: lays out the student's and the teacher's prompts, and checks each against the model."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft.data.rows import WHERE, Row
from sdft.errors import UsageError, counted
from sdft.templates import Message, as_messages, teacher_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEMPLATE_SECONDS = 10  # a chat template takes microseconds; one that takes longer may never end


class Limits(NamedTuple):
    """What a model can read: how many positions, and how many tokens it has embeddings for; None is any number."""

    context: int | None = None
    tokens: int | None = None


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, where: str | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the model's answer: through the chat template where the tokenizer has one.

    `where` is what errors call the row that it is from.
    """
    return opening_ids(opening(prompt, tokenizer, where), tokenizer)


def opening(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, where: str | None = None) -> str:
    """The text that the model's answer follows."""
    if tokenizer.chat_template:
        return render(as_messages(prompt), tokenizer, add_generation_prompt=True, where=where)
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def opening_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the text that an answer follows.

    Without a chat template, which has its own, they begin with what the tokenizer puts before a text; what it puts
    after is never there.
    """
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template:
        return bare
    whole: list[int] = tokenizer(text)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    return whole if start is None else whole[: start + len(bare)]


def openings_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The same of many texts, on all cores where the tokenizer can."""
    if tokenizer.chat_template:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [opening_ids(text, tokenizer) for text in texts]


def _answer_ids(before: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer as the tokenizer has it after the text before it: some begin a text by itself with a space."""
    begin: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    if whole[: len(begin)] == begin:
        return whole[len(begin) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]  # a token reaches over the end of the prompt


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    where: str | None = None,
) -> str:
    """The text of a chat under the tokenizer's template."""
    where = where or f"the chat that ends with {messages[-1]['content'][-40:]!r}"
    try:
        with _time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TimeoutError as error:
        raise UsageError(
            f"{where}: the tokenizer's chat template has not ended after {TEMPLATE_SECONDS} seconds"
        ) from error
    except Exception as error:  # a template is code of the model's, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(f"{where}: the tokenizer's chat template refuses the messages ({roles}): {error}") from error
    return str(text)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer, where that can be had: in the main thread, while nothing else has an alarm."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def over(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def written(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The texts of a row's prompt, and of its demonstration as the model itself would have to write it after that."""
    demonstration = row["demonstration"]
    before = opening(row["prompt"], tokenizer, row[WHERE])
    if not tokenizer.chat_template:
        return before, text_of(demonstration)
    answer = [{"role": "assistant", "content": demonstration}] if isinstance(demonstration, str) else demonstration
    messages = [*as_messages(row["prompt"]), *answer]
    whole = render(messages, tokenizer, add_generation_prompt=False, where=row[WHERE])
    if not whole.startswith(before):
        raise UsageError(
            f"{row[WHERE]}: the tokenizer's chat template writes an answer that does not continue its own "
            "generation prompt, so that there is no sequence to train method 'sft' on"
        )
    return before, whole[len(before) :]


def encode_demonstration(
    before: str, text: str, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]
) -> list[int]:
    """Token ids of a demonstration that is written after a prompt, its end-of-turn token included."""
    ids = _answer_ids(before, text, tokenizer)
    last = max((position for position, token in enumerate(ids) if token in eos_ids), default=None)
    return [*ids, _end_token(tokenizer, eos_ids)] if last is None else ids[: last + 1]


def _end_token(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> int:
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    if not eos_ids:
        raise UsageError(
            "the tokenizer has no eos_token, nor has the model; there must be one to train on demonstrations, which "
            "end with it"
        )
    return min(eos_ids)


def encode_rows(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    with_demonstration: bool = False,
    with_draft: bool = False,
    template: list[Message],
    eos_ids: frozenset[int],
    max_completion_length: int,
    limits: Limits,
) -> list[Row]:
    """The rows with the token ids that training needs, each checked against what the model can read.

    `prompt_ids` always; `teacher_prompt_ids` for method "sdft"; `completion_ids`, the demonstration, for "sft" or where
    it is asked for; `draft_ids`, the demonstration's text alone, where it is asked for.
    """
    if not tokenizer.chat_template:
        logger.warning(
            "the tokenizer has no chat template: the model reads prompts as they are, with nothing around them"
        )
    encoded = []
    unseen, unlearned = (LeftOut(rows) for _ in range(2))
    for row in rows:
        ids = {"prompt_ids": encode_prompt(row["prompt"], tokenizer, row[WHERE])}
        room = 0 if method == "sft" else max_completion_length
        if method == "sft" or with_demonstration:
            before, text = written(row, tokenizer)
            unlearned.look(row, text)
            ids["completion_ids"] = encode_demonstration(before, text, tokenizer, eos_ids)
            room = max(room, len(ids["completion_ids"]))
        if with_draft:
            ids["draft_ids"] = tokenizer(text_of(row["demonstration"]), add_special_tokens=False)["input_ids"]
        check_ids(row, "prompt", ids["prompt_ids"], tokenizer, room, limits)
        if "completion_ids" in ids:
            check_ids(row, "demonstration", ids["completion_ids"], tokenizer, 0, limits)
        if method != "sft":
            text = opening(teacher_chat(row, template), tokenizer, row[WHERE])
            ids["teacher_prompt_ids"] = opening_ids(text, tokenizer)
            check_ids(row, "teacher prompt", ids["teacher_prompt_ids"], tokenizer, max_completion_length, limits)
            unseen.look(row, text)
        encoded.append(ids)
    unseen.warn(
        "the teacher does not see it (templates drop the thinking of earlier turns; another teacher_template than "
        "'turn' keeps it)"
    )
    unlearned.warn("it is not learned (templates drop thinking that they keep in another field of the message)")
    return encoded


class LeftOut:
    """The rows in whose text a chat template leaves out a part of the demonstration."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.places = rows, list[str]()

    def look(self, row: Row, text: str) -> None:
        # Templates may set what they keep apart in lines of its own.
        if "".join(text_of(row["demonstration"]).split()) not in "".join(text.split()):
            self.places.append(row[WHERE])

    def warn(self, consequence: str) -> None:
        if self.places:
            logger.warning(
                "the tokenizer's chat template leaves out a part of the demonstration in %d of %d rows, the first in "
                "%s: %s",
                len(self.places),
                len(self.rows),
                self.places[0],
                consequence,
            )


def teacher_chat(row: Row, template: list[Message]) -> list[Message]:
    """The chat that the teacher sees of a row. UsageError for what a template cannot show of it."""
    demonstration, last = row["demonstration"], as_messages(row["prompt"])[-1]
    shown = [last] if isinstance(demonstration, str) else [last, *demonstration]
    if other := sorted({name for message in shown for name, value in message.items() if value} - {"role", "content"}):
        raise UsageError(
            f"{row[WHERE]}: a message has {', '.join(other)}, which the teacher's prompt cannot show; messages of the "
            "demonstration, and the last of the prompt, must be a role and a content"
        )
    return teacher_messages(row["prompt"], text_of(demonstration), template)


def text_of(demonstration: str | list[Message]) -> str:
    """A demonstration's text, which may come as a message."""
    return demonstration if isinstance(demonstration, str) else demonstration[0]["content"]


def check_ids(
    row: Row, kind: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, room: int, limits: Limits
) -> None:
    """Refuse ids that the model has no embedding for, or that leave no room for a completion of `room` tokens."""
    if limits.tokens is not None and (largest := max(ids, default=0)) >= limits.tokens:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UsageError(
            f"{row[WHERE]}: the {kind} has the token {token!r}, number {largest}, and the model has embeddings for "
            f"{limits.tokens}; the tokenizer must be the model's own, or the model's embeddings resized to it "
            "(resize_token_embeddings)"
        )
    if limits.context is not None and len(ids) + room > limits.context:
        raise UsageError(
            f"{row[WHERE]}: the {kind} has {counted(len(ids), 'token')}, and with {room} more for the completion it is "
            f"longer than the model's context of {limits.context}"
        )
