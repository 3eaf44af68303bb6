"""Tools and calls of them as chat templates take them, in whatever of the usual ways a row has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sdft.errors import UsageError, kind_of, shown
from sdft.templates import Message


def as_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools as a list of JSON schemas, each `{"type": "function", "function": {...}}`; None where there are none.

    Tables have them as text, and some files have the functions alone.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UsageError(f"{where}: tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"{where}: tools is {kind_of(tools)}; it must be a list of objects, each a tool's JSON schema")
    return [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]


def as_calls(calls: Any, field: str, where: str) -> list[dict[str, Any]]:
    """A message's calls of tools, with arguments that are objects: OpenAI's have them as text."""
    right = isinstance(calls, list) and all(isinstance(call, dict) and _name_of(call) for call in calls)
    if not right:
        raise UsageError(
            f"{where}: {field} has a message whose tool_calls is {shown(calls)}; it must be a list of calls, each with "
            "the name of a function"
        )
    return [_changed(call, _as_object) for call in calls]


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The same chat, with the arguments of calls as text, as a few chat templates have them (DeepSeek's)."""
    return [
        {**each, "tool_calls": [_changed(call, _as_text) for call in each["tool_calls"]]}
        if each.get("tool_calls")
        else each
        for each in messages
    ]


def _name_of(call: dict[str, Any]) -> bool:
    function = call.get("function", call)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _changed(call: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A call, which may be a function alone, with its arguments changed; without any they are an empty object."""
    if "function" in call:
        return {**call, "function": _changed(call["function"], change)}
    return {**call, "arguments": change(call.get("arguments", {}))}


def _as_object(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
