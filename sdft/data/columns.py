"""Which of a source's columns are the prompt, the demonstration and the answer.

`columns` says it. Without, a source that has no column by one of our names is looked at for names that others use.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdft.data.files import parse
from sdft.data.tools import as_calls
from sdft.errors import UsageError, shown
from sdft.templates import text_of

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "demonstration", "answer", "teacher_prompt", "tools")
#: Columns beside those of a convention that go before the prompt: LLaMA-Factory's, OpenOrca's.
CONTEXT = ("system", "system_prompt", "history")
#: Roles of ShareGPT's turns, by what chat templates call them.
SHARE_GPT = {
    **{"human": "user", "user": "user", "system": "system"},
    **dict.fromkeys(("gpt", "chatgpt", "model", "assistant"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
}
CALLS = ("function_call", "tool_call")  # turns that call tools: as their text, the call's JSON or a list of several


@dataclass(frozen=True)
class Convention:
    """Columns that others use, and the prompt and the good answer that they make of a row."""

    columns: tuple[str, ...]
    said: str
    read: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    #: Of rows whose answer is scored, where that is read in another way.
    exam: Callable[[Mapping[str, Any]], tuple[Any, Any]] | None = None
    also: tuple[str, ...] = ()  # columns that it reads where they are there


def _pair(prompt: str, answer: str) -> Convention:
    said = f"prompt is {prompt!r}, and demonstration {answer!r}"
    return Convention((prompt, answer), said, lambda row: (row[prompt], row[answer]))


def _of_instruction(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Alpaca's: what the instruction is about may stand in a column of its own."""
    instruction, about = row["instruction"], row.get("input")
    return (f"{instruction}\n\n{about}" if about else instruction), row["output"]


