"""Rows in, token ids out: reads and checks training data, and lays out the student's and the teacher's prompts.

A row has `prompt` (text or chat messages), `demonstration` (text or messages) and, where it will be scored, `answer`
(text). Rows come from a JSONL file, a Parquet file or a `datasets.Dataset`. Everything that can be wrong with a row
is found here, before a model runs, and is reported with the file's name and the row's number (from 1).
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft.errors import UsageError
from sdft.templates import Message, as_messages, is_messages, teacher_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
WHERE = "__where__"  # the key under which a checked row keeps its Place, for errors to come
TEMPLATE_SECONDS = 10  # a chat template takes microseconds; one that takes longer may never end


class Place(str):
    """A checked row's file and number. A row that says so itself, under the same key, is not believed."""


def load_rows(source: Any, *, name: str | None = None, need: Sequence[str] = ("prompt", "demonstration")) -> list[Row]:
    """The checked rows of a JSONL or Parquet file, of a `datasets.Dataset`, or of any sequence of dictionaries.

    `need` names the fields that every row must have; `name` is what errors call a source that is not a file.
    """
    if isinstance(source, str | Path):
        name = str(source)
        numbered = _read_file(Path(source))
    elif isinstance(source, Iterable) and hasattr(source, "__len__"):
        name = name or "dataset"
        numbered = [(number, row) for number, row in enumerate(source, start=1)]
    else:
        raise UsageError(
            f"{name or 'dataset'} is a {type(source).__name__}; it may be a JSONL or Parquet file, a datasets.Dataset "
            "or a list of rows"
        )
    if not numbered:
        raise UsageError(f"{name} is empty: it has no rows")
    return [_check_row(row, f"{name}, row {number}", need) for number, row in numbered]


def _read_file(path: Path) -> list[tuple[int, Any]]:
    if not path.is_file():
        raise UsageError(f"{path} is not there: no such file")
    if path.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1))
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{path} cannot be read as Parquet: {error}") from error
    with path.open(encoding="utf-8-sig") as lines:
        try:
            return [
                (number, _parse(line, f"{path}, row {number}")) for number, line in enumerate(lines, 1) if line.strip()
            ]
        except UnicodeDecodeError as error:
            raise UsageError(f"{path} is neither JSONL in UTF-8 nor a .parquet file: {error}") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{where} is not a row: it is nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UsageError(f"{where} cannot be read: {str(error).partition(';')[0]}") from error


def _check_row(row: Any, where: str, need: Sequence[str]) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is a {type(row).__name__}; it must be an object with the fields {', '.join(need)}")
    _check_characters(row, where)
    for field in need:
        if row.get(field) in (None, "", []) or _is_blank(row[field]):
            raise UsageError(f"{where} has no {field}")
    for field in ("prompt", "demonstration"):
        value = row.get(field)
        if value is not None and not isinstance(value, str) and not is_messages(value):
            raise UsageError(
                f"{where}: {field} is a {type(value).__name__}; it must be text or a list of messages, "
                "each with a role and a content"
            )
    if not isinstance(row.get("answer"), str | None):
        raise UsageError(f"{where}: answer is a {type(row['answer']).__name__}; it must be text")
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


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, where: str | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the model's answer: through the chat template where the tokenizer has one.

    `where` is what errors call the row that it is from.
    """
    if tokenizer.chat_template:
        text = render(as_messages(prompt), tokenizer, add_generation_prompt=True, where=where)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    if not isinstance(prompt, str):
        prompt = "\n\n".join(message["content"] for message in prompt)
    return tokenizer(prompt)["input_ids"]


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


def encode_demonstration(row: Row, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> list[int]:
    """Token ids of the demonstration as the model itself would have to write it, its end-of-turn token included."""
    demonstration = row["demonstration"]
    if not tokenizer.chat_template:
        text = demonstration if isinstance(demonstration, str) else "\n\n".join(m["content"] for m in demonstration)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], _end_token(tokenizer, eos_ids)]
    answer = [{"role": "assistant", "content": demonstration}] if isinstance(demonstration, str) else demonstration
    messages = as_messages(row["prompt"])
    opening = render(messages, tokenizer, add_generation_prompt=True, where=row[WHERE])
    whole = render([*messages, *answer], tokenizer, add_generation_prompt=False, where=row[WHERE])
    if not whole.startswith(opening):
        raise UsageError(
            f"{row[WHERE]}: the tokenizer's chat template writes an answer that does not continue its own "
            "generation prompt, so that there is no sequence to train method 'sft' on"
        )
    ids = tokenizer(whole[len(opening) :], add_special_tokens=False)["input_ids"]
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
    template: list[Message],
    eos_ids: frozenset[int],
    max_completion_length: int,
    context: int | None,
) -> list[Row]:
    """The rows with the token ids that training needs, each checked against the model's context length.

    `prompt_ids` always; `teacher_prompt_ids` for method "sdft"; `completion_ids`, the demonstration, for "sft" or where
    it is asked for.
    """
    encoded = []
    for row in rows:
        ids = {"prompt_ids": encode_prompt(row["prompt"], tokenizer, row[WHERE])}
        room = 0 if method == "sft" else max_completion_length
        if method == "sft" or with_demonstration:
            ids["completion_ids"] = encode_demonstration(row, tokenizer, eos_ids)
            room = max(room, len(ids["completion_ids"]))
        check_context(row, "prompt", len(ids["prompt_ids"]), room, context)
        if method != "sft":
            chat = teacher_messages(row["prompt"], row["demonstration"], template)
            ids["teacher_prompt_ids"] = encode_prompt(chat, tokenizer, row[WHERE])
            check_context(row, "teacher prompt", len(ids["teacher_prompt_ids"]), max_completion_length, context)
        encoded.append(ids)
    return encoded


def check_context(row: Row, kind: str, prompt_length: int, room: int, context: int | None) -> None:
    """Refuse a row whose prompt leaves no room for a completion of `room` tokens in the model's context."""
    if context is not None and prompt_length + room > context:
        raise UsageError(
            f"{row[WHERE]}: the {kind} has {prompt_length} tokens, and with {room} more for the completion it is "
            f"longer than the model's context of {context}"
        )
