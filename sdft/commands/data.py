"""`sdft data`: what would be trained on, before a model is loaded."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdft.data import (
    COLUMNS,
    WHERE,
    Limits,
    Row,
    check_ids,
    check_options,
    openings_ids,
    student_text,
    teacher_chat,
    teacher_text,
)
from sdft.data.encode import Shown
from sdft.errors import UsageError, counted
from sdft.settings.commands import DataCommand
from sdft.templates import Message, as_messages, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = "▁▂▃▄▅▆▇█"
BINS = 32
MOST_SHOWN = 4000  # characters of a text
#: What a demonstration of several turns is to training.
SEVERAL = {"sdft": "the teacher sees them all", "sft": "cross-entropy counts the assistant's"}
#: What becomes of rows that are too long, by `overlong`.
BECOME = {"error": "refused", "skip": "left out", "truncate_prompt_left": "shortened, or refused"}


def show(rows: Sequence[Row], command: DataCommand) -> None:
    """Print the first rows as student and teacher read them, how long all are, and which do not fit."""
    tokenizer, limits = None, Limits()
    if command.model:
        from sdft.models.tokenizer import load_tokenizer

        tokenizer, limits = load_tokenizer(command.model, trust_remote_code=command.trust_remote_code)
        check_options(
            tokenizer,
            chat_template_kwargs=command.chat_template_kwargs,
            teacher_chat_template_kwargs=command.teacher_chat_template_kwargs,
        )
    template = command.template
    unused = sorted({name for row in rows for name in row} - {*COLUMNS, WHERE})
    print(counted(len(rows), "row") + (f"; columns that are not used: {', '.join(unused)}" if unused else ""))
    if several := sum(isinstance(row.get("demonstration"), list) and len(row["demonstration"]) > 1 for row in rows):
        print(f"{counted(several, 'demonstration')} of several turns: {SEVERAL[command.method]}")
    texts = Texts(tokenizer, template, command)
    for row in rows[: command.rows]:
        print(*_as_read(row, texts), sep="\n")
    print("", *_lengths(rows, texts, limits), sep="\n")


class Texts:
    """What student and teacher read of a row, with the chat template's special tokens.

    Without a tokenizer it is each message by its role.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, template: list[Message], command: DataCommand
    ) -> None:
        self.tokenizer, self.template, self.command = tokenizer, template, command

    def student(self, row: Row) -> str:
        if self.tokenizer is None:
            return _by_roles(row["prompt"])
        return student_text(row, self.tokenizer, self.command.chat_template_kwargs)

    def teacher(self, row: Row) -> str:
        if self.command.feedback is not None:
            return f"(made by feedback {self.command.feedback}, once the student has answered)"
        if self.tokenizer is None:
            return _by_roles(teacher_chat(row, self.template))
        return teacher_text(row, self.template, self.tokenizer, self.command.teacher_options)

    def demonstration(self, row: Row) -> str:
        return text_of(row["demonstration"]) if row.get("demonstration") is not None else ""


def _by_roles(prompt: str | list[Message]) -> str:
    return "\n".join(f"[{message['role']}] {text_of([message])}" for message in as_messages(prompt))


def _as_read(row: Row, texts: Texts) -> list[str]:
    lines = ["", f"── {row[WHERE]}, as the student reads it", _cut(texts.student(row))]
    if texts.command.method == "sdft":
        lines += ["", f"── {row[WHERE]}, as the teacher reads it", _cut(texts.teacher(row))]
    return [*lines, "", f"── {row[WHERE]}, its demonstration", _cut(texts.demonstration(row))]


def _cut(text: str) -> str:
    """The text with what a screen cannot hold left out of its middle."""
    left_out = len(text) - MOST_SHOWN
    return (
        text if left_out <= 0 else f"{text[: MOST_SHOWN // 2]}[... {left_out} characters ...]{text[-MOST_SHOWN // 2 :]}"
    )


def _lengths(rows: Sequence[Row], of: Texts, limits: Limits) -> list[str]:
    tokenizer, command = of.tokenizer, of.command
    texts = {"prompt": [of.student(row) for row in rows]}
    if command.shows_teacher:
        texts["teacher prompt"] = [of.teacher(row) for row in rows]
    openings = list(texts)
    texts["demonstration"] = [of.demonstration(row) for row in rows]
    head = f"{'':16}{'least':>7}{'median':>8}{'95 %':>7}{'most':>7}"
    if tokenizer is None:
        lines = [_row_of(name, [len(each) for each in of_kind]) for name, of_kind in texts.items()]
        return ["length in characters; with --model in its tokens", head, *lines]
    ids = {name: openings_ids(texts[name], tokenizer) for name in openings}
    ids["demonstration"] = tokenizer(texts["demonstration"], add_special_tokens=False)["input_ids"]
    lines = ["length in tokens", head]
    lines += [_row_of(name, [len(each) for each in of_kind]) for name, of_kind in ids.items()]
    room = command.max_completion_length if command.method == "sdft" else 0
    longer = sum(len(each) > room for each in ids["demonstration"])
    if longer and room:
        lines += ["", f"{longer} of {counted(len(rows), 'demonstration')} longer than max_completion_length, {room}"]
    refused, shown = list[str](), Shown(len(rows))
    for number, row in enumerate(rows):
        seen = {"student": texts["prompt"][number]}
        if command.shows_teacher:
            seen["teacher"] = texts["teacher prompt"][number]
        shown.look(row, seen)
        learned = 1 + len(ids["demonstration"][number]) if command.learns_demonstrations else 0  # and its end token
        try:
            for kind in openings:
                check_ids(row, kind, ids[kind][number], tokenizer, max(room, learned * (kind == "prompt")), limits)
        except UsageError as error:
            refused.append(str(error))
    shown.warn()
    if refused:
        more = [f"and {len(refused) - 3} more"] if len(refused) > 3 else []
        said = f"{counted(len(refused), 'row')} would be {BECOME[command.overlong]}:"
        return [*lines, "", said, *refused[:3], *more]
    needs = f"{room} for the completion" if room else "the demonstration"
    context = f" of {limits.context} tokens, with {needs}" if limits.context else ""
    return [*lines, "", f"all rows fit the model's context{context}"]


def _row_of(name: str, lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    most, high = ordered[-1], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    counts = [0] * BINS
    for length in ordered:
        counts[min(BINS - 1, length * BINS // (most + 1))] += 1
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] if count else " " for count in counts)
    return f"{name:16}{ordered[0]:7}{statistics.median(ordered):8.0f}{high:7}{most:7}  0 {bars} {most}"
