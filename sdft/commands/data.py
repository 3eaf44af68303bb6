"""`sdft data`: what would be trained on, before a model is loaded."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdft.data import (
    COLUMNS,
    WHERE,
    Row,
    check_ids,
    check_options,
    openings_ids,
    student_text,
    teacher_chat,
    teacher_text,
)
from sdft.data.encode import Overlong, Shown, learned_ids
from sdft.errors import UsageError, counted
from sdft.rows import learns_demonstrations
from sdft.settings.commands import DataCommand
from sdft.templates import Message, as_messages, text_of

if TYPE_CHECKING:
    from sdft.models.tokenizer import Reader

BARS = "▁▂▃▄▅▆▇█"
BINS = 32
MOST_SHOWN = 4000  # characters of a text
#: What a demonstration of several turns is to training.
SEVERAL = "the teacher sees them all"
LEARNED = "cross-entropy counts the assistant's"
#: What becomes of rows that are too long, by `overlong`.
BECOME = {"error": "refused", "skip": "left out", "truncate_prompt_left": "shortened, or refused"}


def show(rows: Sequence[Row], command: DataCommand) -> None:
    """Print the first rows as student and teacher read them, how long all are, and which do not fit."""
    reader = None
    if command.model:
        from sdft.models.tokenizer import load_tokenizer

        reader = load_tokenizer(command.model, trust_remote_code=command.trust_remote_code)
        check_options(
            reader.tokenizer,
            chat_template_kwargs=command.chat_template_kwargs,
            teacher_chat_template_kwargs=command.teacher_chat_template_kwargs,
        )
    template = command.template
    unused = sorted({name for row in rows for name in row} - {*COLUMNS, WHERE})
    print(counted(len(rows), "row") + (f"; columns that are not used: {', '.join(unused)}" if unused else ""))
    if several := sum(isinstance(row.get("demonstration"), list) and len(row["demonstration"]) > 1 for row in rows):
        said = [SEVERAL] * (command.method == "sdft") + [LEARNED] * learns_demonstrations(command)
        print(f"{counted(several, 'demonstration')} of several turns: {', and '.join(said)}")
    of_file = Counter(map(_file_of, rows))
    if len(of_file) > 1:
        print(*(f"{counted(count, 'row')} of {name}" for name, count in of_file.items()), sep="\n")
    texts = Texts(reader, template, command)
    for row in _first_of_each(rows, of_file, command.rows):
        print(*_as_read(row, texts), sep="\n")
    print("", *(_characters(rows, texts) if reader is None else _tokens(rows, texts, reader)), sep="\n")


def _first_of_each(rows: Sequence[Row], of_file: Mapping[str, int], count: int) -> list[Row]:
    """So many rows from the beginning; of several files some of each, as far as that goes."""
    each, more = divmod(count, len(of_file))
    left, found = {name: each + (number < more) for number, name in enumerate(of_file)}, list[Row]()
    for row in rows:
        if left[name := _file_of(row)]:
            left[name] -= 1
            found.append(row)
    return found


def _file_of(row: Row) -> str:
    return str(row[WHERE]).rpartition(", row ")[0]


class Texts:
    """What student and teacher read of a row, with the chat template's special tokens.

    Without a model it is each message by its role.
    """

    def __init__(self, reader: Reader | None, template: list[Message], command: DataCommand) -> None:
        self.tokenizer = reader.tokenizer if reader else None
        self.eos_ids = reader.eos_ids if reader else frozenset[int]()
        self.template, self.command = template, command

    def student(self, row: Row) -> str:
        if self.tokenizer is None:
            names = [str(tool["function"].get("name")) for tool in row.get("tools") or () if "function" in tool]
            return (f"[tools] {', '.join(names)}\n" if names else "") + _by_roles(row["prompt"])
        return student_text(row, self.tokenizer, self.command.chat_template_kwargs)

    def teacher(self, row: Row) -> str:
        if self.command.feedback is not None:
            return f"(made by feedback {self.command.feedback}, once the student has answered)"
        if self.tokenizer is None:
            return _by_roles(teacher_chat(row, self.template))
        return teacher_text(row, self.template, self.tokenizer, self.command.teacher_options)

    def demonstration(self, row: Row) -> str:
        return text_of(row["demonstration"]) if row.get("demonstration") is not None else ""

    def learned(self, row: Row) -> str | None:
        """The tokens that cross-entropy counts; None where there are none, or none that the template could write."""
        if self.tokenizer is None or not learns_demonstrations(self.command):
            return None
        try:
            ids, _ = learned_ids(row, self.tokenizer, self.eos_ids, self.command.chat_template_kwargs)
        except UsageError:  # which is said of all such rows together
            return None
        places = ids.get("learned", range(len(ids["completion_ids"])))
        return str(self.tokenizer.decode([ids["completion_ids"][place] for place in places]))


def _by_roles(prompt: str | list[Message]) -> str:
    return "\n".join(f"[{message['role']}] {text_of([message])}" for message in as_messages(prompt))


def _as_read(row: Row, texts: Texts) -> list[str]:
    lines = ["", f"── {row[WHERE]}, as the student reads it", _cut(texts.student(row))]
    if texts.command.method == "sdft":
        lines += ["", f"── {row[WHERE]}, as the teacher reads it", _cut(texts.teacher(row))]
    learned = texts.learned(row)
    if learned is not None:
        return [*lines, "", f"── {row[WHERE]}, what is learned of its demonstration", _cut(learned)]
    return [*lines, "", f"── {row[WHERE]}, its demonstration", _cut(texts.demonstration(row))]


def _cut(text: str) -> str:
    """The text with what a screen cannot hold left out of its middle."""
    left_out = len(text) - MOST_SHOWN
    return (
        text if left_out <= 0 else f"{text[: MOST_SHOWN // 2]}[... {left_out} characters ...]{text[-MOST_SHOWN // 2 :]}"
    )


HEAD = f"{'':16}{'least':>7}{'median':>8}{'95 %':>7}{'most':>7}"


def _openings(rows: Sequence[Row], of: Texts) -> dict[str, list[str]]:
    """The texts that answers follow, by whose they are."""
    texts = {"prompt": [of.student(row) for row in rows]}
    return texts | ({"teacher prompt": [of.teacher(row) for row in rows]} if of.command.shows_teacher else {})


def _characters(rows: Sequence[Row], of: Texts) -> list[str]:
    texts = _openings(rows, of) | {"demonstration": [of.demonstration(row) for row in rows]}
    lines = [_row_of(name, [len(each) for each in of_kind]) for name, of_kind in texts.items()]
    return ["length in characters; with --model in its tokens", HEAD, *lines]


def _tokens(rows: Sequence[Row], of: Texts, reader: Reader) -> list[str]:
    tokenizer, limits, eos_ids = reader
    command, texts = of.command, _openings(rows, of)
    ids = {name: openings_ids(texts[name], tokenizer) for name in texts}
    bare = tokenizer([of.demonstration(row) for row in rows], add_special_tokens=False)["input_ids"]
    lengths = {name: [len(each) for each in of_kind] for name, of_kind in (*ids.items(), ("demonstration", bare))}
    room = command.max_completion_length if command.method == "sdft" else 0
    unfit, shown = dict[str, list[str]](), Shown(len(rows))
    for number, row in enumerate(rows):
        seen = {"student": texts["prompt"][number]}
        if command.shows_teacher:
            seen["teacher"] = texts["teacher prompt"][number]
        try:
            learned: list[int] = []
            if learns_demonstrations(command):
                of_demonstration, seen["learned"] = learned_ids(row, tokenizer, eos_ids, command.chat_template_kwargs)
                learned = of_demonstration["completion_ids"]
                lengths["demonstration"][number] = len(learned)
            check_ids(row, "prompt", ids["prompt"][number], tokenizer, max(room, len(learned)), limits)
            check_ids(row, "demonstration", learned, tokenizer, 0, limits)
            if command.shows_teacher:
                check_ids(row, "teacher prompt", ids["teacher prompt"][number], tokenizer, room, limits)
        except UsageError as error:
            becomes = BECOME[command.overlong if isinstance(error, Overlong) else "error"]
            unfit.setdefault(becomes, []).append(str(error))
        shown.look(row, seen)
    shown.warn()
    lines = ["length in tokens", HEAD, *(_row_of(name, of_kind) for name, of_kind in lengths.items())]
    if room and (longer := sum(length > room for length in lengths["demonstration"])):
        lines += ["", f"{longer} of {counted(len(rows), 'demonstration')} longer than max_completion_length, {room}"]
    for becomes, why in unfit.items():
        more = [f"and {len(why) - 3} more"] if len(why) > 3 else []
        lines += ["", f"{counted(len(why), 'row')} would be {becomes}:", *why[:3], *more]
    if unfit:
        return lines
    needs = [f"{room} for the completion"] * (room > 0) + ["the demonstration"] * learns_demonstrations(command)
    context = f" of {limits.context} tokens, with {' or '.join(needs)}" if limits.context else ""
    return [*lines, "", f"all rows fit the model's context{context}"]


def _row_of(name: str, lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    most, high = ordered[-1], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    counts = [0] * BINS
    for length in ordered:
        counts[min(BINS - 1, length * BINS // (most + 1))] += 1
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] if count else " " for count in counts)
    return f"{name:16}{ordered[0]:7}{statistics.median(ordered):8.0f}{high:7}{most:7}  0 {bars} {most}"
