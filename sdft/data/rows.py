"""Checked rows: everything that can be wrong with a row by itself is found here, before a model runs.

A row has `prompt` (text or chat messages), `demonstration` (text or one message) and, where it will be scored, `answer`
(text). What is wrong is reported with the file's name and the row's number (from 1).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft.data.columns import COLUMNS as COLUMNS
from sdft.data.columns import named
from sdft.data.files import read_source
from sdft.errors import UsageError, counted, kind_of
from sdft.templates import as_messages, is_messages

Row = dict[str, Any]
WHERE = "__where__"  # the key under which a checked row keeps its Place, for errors to come
#: What other trainers read of a row, and would change what the model sees: refused where a row has it.
UNREAD = ("tools", "chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")


class Place(str):
    """A checked row's file and number. A row that says so itself, under the same key, is not believed."""


def load_rows(
    source: Any,
    *,
    name: str | None = None,
    need: Sequence[str] = ("prompt", "demonstration"),
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """The checked rows of a source: the name of a file, a folder or a hub dataset (see `sdft.data.files`), a list of
    such names or a mapping of them to weights, a `datasets.Dataset`, or any sequence of dictionaries.

    `need` names the fields that every row must have, `columns` the source's columns for them (`sdft.data.columns`), and
    `name` is what errors call a source without a name. Of a source with a weight, each row is there that many times,
    and for a fraction so many of its rows, drawn by `seed`.
    """
    if isinstance(source, Mapping):
        return _mixture(source, need, columns, seed)
    if isinstance(source, list | tuple) and source and all(isinstance(each, str | Path) for each in source):
        return [row for each in source for row in load_rows(each, need=need, columns=columns)]
    if isinstance(source, str | Path):
        name = str(source)
        numbered = read_source(source)
    elif isinstance(source, Iterable) and hasattr(source, "__len__"):
        name = name or "dataset"
        numbered = list(enumerate(source, start=1))
    else:
        raise UsageError(
            f"{name or 'dataset'} is a {type(source).__name__}; it may be a file's name, a datasets.Dataset or a list "
            "of rows"
        )
    if not numbered:
        raise UsageError(f"{name} is empty: it has no rows")
    return [_check_row(row, f"{name}, row {number}", need) for number, row in named(numbered, name, need, columns)]


def _mixture(
    weights: Mapping[Any, float], need: Sequence[str], columns: Mapping[str, str] | None, seed: int
) -> list[Row]:
    found: list[Row] = []
    for source, weight in weights.items():
        rows = load_rows(source, need=need, columns=columns)
        whole, rest = divmod(weight, 1)
        part = sorted(random.Random(f"{seed} {source}").sample(range(len(rows)), round(rest * len(rows))))
        found += rows * int(whole) + [rows[place] for place in part]
    if not found:
        raise UsageError(f"{', '.join(map(str, weights))} have no rows by their weights, {[*weights.values()]}")
    return found


def _check_row(row: Any, where: str, need: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is {kind_of(row)}; it must be an object with the fields {', '.join(need)}")
    _check_characters(row, where)
    for field in UNREAD:
        if row.get(field):
            raise UsageError(
                f"{where} has {field}, which this loop does not read; it must be taken out, or the row left out"
            )
    for field in need:
        if row.get(field) is None:
            given = [str(name) for name, value in row.items() if name != WHERE and value is not None]
            raise UsageError(f"{where} has no {field}; it has {', '.join(given) or 'nothing'}")
        if row[field] in ("", []) or _is_blank(row[field]):
            raise UsageError(f"{where} has an empty {field}")
    for field, messages in (("prompt", "a list of messages, each"), ("demonstration", "one message by 'assistant'")):
        value = row.get(field)
        if value is not None and not isinstance(value, str) and not is_messages(value):
            raise UsageError(
                f"{where}: {field} is {kind_of(value)}; it must be text or {messages} with a role and a content"
            )
    demonstration = row.get("demonstration")
    if isinstance(demonstration, list) and (roles := [m["role"] for m in demonstration]) != ["assistant"]:
        raise UsageError(
            f"{where}: demonstration has {counted(len(roles), 'message')} ({', '.join(roles)}); it must be text or one "
            "message by 'assistant', and what comes before that is the prompt"
        )
    if not isinstance(row.get("answer"), str | None):
        raise UsageError(f"{where}: answer is {kind_of(row['answer'])}; it must be text")
    if row.get("answer") and _is_blank(row["answer"]):  # which any text contains
        raise UsageError(f"{where}: answer is {row['answer']!r}; it must be text, or be left out")
    if (last := as_messages(row["prompt"])[-1]["role"]) != "user":
        raise UsageError(f"{where}: the last message of the prompt is by {last!r}; it must be by 'user'")
    known = row.get(WHERE)
    return {**row, WHERE: known if isinstance(known, Place) else Place(where)}


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
