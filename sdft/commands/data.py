"""`sdft data`: what would be trained on, before a model is loaded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sdft.data import COLUMNS, WHERE, Limits, Row, check_ids, opening, openings_ids, teacher_chat
from sdft.data.encode import text_of
from sdft.errors import UsageError, counted
from sdft.settings.commands import DataCommand
from sdft.templates import Message, as_messages, parse_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARS = "▁▂▃▄▅▆▇█"
BINS = 32


def show(rows: list[Row], command: DataCommand) -> None:
    """Print the first rows as student and teacher read them, how long all are, and which do not fit."""
    tokenizer, limits = None, Limits()
    if command.model:
        from sdft.models.tokenizer import load_tokenizer

        tokenizer, limits = load_tokenizer(command.model, trust_remote_code=command.trust_remote_code)
    template = parse_template(command.teacher_template)
    unused = sorted({name for row in rows for name in row} - {*COLUMNS, WHERE})
    print(counted(len(rows), "row") + (f"; columns that are not used: {', '.join(unused)}" if unused else ""))
    for row in rows[: command.rows]:
        print(*_as_read(row, template, tokenizer), sep="\n")
    print("", *_lengths(rows, template, tokenizer, limits, command.max_completion_length), sep="\n")


def _as_read(row: Row, template: list[Message], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    where, text = row[WHERE], _text_by(tokenizer)
    return [
        *("", f"── {where}, as the student reads it", text(row["prompt"], where)),
        *("", f"── {where}, as the teacher reads it", text(teacher_chat(row, template), where)),
        *("", f"── {where}, its demonstration", text_of(row["demonstration"])),
    ]


def _text_by(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Any, str], str]:
    """The text of a prompt with the chat template's special tokens; without a tokenizer, each message by its role."""
    if tokenizer is not None:
        return lambda prompt, where: opening(prompt, tokenizer, where)
    return lambda prompt, _: "\n".join(f"[{message['role']}] {message['content']}" for message in as_messages(prompt))


def _lengths(
    rows: list[Row],
    template: list[Message],
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    room: int,
) -> list[str]:
    text = _text_by(tokenizer)
    texts = {
        "prompt": [text(row["prompt"], row[WHERE]) for row in rows],
        "teacher prompt": [text(teacher_chat(row, template), row[WHERE]) for row in rows],
        "demonstration": [text_of(row["demonstration"]) for row in rows],
    }
    head = f"{'':16}{'least':>7}{'median':>8}{'95 %':>7}{'most':>7}"
    if tokenizer is None:
        lines = [_row_of(name, [len(each) for each in of_kind]) for name, of_kind in texts.items()]
        return ["length in characters; with --model in its tokens", head, *lines]
    ids = {name: openings_ids(of_kind, tokenizer) for name, of_kind in texts.items() if name != "demonstration"}
    ids["demonstration"] = tokenizer(texts["demonstration"], add_special_tokens=False)["input_ids"]
    lines = ["length in tokens", head]
    lines += [_row_of(name, [len(each) for each in of_kind]) for name, of_kind in ids.items()]
    if longer := sum(len(each) > room for each in ids["demonstration"]):
        lines += ["", f"{longer} of {counted(len(rows), 'demonstration')} longer than max_completion_length, {room}"]
    refused: list[str] = []
    for number, row in enumerate(rows):
        try:
            for kind in ("prompt", "teacher prompt"):
                check_ids(row, kind, ids[kind][number], tokenizer, room, limits)
        except UsageError as error:
            refused.append(str(error))
    if refused:
        more = [f"and {len(refused) - 3} more"] if len(refused) > 3 else []
        return [*lines, "", f"{counted(len(refused), 'row')} would be refused:", *refused[:3], *more]
    context = f" of {limits.context} tokens, with {room} for the completion" if limits.context else ""
    return [*lines, "", f"all rows fit the model's context{context}"]


def _row_of(name: str, lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    most, high = ordered[-1], ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    counts = [0] * BINS
    for length in ordered:
        counts[min(BINS - 1, length * BINS // (most + 1))] += 1
    bars = "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] if count else " " for count in counts)
    return f"{name:16}{ordered[0]:7}{statistics.median(ordered):8.0f}{high:7}{most:7}  0 {bars} {most}"