def _in_context(prompt: Any, row: Mapping[str, Any]) -> Any:
    """The prompt after a system message and earlier turns, where columns of their own have them.

    Earlier turns are pairs of what was asked and answered, or a text that is that in JSON.
    """
    there = {name: value for column, value in row.items() if (name := str(column).lower()) in CONTEXT and value}
    system, history = there.get("system") or there.get("system_prompt"), there.get("history") or []
    if isinstance(history, str):
        history = parse(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise UsageError(f"history is {shown(history)}; it must be a list of pairs, of what was asked and answered")
    if not system and not history:
        return prompt
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if system and messages and messages[0].get("role") == "system":
        raise UsageError("it begins with a message by 'system', and there is a column with one too")
    before = [{"role": "system", "content": system}] if system else []
    for pair in history:
        before += [{"role": by, "content": text} for by, text in zip(("user", "assistant"), pair, strict=True)]
    return [*before, *messages]


def as_text(value: Any) -> Any:
    """A number as its text, a whole one without a fraction; anything else, and what is no number, as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return value
    return str(int(value)) if value == int(value) else json.dumps(value)


def _of_messages(column: str, *, last_turn: bool = False) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    """The demonstration is all that comes after the last message by the user, or the last turn alone."""

    def read(row: Mapping[str, Any]) -> tuple[Any, Any]:
        turns = row[column]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise UsageError(f"{column} must be a list of chat messages")
        if any("from" in turn for turn in turns):  # ShareGPT's names
            turns = [_of_share_gpt(turn, column) for turn in turns]
        if not turns or turns[-1].get("role") != "assistant":
            by = f" but ends with one by {turns[-1].get('role')!r}" if turns else " but is empty"
            raise UsageError(f"{column} must end with a message by 'assistant', which is the demonstration,{by}")
        place = len(turns) - 1
        if not last_turn:
            place = 1 + max((n for n, turn in enumerate(turns) if turn.get("role") == "user"), default=place - 1)
        return turns[:place], turns[place:]

    return read


def _of_share_gpt(turn: Mapping[str, Any], column: str) -> dict[str, Any]:
    by, value = turn.get("from"), turn.get("value")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    if by not in CALLS:
        role = SHARE_GPT.get(str(by), by)
        if role == "tool" and isinstance(value, dict | list):
            value = json.dumps(value, ensure_ascii=False)
        return {"role": role, "content": value, **weight}
    try:
        found = parse(value, column) if isinstance(value, str) else value
    except UsageError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UsageError(
            f"{column} has a turn by {by!r} of {shown(value)}; it must be JSON with a name and arguments, or a list "
            "of that"
        )
    return {"role": "assistant", "content": "", "tool_calls": calls, **weight}


def _turns(column: str) -> Convention:
    said = f"prompt is {column!r} up to the last message by the user, and demonstration what comes after it"
    exam = _of_messages(column, last_turn=True)
    return Convention((column,), said, _of_messages(column), exam)


#: In this order; the first whose columns are there is taken.
CONVENTIONS = (
    _turns("messages"),
    _turns("conversations"),
    _pair("prompt", "privileged_context"),  # TRL's SDFTTrainer
    _pair("prompt", "completion"),  # TRL's SFTTrainer and GKDTrainer
    _pair("prompt", "response"),
    Convention(
        ("instruction", "output"),
        "prompt is 'instruction', with 'input' after it where that is there, and demonstration 'output'",
        _of_instruction,
        also=("input",),
    ),
    _pair("instruction", "response"),
    _pair("question", "answer"),
    _pair("question", "response"),
    _pair("query", "response"),
    _pair("problem", "solution"),
    _pair("input", "output"),
)


def named(
    numbered: Sequence[tuple[int, Any]], source: str, need: Sequence[str], columns: Mapping[str, str] | None = None
) -> Iterable[tuple[int, Any]]:
    """The rows with our names, where `columns` or a convention has them, and whatever else they have; one by one.

    Raises UsageError where `columns` names no column for what is needed, and for turns that do not end with an answer.
    """
    there = {name for _, row in numbered if isinstance(row, dict) for name, value in row.items() if value is not None}
    rows: Iterable[tuple[int, Any]] = numbered
    if columns:
        rows, there = _renamed(rows, source, columns, there, need)
    if there.issuperset(need):
        return rows
    lowered, convention = {name.lower() for name in there}, _convention(there)
    alone = len(lowered) == len(there)  # no two names are the same but for their letters' case
    if convention is None and alone and lowered != there:
        if lowered.issuperset(need):
            return _each(_lowered, rows)
        if convention := _convention(lowered):
            rows = _each(_lowered, rows)
    if convention is None:
        return rows
    logger.warning("%s: %s (columns can say otherwise)", source, convention.said)
    return ((number, _read(row, convention, f"{source}, row {number}", need)) for number, row in rows)


def _each(change: Callable[[Any], Any], rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    return ((number, change(row)) for number, row in rows)


def _convention(there: Collection[str]) -> Convention | None:
    return next((each for each in CONVENTIONS if set(there).issuperset(each.columns)), None)


def _lowered(row: Any) -> Any:
    """The row with its columns' names in small letters."""
    return {str(name).lower(): value for name, value in row.items()} if isinstance(row, dict) else row


def _read(row: Any, convention: Convention, where: str, need: Sequence[str]) -> Any:
    if not isinstance(row, dict):
        return row  # which is refused for that
    if missing := next((name for name in convention.columns if row.get(name) is None), None):
        raise UsageError(f"{where} has no {missing}, which the rows before or after it have")
    try:
        read = convention.exam if convention.exam and "answer" in need else convention.read
        prompt, good = read(row)
        prompt, good = _in_context(prompt, row), as_text(good) if "answer" in need else good
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    used = {*convention.columns, *convention.also} - {"answer"}
    left = (name for name in row if name not in used and str(name).lower() not in CONTEXT)
    found = {name: row[name] for name in left} | {"prompt": prompt}
    found.setdefault("demonstration", good)
    if "answer" in need:
        found.setdefault("answer", _text_of_last(good) if isinstance(good, list) else good)
    return found


def _text_of_last(turns: list[Any]) -> Any:
    """The last turn's text, which is a line of JSON for each of its calls of tools."""
    content, calls = turns[-1].get("content"), turns[-1].get("tool_calls")
    with contextlib.suppress(UsageError):  # which is said of the row's demonstration
        if calls and not content:
            return text_of([{"content": "", "tool_calls": as_calls(calls, "", "")}])
    return content


def _renamed(
    rows: Iterable[tuple[int, Any]],
    source: str,
    columns: Mapping[str, str],
    there: Collection[str],
    need: Sequence[str],
) -> tuple[Iterable[tuple[int, Any]], set[str]]:
    """The rows by our names, and all the columns that they then have."""
    for name, column in columns.items():
        if column in there or name not in need:
            continue
        missing = f"columns has {name}: {column}, and {source} has no such column"
        if name not in there:
            raise UsageError(f"{missing}; it has {', '.join(sorted(there))}")
        logger.warning("%s: its own %s is read", missing, name)
    here = {name: column for name, column in columns.items() if column in there}

    def rename(row: Any) -> Any:
        if not isinstance(row, dict):
            return row
        kept = {name: value for name, value in row.items() if name not in here.values()}
        return kept | {name: row.get(column) for name, column in here.items()}

    return _each(rename, rows), {*there} - {*here.values()} | {*here}
