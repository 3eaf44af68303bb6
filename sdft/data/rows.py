"""Checked rows: everything that can be wrong with a row by itself is found here, before a model runs.

A row has `prompt` (text or chat messages), `demonstration` (the same) or `teacher_prompt`, which the teacher sees
instead of a template, and, where it will be scored, `answer` (text). It may have `tools`. Errors have the file's name
and the row's number (from 1).
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft.data.columns import COLUMNS as COLUMNS
from sdft.data.columns import CONTEXT, as_text, named
from sdft.data.files import read_source, without_nulls
from sdft.data.storage import Keep
from sdft.data.tools import as_calls, as_tools
from sdft.errors import UsageError, counted, kind_of, shown
from sdft.templates import Message, as_messages, is_messages

Row = dict[str, Any]
ROW = "__row__"  # the key under which the token ids of a row keep the row, where that is asked for
WHERE = "__where__"  # the key under which a checked row keeps its Place, for errors to come
#: What other trainers read of a row, and would change what the model sees: refused where a row has it.
UNREAD = ("chat_template_kwargs", *CONTEXT, "images", "image", "videos", "video", "audios", "audio")


class Place(str):
    """A checked row's file and number. A row that says so itself, under the same key, is not believed."""


def load_rows(
    source: Any,
    *,
    name: str | None = None,
    need: Sequence[str] = ("prompt", "demonstration"),
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    read: Collection[str] = (),
    keep: Keep = list,
) -> Sequence[Row]:
    """The checked rows of a source: the name of a file, a folder or a hub dataset (see `sdft.data.files`), a list of
    such names or a mapping of them to weights, a `datasets.Dataset`, or any sequence of dictionaries.

    `need` names the fields that every row must have, `columns` the source's columns for them (`sdft.data.columns`), and
    `name` is what errors call a source without a name. Of a source with a weight, each row is there that many times,
    and for a fraction so many of its rows, drawn by `seed`. `read` names columns of `UNREAD` that somebody else reads,
    and `keep` says where rows are kept (`sdft.data.storage`).
    """
    given: dict[str, Any] = {"need": need, "columns": columns, "read": read, "keep": keep}
    if isinstance(source, Mapping):
        return _mixture(source, seed, given)
    if isinstance(source, list | tuple) and source and all(isinstance(each, str | Path) for each in source):
        return keep(row for each in source for row in load_rows(each, **given))
    if isinstance(source, str | Path):
        name = str(source)
        numbered = keep(read_source(source))
    elif isinstance(source, Iterable) and hasattr(source, "__len__"):
        name = name or "dataset"
        tabular = hasattr(source, "features")  # a datasets.Dataset
        numbered = keep(enumerate(map(without_nulls, source) if tabular else source, start=1))
    else:
        raise UsageError(
            f"{name or 'dataset'} is a {type(source).__name__}; it may be a file's name, a datasets.Dataset or a list "
            "of rows"
        )
    if not numbered:
        raise UsageError(f"{name} is empty: it has no rows")
    found = named(numbered, name, need, columns)
    return keep(_check_row(row, f"{name}, row {number}", need, read) for number, row in found)


def _mixture(weights: Mapping[Any, float], seed: int, given: Mapping[str, Any]) -> Sequence[Row]:
    def weighted() -> Iterator[Row]:
        for source, weight in weights.items():
            rows = load_rows(source, **given)
            whole, rest = divmod(weight, 1)
            part = sorted(random.Random(f"{seed} {source}").sample(range(len(rows)), round(rest * len(rows))))
            for _ in range(int(whole)):
                yield from rows
            yield from (rows[place] for place in part)

    found: Sequence[Row] = given["keep"](weighted())
    if not found:
        raise UsageError(f"{', '.join(map(str, weights))} have no rows by their weights, {[*weights.values()]}")
    return found


