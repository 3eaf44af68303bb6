"""What student and teacher read of a row, as text: its messages and tools under the tokenizer's chat template.

`options` are further arguments of the chat template (`chat_template_kwargs`), such as Qwen3's `enable_thinking`.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import itertools
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sdft.data.rows import WHERE, Row
from sdft.data.tools import objects_of, with_text_arguments
from sdft.errors import UsageError
from sdft.templates import (
    PROMPT_ALONE,
    Message,
    as_messages,
    last_by_user,
    shows_demonstration,
    teacher_messages,
    text_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_SECONDS = 10  # a chat template takes microseconds; one that takes longer may never end

#: What a message of a demonstration may have beside its content, by its role.
OF_TOOLS = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
#: What may be done where a demonstration of several turns cannot be learned.
SPLIT = "it may be split into rows of one turn each, in which what comes before that turn is the prompt"

Options = Mapping[str, Any] | None


def student_text(row: Row, tokenizer: PreTrainedTokenizerBase, options: Options = None) -> str:
    """The text that the student's answer follows."""
    return opening(row["prompt"], tokenizer, row[WHERE], tools=row.get("tools"), options=options)


def teacher_text(row: Row, template: list[Message], tokenizer: PreTrainedTokenizerBase, options: Options = None) -> str:
    """The text that the teacher reads before the student's answer."""
    return opening(teacher_chat(row, template), tokenizer, row[WHERE], tools=row.get("tools"), options=options)


def opening(
    prompt: str | list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str | None = None,
    *,
    tools: list[dict[str, Any]] | None = None,
    options: Options = None,
) -> str:
    """The text that the model's answer follows; `where` is what errors call the row that the prompt is from."""
    if tokenizer.chat_template:
        messages = as_messages(prompt)
        return render(messages, tokenizer, add_generation_prompt=True, where=where, tools=tools, options=options)
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def can_be_shown(row: Row, template: list[Message]) -> bool:
    """Whether the row has what the teacher is shown of it."""
    there = row.get("teacher_prompt") is not None or row.get("demonstration") is not None
    return there or not shows_demonstration(template)


def teacher_chat(row: Row, template: list[Message]) -> list[Message]:
    """The chat that the teacher sees of a row: its `teacher_prompt`, or the template with its demonstration.

    UsageError for what a template cannot show.
    """
    if row.get("teacher_prompt") is not None:
        return as_messages(row["teacher_prompt"])
    prompt, demonstration = as_messages(row["prompt"]), row.get("demonstration")
    if template == PROMPT_ALONE:
        return prompt
    if not shows_demonstration(template):
        demonstration = ""
    if demonstration is None:
        raise UsageError(f"{row[WHERE]} has neither a demonstration nor a teacher_prompt for the teacher to see")
    shown = [(prompt[last_by_user(prompt)], {"role", "content"})]
    if not isinstance(demonstration, str):
        shown += [(message, {"role", "content", *OF_TOOLS.get(message["role"], ())}) for message in demonstration]
    if other := sorted({name for message, known in shown for name in message.keys() - known if message[name]}):
        raise UsageError(
            f"{row[WHERE]}: a message has {', '.join(other)}, which the teacher's prompt cannot show; the message that "
            "teacher_template takes the place of, and the demonstration, must be a role and a content"
        )
    return teacher_messages(prompt, demonstration, template)


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    where: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    options: Options = None,
) -> str:
    """The text of a chat under the tokenizer's template."""
    given: dict[str, Any] = {"tools": tools, **(options or {}), "add_generation_prompt": add_generation_prompt}
    where = where or f"the chat that ends with {messages[-1]['content'][-40:]!r}"
    try:
        with _time_limit(TEMPLATE_SECONDS):
            text = _written_by(tokenizer, messages, given)
    except TimeoutError as error:
        raise UsageError(
            f"{where}: the tokenizer's chat template has not ended after {TEMPLATE_SECONDS} seconds"
        ) from error
    except Exception as error:  # a template is code of the model's, and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(f"{where}: the tokenizer's chat template refuses the messages ({roles}): {error}") from error
    return str(text)


