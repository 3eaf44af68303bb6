"""Rows in, token ids out: lays out the student's and the teacher's prompts, and checks each against the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tqdm import tqdm

from sdft.data.chats import SPLIT, Options, can_be_shown, opening, student_text, teacher_text, written
from sdft.data.rows import ROW, WHERE, Row
from sdft.data.storage import Keep
from sdft.errors import UsageError, counted
from sdft.templates import Message, as_messages, first_turn, last_by_user, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BAR_AFTER = 3  # seconds


class Limits(NamedTuple):
    """What a model can read: how many positions, and how many tokens it has embeddings for; None is any number."""

    context: int | None = None
    tokens: int | None = None


class TeacherReads(NamedTuple):
    """Of a teacher that is another model: its tokenizer, where that is known, and what it can read."""

    tokenizer: PreTrainedTokenizerBase | None
    limits: Limits

    def check(self, row: Row, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """UsageError where the teacher's tokenizer makes other tokens of a row's text than the student's."""
        if self.tokenizer is None:
            return
        own, its = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, self.tokenizer))
        if own == its:
            return
        place = next((n for n, (a, b) in enumerate(zip(own, its, strict=False)) if a != b), min(len(own), len(its)))
        first, other = (
            f"{by.convert_ids_to_tokens(ids[place])!r} ({ids[place]})" if place < len(ids) else "nothing"
            for by, ids in ((tokenizer, own), (self.tokenizer, its))
        )
        raise UsageError(
            f"{row[WHERE]}: token {place + 1} is {first} for the model and {other} for teacher_model; they must have "
            "the same tokenizer"
        )


class Overlong(UsageError):
    """A row that is too long for the model, and by how many tokens it is."""

    def __init__(self, message: str, over: int) -> None:
        super().__init__(message)
        self.over = over


def encode_prompt(
    prompt: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str | None = None,
    *,
    tools: list[dict[str, Any]] | None = None,
    options: Options = None,
) -> list[int]:
    """Token ids of a prompt, ready for the model's answer: through the chat template where the tokenizer has one.

    `where` is what errors call the row that it is from.
    """
    return opening_ids(opening(prompt, tokenizer, where, tools=tools, options=options), tokenizer)


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


