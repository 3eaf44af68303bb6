"""Rows in, token ids out: reads and checks training data, and lays out the student's and the teacher's prompts.

A row has `prompt` (text or chat messages), `demonstration` (text or one message) and, where it will be scored, `answer`
(text). Rows come from a JSONL file, a Parquet file or a `datasets.Dataset`. Everything that can be wrong with a row
is found here, before a model runs, and is reported with the file's name and the row's number (from 1).
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdft.errors import UsageError, counted, kind_of
from sdft.templates import Message, as_messages, is_messages, teacher_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Row = dict[str, Any]
WHERE = "__where__"  # the key under which a checked row keeps its Place, for errors to come
COLUMNS = ("prompt", "demonstration", "answer")
#: What other trainers read of a row, and would change what the model sees: refused where a row has it.
UNREAD = ("tools", "chat_template_kwargs", "images", "image", "videos", "video", "audios", "audio")
TEMPLATE_SECONDS = 10  # a chat template takes microseconds; one that takes longer may never end


class Limits(NamedTuple):
    """What a model can read: how many positions, and how many tokens it has embeddings for; None is any number."""

    context: int | None = None
    tokens: int | None = None


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
    if path.is_dir():
        raise UsageError(f"{path} is a folder; it must be a JSONL or Parquet file")
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
        return json.loads(line, object_pairs_hook=lambda pairs: _object(pairs, where))
    except UsageError:
        raise
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error} (a file is JSONL, with a row a line, or Parquet)") from error
    except RecursionError as error:
        raise UsageError(f"{where} is not a row: it is nested too deeply") from error
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UsageError(f"{where} cannot be read: {str(error).partition(';')[0]}") from error


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """An object of a row, which has each of its names once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{where} has {name} twice; it must have it once")
        found[name] = value
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


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, where: str | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the model's answer: through the chat template where the tokenizer has one.

    `where` is what errors call the row that it is from.
    """
    return _opening_ids(opening(prompt, tokenizer, where), tokenizer)


def opening(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, where: str | None = None) -> str:
    """The text that the model's answer follows."""
    if tokenizer.chat_template:
        return render(as_messages(prompt), tokenizer, add_generation_prompt=True, where=where)
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _opening_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Without a chat template, which has its own, what the tokenizer puts before a text; never what it puts after."""
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template:
        return bare
    whole: list[int] = tokenizer(text)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
    return whole if start is None else whole[: start + len(bare)]


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
            ids["teacher_prompt_ids"] = _opening_ids(text, tokenizer)
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