def _written_by(tokenizer: PreTrainedTokenizerBase, messages: list[Message], given: Mapping[str, Any]) -> str:
    """The template's text, which has the arguments of calls as JSON.

    Most templates make that of an object. Those that put arguments into their text as they are, as DeepSeek's, fail at
    an object or write it as Python does: they are given its JSON.
    """
    objects = objects_of(messages)
    written, failed = list[str](), list[Exception]()
    for chat in (messages, with_text_arguments(messages)) if objects else (messages,):
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, **given))
        except TimeoutError:
            raise
        except Exception as error:  # a template is code of the model's; what it says of the first form counts
            failed.append(error)
            continue
        if not any(str(each) in text for each in objects):
            return text
        written.append(text)  # with Python's form, which may stand in a message's own text
    if not written:
        raise failed[0]
    return written[0]


def check_options(tokenizer: PreTrainedTokenizerBase, **options: Options) -> None:
    """UsageError where options, by the names of their fields, have a name that the chat template does not read.

    A template says nothing of such a name, and writes the prompt as if it were not there.
    """
    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else "\n".join(template.values())  # a text, or several by name
    read = {*re.findall(r"[A-Za-z_]\w*", text)}
    taken = inspect.signature(tokenizer.apply_chat_template).parameters if text else ()
    for field, given in options.items():
        for name in given or {}:
            if name in read or name in taken:
                continue
            if not text:
                raise UsageError(f"{field} has {name!r}, and the tokenizer has no chat template that could read it")
            close = difflib.get_close_matches(name, read, n=1, cutoff=0.8)
            more = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{field} has {name!r}, which the tokenizer's chat template does not read{more}")


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


def written(row: Row, tokenizer: PreTrainedTokenizerBase, options: Options = None) -> tuple[str, list[str]]:
    """The text of a row's prompt, and the texts after it: the demonstration's turns as the model itself would have to
    write them, and between each two of them what it reads there.

    UsageError where the chat template writes a turn otherwise once others follow it.
    """
    if row.get("demonstration") is None:
        raise UsageError(f"{row[WHERE]} has no demonstration, which is what is to be learned")
    demonstration, before = row["demonstration"], student_text(row, tokenizer, options)
    several = not isinstance(demonstration, str) and len(demonstration) > 1
    if not tokenizer.chat_template and several:
        raise UsageError(
            f"{row[WHERE]}: the demonstration has {len(demonstration)} messages, and the tokenizer has no chat "
            f"template that could write them; {SPLIT}"
        )
    if not tokenizer.chat_template:
        return before, [text_of(demonstration)]
    answer = [{"role": "assistant", "content": demonstration}] if isinstance(demonstration, str) else demonstration
    messages = [*as_messages(row["prompt"]), *answer]

    def text(count: int, *, opens: bool = False) -> str:
        given: dict[str, Any] = {"where": row[WHERE], "tools": row.get("tools"), "options": options}
        return render(messages[:count], tokenizer, add_generation_prompt=opens, **given)

    whole = text(len(messages))
    if not whole.startswith(before):
        raise UsageError(
            f"{row[WHERE]}: the tokenizer's chat template writes an answer that does not continue its own "
            "generation prompt, so that there is no sequence to train method 'sft' on"
        )
    cuts = [len(before)]  # where a turn begins, where it ends, where the next one begins
    turns = [n for n in range(len(messages) - len(answer), len(messages)) if messages[n]["role"] == "assistant"]
    for turn, following in itertools.pairwise(turns):
        for begun in (text(turn + 1), text(following, opens=True)):
            if not whole.startswith(begun):  # some end a chat with this beside the turn's own end
                begun = begun.removesuffix(str(tokenizer.eos_token or ""))
            if not whole.startswith(begun) or len(begun) < cuts[-1]:
                raise UsageError(
                    f"{row[WHERE]}: the tokenizer's chat template writes a turn of the demonstration otherwise once "
                    f"others follow it (as where it drops earlier thinking); {SPLIT}"
                )
            cuts.append(len(begun))
    return before, [whole[start:end] for start, end in itertools.pairwise([*cuts, len(whole)])]