def _check_row(row: Any, where: str, need: Sequence[str], read: Collection[str]) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is {kind_of(row)}; it must be an object with the fields {', '.join(need)}")
    _check_characters(row, where)
    for field, value in row.items():
        if value and (name := str(field).lower()) in UNREAD and name not in read:
            raise UsageError(
                f"{where} has {field}, which this loop does not read; it must be taken out, or the row left out"
            )
    if row.get("teacher_prompt") is not None:  # which shows the teacher what it is to see
        need = [field for field in need if field != "demonstration"]
    for field in need:
        if row.get(field) is None:
            given = [str(name) for name, value in row.items() if name != WHERE and value is not None]
            other = " (columns names what a file calls it)" if given and set(given).isdisjoint(COLUMNS) else ""
            raise UsageError(f"{where} has no {field}; it has {', '.join(given) or 'nothing'}{other}")
        if row[field] in ("", []) or _is_blank(row[field]):
            raise UsageError(f"{where} has an empty {field}")
    chats = ("prompt", "teacher_prompt", "demonstration")
    row = {**row, **{field: as_chat(row[field], field, where) for field in chats if row.get(field) is not None}}
    _check_turns(row.get("demonstration"), where)
    if "answer" in row:
        row["answer"] = as_text(row["answer"])
    if not isinstance(row.get("answer"), str | None):
        raise UsageError(f"{where}: answer is {kind_of(row['answer'])}; it must be text")
    if row.get("answer") and _is_blank(row["answer"]):  # which any text contains
        raise UsageError(f"{where}: answer is {row['answer']!r}; it must be text, or be left out")
    for field in ("prompt", "teacher_prompt"):
        if row.get(field) is not None and (last := as_messages(row[field])[-1]["role"]) not in ("user", "tool"):
            raise UsageError(f"{where}: the last message of the {field} is by {last!r}; it must be by 'user' or 'tool'")
    if row.get("tools") is not None:
        row["tools"] = as_tools(row["tools"], where)
    known = row.get(WHERE)
    return {**row, WHERE: known if isinstance(known, Place) else Place(where)}


def _check_turns(demonstration: str | list[Message] | None, where: str) -> None:
    """Refuse messages that are no answer to the prompt, whatever a tool or the user say in between."""
    if demonstration is None or isinstance(demonstration, str):
        return
    roles = [message["role"] for message in demonstration]
    if {roles[0], roles[-1]} != {"assistant"} or set(roles) - {"assistant", "tool", "user"}:
        raise UsageError(
            f"{where}: demonstration has {counted(len(roles), 'message')} ({', '.join(roles)}); it must be text or "
            "messages, the first and the last by 'assistant' and others by 'assistant', 'tool' or 'user'; what comes "
            "before is the prompt"
        )


def as_chat(value: Any, field: str, where: str) -> str | list[Message]:
    """A text or messages, with content in parts put together and calls of tools as `as_calls` has them."""
    if isinstance(value, str):
        return value
    chat = [_joined(message, field, where) for message in value] if isinstance(value, list) else value
    if not is_messages(chat):
        raise UsageError(
            f"{where}: {field} is {kind_of(value)}; it must be text or a list of messages, each with a role and a "
            "content"
        )
    return chat


def _joined(message: Any, field: str, where: str) -> Any:
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None}  # as tables fill up their columns
    weight = message.pop("weight", 1)  # OpenAI's, of what is learned of an assistant's message
    if field == "demonstration" and weight != 1 and message.get("role") == "assistant":
        raise UsageError(
            f"{where}: demonstration has a message of weight {shown(weight)}; all of it is learned or shown, so it "
            "must be 1, or the row be split behind that message"
        )
    if calls := message.pop("tool_calls", None):
        message = {"content": "", **message, "tool_calls": as_calls(calls, field, where)}
    content = message.get("content")
    if isinstance(content, list):
        kinds = {part.get("type", "text") if isinstance(part, dict) else "text" for part in content}
        if other := sorted(map(str, kinds - {"text"})):
            raise UsageError(f"{where}: {field} has a message with {', '.join(other)}; it must be of text alone")
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return message if content is None else {**message, "content": content}


def _check_characters(row: Row, where: str) -> None:
    """Refuse text that no file could hold: JSON can spell half of a surrogate pair, which is no character."""
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, default=str, skipkeys=True).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UsageError(
                f"{where}: {field} has {half!r}, half of a surrogate pair, which is no character"
            ) from error
        except RecursionError as error:
            raise UsageError(f"{where}: {field} is nested too deeply") from error


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()