def _last_turn_ids(before: str, text: str, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> list[int]:
    """Token ids of a turn that ends a text, up to its end-of-turn token, which it gets where it has none."""
    ids = _answer_ids(before, text, tokenizer)
    last = max((position for position, token in enumerate(ids) if token in eos_ids), default=None)
    return [*ids, _end_token(tokenizer, eos_ids)] if last is None else ids[: last + 1]


def encode_demonstration(
    before: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a demonstration, of the texts that `written` gives, and the places of those that the model writes.

    A turn goes up to its end-of-turn token, which in some chat templates begins what follows. What they put after that
    is read, as is what is between turns.
    """
    ids, learned = list[int](), list[int]()
    for turn, between in zip(texts[:-1:2], texts[1::2], strict=True):
        own = _answer_ids(before, turn, tokenizer)
        others = _answer_ids(turn, between, tokenizer)  # whose tokens depend on no more than the text before them
        length = max((place for place, token in enumerate(own, 1) if token in eos_ids), default=0)
        if not length and others and others[0] in eos_ids:
            length = len(own) + 1
        if not length:
            ends = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(eos_ids))))
            raise UsageError(
                f"{where}: the tokenizer's chat template ends a turn of the demonstration without an end-of-turn token "
                f"({ends}), from which the model would learn where to stop; {SPLIT}"
            )
        _check_written(turn, own[:length], eos_ids, f"{where}: the tokenizer's chat template writes nothing of a turn")
        learned += range(len(ids), len(ids) + length)
        ids += own + others
        before = between
    last = _last_turn_ids(before, texts[-1], tokenizer, eos_ids)
    _check_written(texts[-1], last, eos_ids, f"{where}: the tokenizer's chat template writes nothing")
    return [*ids, *last], [*learned, *range(len(ids), len(ids) + len(last))]


def learned_ids(
    row: Row, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], options: Options = None
) -> tuple[Row, str]:
    """Of a row's demonstration, for cross-entropy: `completion_ids`, where it has several turns the places of those
    that are `learned`, and the text of these.
    """
    before, turns = written(row, tokenizer, options)
    ids, learned = encode_demonstration(before, turns, tokenizer, eos_ids, row[WHERE])
    found: Row = {"completion_ids": ids} | ({"learned": learned} if len(turns) > 1 else {})
    return found, "".join(turns[::2])


def _check_written(text: str, ids: list[int], eos_ids: frozenset[int], says_nothing: str) -> None:
    if not text.strip() or set(ids) <= eos_ids:
        raise UsageError(f"{says_nothing} of the demonstration, so that there is nothing to learn from it")


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
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    with_demonstration: bool = False,
    with_draft: bool = False,
    template: list[Message],
    eos_ids: frozenset[int],
    max_completion_length: int,
    limits: Limits,
    options: Options = None,
    teacher_options: Options = None,
    overlong: str = "error",
    teacher: TeacherReads | None = None,
    feedback: bool = False,
    keep: Keep = list,
    silent: bool = True,
) -> Sequence[Row]:
    """The rows with the token ids that training needs, each checked against what the model can read.

    `prompt_ids` always; `teacher_prompt_ids` for method "sdft"; `completion_ids`, the demonstration, for "sft" or where
    it is asked for, with the places of its tokens that are learned (`learned`) where it has several turns;
    `draft_ids`, the text alone of its first turn, where it is asked for. `overlong` says what becomes of
    a row that is too long for the model: an error, or it is left out ("skip"), or the last message of its prompt by the
    user loses its beginning ("truncate_prompt_left"). `teacher` says what a teacher reads that is another model, which
    must be the same tokens. With `feedback` each keeps its row (`ROW`), and a teacher's prompt may be missing. `keep`
    says where the rows are kept; a bar shows how far they are, after some seconds and unless `silent`.
    """
    reads = teacher or TeacherReads(None, limits)
    if not tokenizer.chat_template:
        logger.warning(
            "the tokenizer has no chat template: the model reads prompts as they are, with nothing around them"
        )
    shown, too_long = Shown(len(rows)), Places()

    def encode(row: Row) -> Encoded:
        texts = {"student": student_text(row, tokenizer, options)}
        ids: Row = {"prompt_ids": opening_ids(texts["student"], tokenizer)}
        room = 0 if method == "sft" else max_completion_length
        if method == "sft" or with_demonstration:
            of_demonstration, texts["learned"] = learned_ids(row, tokenizer, eos_ids, options)
            ids |= of_demonstration
            room = max(room, len(ids["completion_ids"]))
        if with_draft:
            draft = text_of(first_turn(row["demonstration"])) if row.get("demonstration") else ""
            ids["draft_ids"] = tokenizer(draft, add_special_tokens=False)["input_ids"]
        check_ids(row, "prompt", ids["prompt_ids"], tokenizer, room, limits)
        if "completion_ids" in ids:
            check_ids(row, "demonstration", ids["completion_ids"], tokenizer, 0, limits)
        if feedback:
            ids[ROW] = row
        if method != "sft" and (not feedback or can_be_shown(row, template)):
            texts["teacher"] = teacher_text(row, template, tokenizer, teacher_options)
            ids["teacher_prompt_ids"] = opening_ids(texts["teacher"], tokenizer)
            check_ids(row, "teacher prompt", ids["teacher_prompt_ids"], tokenizer, max_completion_length, reads.limits)
        if method != "sft":
            for text in (*dict.fromkeys(texts.values()), text_of(row.get("demonstration") or "")):
                reads.check(row, text, tokenizer)
        return ids, texts

    def all_that_fit() -> Iterator[Row]:
        for row in tqdm(rows, desc="rows read", unit="row", delay=BAR_AFTER, disable=silent, leave=False):
            try:
                ids, texts = encode(row)
            except Overlong as error:
                if overlong == "error":
                    raise
                too_long.add(row[WHERE])
                if overlong == "skip":
                    continue
                ids, texts = _shortened(row, error, encode, tokenizer)
            shown.look(row, texts)
            yield ids

    encoded = keep(all_that_fit())
    if too_long.count:
        done = "are left out" if overlong == "skip" else "lose the beginning of their prompt"
        of = (too_long.count, len(rows), done, too_long.first)
        logger.warning("%d of %d rows are too long for the model and %s, the first %s", *of)
    if not encoded:
        raise UsageError(
            f"overlong is {overlong!r}, and none of {counted(len(rows), 'row')} is short enough for the model"
        )
    shown.warn()
    return encoded


#: A row's token ids, and the texts that they are of, by whose they are: "student", "teacher" and "learned".
Encoded = tuple[Row, dict[str, str]]


def _shortened(
    row: Row, error: Overlong, encode: Callable[[Row], Encoded], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """The row's ids, once the last message of its prompt by the user has lost as many tokens as it takes."""
    first, messages = error, as_messages(row["prompt"])
    place = last_by_user(messages)
    kept: list[int] = tokenizer(messages[place]["content"], add_special_tokens=False)["input_ids"]
    while True:
        kept = kept[max(error.over // 2, 1) :]  # a teacher may see the prompt twice, and then loses it twice
        if not kept or row.get("teacher_prompt") is not None:
            raise UsageError(f"{first}; to shorten its prompt is not enough, and overlong may be skip") from error
        content = str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        shorter = [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]
        try:
            return encode({**row, "prompt": shorter})
        except Overlong as still:
            error = still


@dataclass
class Places:
    """How many rows something is so in, and the first of them: all of them could be more than memory holds."""

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        self.first, self.count = self.first or where, self.count + 1


class Shown:
    """Finds out, and says once, what the chat template leaves out of rows: templates may drop what they do not know."""

    #: Whose text lacks what, and what follows from that.
    LACKS: ClassVar = {
        "student": ("tools, or calls of them,", "the model does not know of them"),
        "teacher": (
            "a part of the demonstration",
            "the teacher does not see it (templates drop the thinking of earlier turns; another teacher_template than "
            "'turn' keeps it)",
        ),
        "learned": (
            "a part of the demonstration",
            "it is not learned (templates drop thinking that they keep in another field of the message)",
        ),
    }

    def __init__(self, count: int) -> None:
        self.count, self.places = count, {whose: Places() for whose in self.LACKS}

    def look(self, row: Row, texts: Mapping[str, str]) -> None:
        """Look for what each of these texts of a row should have; templates may set what they keep in its own lines."""
        for whose, text in texts.items():
            bare = "".join(text.split())
            if not all(_is_in(bare, part) for part in _parts(row, whose)):
                self.places[whose].add(row[WHERE])

    def warn(self) -> None:
        for whose, (what, consequence) in self.LACKS.items():
            places = self.places[whose]
            if places.count:
                logger.warning(
                    "the tokenizer's chat template leaves out %s in %d of %d rows, the first in %s: %s",
                    what,
                    places.count,
                    self.count,
                    places.first,
                    consequence,
                )


def _is_in(bare: str, part: str) -> bool:
    """Whether a text without its spaces has a part, as it is or as JSON, which templates make of tools' results."""
    return any("".join(each.split()) in bare for each in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _parts(row: Row, whose: str) -> list[str]:
    """What every template has to show in such a text: a demonstration's own, and the names of tools."""
    if whose == "student":
        tools = [str(tool.get("function", tool).get("name", "")) for tool in row.get("tools") or ()]
        return [*tools, *_called(as_messages(row["prompt"]))]
    demonstration = row.get("demonstration")
    if demonstration is None or (whose == "teacher" and row.get("teacher_prompt") is not None):
        return []
    if isinstance(demonstration, str):
        return [demonstration]
    seen = [m for m in demonstration if m["role"] == "assistant" or whose == "teacher"]
    return [*(message["content"] for message in seen), *_called(seen)]


def _called(messages: list[Message]) -> list[str]:
    """The names of the tools that messages call."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return [str(call.get("function", call).get("name", "")) for call in calls]


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
        raise Overlong(
            f"{row[WHERE]}: the {kind} has {counted(len(ids), 'token')}, and with {room} more for the completion it is "
            f"longer than the model's context of {limits.context}",
            len(ids) + room - limits.context,
        )
