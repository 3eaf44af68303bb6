"""Teacher prompts: how a demonstration is put before the model, so that the same model becomes its own teacher.

A template is a list of chat messages with the placeholders {prompt} and {demonstration}. It stands in for the last
message of a prompt by the user. Earlier messages (a system prompt, earlier turns) stay before it; where the template
begins with a system prompt, that takes the place of the prompt's. Calls of tools and their results stay after it. Three
templates come built in:

- "paper" follows arXiv 2601.19897: the question, the demonstration presented as an example response, and the
  request to answer in one's own words;
- "turn" shows the demonstration as an earlier turn of the same chat: question, demonstration as the assistant's
  answer, question again. Small models copy the form of an earlier turn more readily than they follow the paper's
  wording;
- "first" puts the demonstration before the question, so that the question is the last that the model reads.

"prompt" is the prompt as it is: what a teacher sees that is another model. A template without {demonstration} is for
such a teacher, or has a system message of its own, which only the teacher sees.
"""

from __future__ import annotations

import contextlib
import json
import re
from difflib import get_close_matches
from typing import Any

from sdft.errors import UsageError, shown

Message = dict[str, Any]
PLACEHOLDERS = ("{prompt}", "{demonstration}")

TEMPLATES: dict[str, list[Message]] = {
    "paper": [
        {
            "role": "user",
            "content": "{prompt}\n\n"
            "This is an example for a response to the question:\n{demonstration}\n\n"
            "Now answer with a response of your own, including the thinking process.",
        }
    ],
    "turn": [
        {"role": "user", "content": "{prompt}"},
        {"role": "assistant", "content": "{demonstration}"},
        {"role": "user", "content": "{prompt}"},
    ],
    "first": [
        {
            "role": "user",
            "content": "This is an example for a response to the question that follows:\n{demonstration}\n\n"
            "Answer the question with a response of your own.\n\n{prompt}",
        }
    ],
}


#: The template by which a teacher sees the prompt as it is, and its name.
PROMPT = "prompt"
PROMPT_ALONE: list[Message] = [{"role": "user", "content": "{prompt}"}]


def default_template(*, other_model: bool) -> str:
    """The template where none is named: another model as teacher sees the prompt, the model itself a demonstration."""
    return PROMPT if other_model else "paper"


def shows_demonstration(template: list[Message]) -> bool:
    """Whether a teacher is shown a demonstration by this template."""
    return any(PLACEHOLDERS[1] in message["content"] for message in template)


def parse_template(template: Any, *, other_model: bool = False) -> list[Message]:
    """The messages of a template given by name, as text, as a list of messages, or as that list in JSON.

    `other_model` says that the teacher is another model, which may see no more than the prompt.
    """
    if isinstance(template, str) and template in TEMPLATES:
        return TEMPLATES[template]
    if template == PROMPT and not other_model:
        raise UsageError(
            "teacher_template is 'prompt', by which the teacher sees what the student sees; it may be so where "
            f"teacher_model is another model, and otherwise {' or '.join(map(repr, TEMPLATES))}, a text, or messages"
        )
    if template == PROMPT:
        return PROMPT_ALONE
    messages = template
    if isinstance(template, str):
        messages = [{"role": "user", "content": template}]
        if template.lstrip().startswith("["):
            with contextlib.suppress(json.JSONDecodeError):  # text may start with a bracket, too
                messages = json.loads(template)
    if not is_messages(messages):
        raise UsageError(
            f"teacher_template is {shown(template)}; it may be {' or '.join(map(repr, TEMPLATES))}, a text, "
            "or a list of messages, each with a role and a content"
        )
    text = "\n".join(message["content"] for message in messages)
    alone = other_model or messages[0]["role"] == "system"
    missing = [each for each in PLACEHOLDERS[: 1 if alone else 2] if each not in text]
    if missing:
        close = get_close_matches(str(template).strip().lower(), TEMPLATES, n=1)
        if close and len(missing) == len(PLACEHOLDERS):
            others = f"did you mean {close[0]!r}?"
        else:
            names = " or ".join(map(repr, TEMPLATES))
            others = f"it may be {names}, or a text or messages with both {{prompt}} and {{demonstration}}"
        raise UsageError(f"teacher_template is {shown(template)}, without {' and '.join(missing)}; {others}")
    if messages[-1]["role"] != "user":
        raise UsageError(
            f"teacher_template ends with a message by {messages[-1]['role']!r}; its last message must be by 'user', "
            "so that the answer is the model's"
        )
    return messages


def is_messages(value: Any) -> bool:
    """Whether `value` is a chat: a non-empty list of messages with a role and a content that are both text."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


def is_message(value: Any) -> bool:
    """Whether `value` is a message with a role and a content that are both text."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def text_of(demonstration: str | list[Message]) -> str:
    """A demonstration's text, which may come as messages; of several, each begins with its role in brackets."""
    if isinstance(demonstration, str):
        return demonstration
    if len(demonstration) == 1:
        return _text_of_message(demonstration[0])
    return "\n\n".join(f"[{message['role']}]\n{_text_of_message(message)}" for message in demonstration)


def first_turn(demonstration: str | list[Message]) -> str | list[Message]:
    """What of a demonstration answers the prompt, before a tool or the user say more."""
    return demonstration if isinstance(demonstration, str) else demonstration[:1]


def _text_of_message(message: Message) -> str:
    """Its content; calls of tools are a line of JSON each."""
    calls = [dict(call.get("function", call)) for call in message.get("tool_calls") or ()]
    lines = [json.dumps(call, ensure_ascii=False) for call in calls]
    return "\n".join([message["content"], *lines] if message["content"] else lines)


def fill(template: list[Message], prompt: str, demonstration: str | list[Message]) -> list[Message]:
    """The template's messages with both placeholders replaced, in one pass: what is put in is never searched again.

    A message by the assistant that is the demonstration alone becomes the demonstration's own messages, where it has
    any.
    """
    values = dict(zip(PLACEHOLDERS, (prompt, text_of(demonstration)), strict=True))
    pattern = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
    whole = {"role": "assistant", "content": PLACEHOLDERS[1]}
    filled = list[Message]()
    for message in template:
        if message == whole and not isinstance(demonstration, str):
            filled += demonstration
        else:
            content = pattern.sub(lambda found: values[found.group()], message["content"])
            filled.append({"role": message["role"], "content": content})
    return filled


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as a chat; text is a single message by the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def last_by_user(messages: list[Message]) -> int:
    """The place of the last message by the user; what comes after it are calls of tools and their results."""
    return max((n for n, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)


def teacher_messages(
    prompt: str | list[Message], demonstration: str | list[Message], template: list[Message]
) -> list[Message]:
    """The chat that the teacher sees: the prompt, with the template in place of its last message by the user.

    A template that begins with a system message has that in place of the prompt's.
    """
    messages = as_messages(prompt)
    place = last_by_user(messages)
    earlier, filled = messages[:place], fill(template, messages[place]["content"], demonstration)
    if filled[0]["role"] == "system":
        earlier = [filled.pop(0), *(message for message in earlier if message["role"] != "system")]
    return [*earlier, *filled, *messages[place + 1 :]]
