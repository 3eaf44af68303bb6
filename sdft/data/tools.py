"""Tools and calls of them as chat templates take them, in whatever of the usual ways a row has them."""

from __future__ import annotations

import json
from typing import Any

from sdft.data.files import parse
from sdft.errors import UsageError, shown
from sdft.templates import Message


class Arguments(dict[str, Any]):
    """The arguments of a call as an object, which knows the text that a row has them as, as OpenAI's do."""

    def __init__(self, values: dict[str, Any], text: str | None = None) -> None:
        super().__init__(values)
        self.text = text or json.dumps(values, ensure_ascii=False)


def as_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools as a list of JSON schemas, each `{"type": "function", "function": {...}}`; None where there are none.

    Tables have them as text, and some files have the functions alone.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = parse(tools, f"{where}: tools")
    right = isinstance(tools, list) and all(isinstance(each, dict) for each in tools)
    if not right or not all(isinstance(each.get("function", {}), dict) for each in tools):
        raise UsageError(f"{where}: tools is {shown(tools)}; it must be a list of objects, each a tool's JSON schema")
    return [_whole(each) if "name" in each else each for each in tools] or None


def _whole(function: dict[str, Any]) -> dict[str, Any]:
    """A function, or a call of one, as OpenAI has it, whether it is that already or stands alone."""
    return function if "function" in function else {"type": "function", "function": function}


def as_calls(calls: Any, field: str, where: str) -> list[dict[str, Any]]:
    """A message's calls of tools, each `{"function": {"name": ..., "arguments": ...}}`, with `Arguments`.

    What is so already stays as it is.
    """
    right = isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    functions: list[Any] = [call.get("function", call) for call in calls] if right else [None]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        raise UsageError(
            f"{where}: {field} has a message whose tool_calls is {shown(calls)}; it must be a list of calls, each with "
            "the name of a function"
        )
    found = map(_whole, calls)
    return [{**each, "function": _with_object(each["function"])} for each in found]


def objects_of(messages: list[Message]) -> list[Arguments]:
    """The arguments of all calls in a chat that are objects with something in them."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    found = (call.get("function", call).get("arguments") for call in calls)
    return [arguments for arguments in found if isinstance(arguments, Arguments) and arguments]


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The same chat with the arguments of calls as text."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not isinstance(function, dict):
            return call
        arguments = function.get("arguments")
        return {**call, "function": {**function, "arguments": getattr(arguments, "text", arguments)}}

    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": _arguments(function.get("arguments"))}


def _arguments(given: Any) -> Any:
    """An object, or its text; anything else stays as it is."""
    if given is None or given == "":
        return Arguments({})
    if isinstance(given, str):
        try:
            found = parse(given, "arguments")
        except UsageError:
            return given
        return Arguments(found, given) if isinstance(found, dict) else given
    return Arguments(given) if type(given) is dict else given
