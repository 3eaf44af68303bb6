"""From the name of a function of feedback to the function."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from sdft.errors import UsageError
from sdft.feedback.interface import FeedbackFunction
from sdft.settings.feedback import FEEDBACKS, FeedbackSettings


def find_feedback(settings: FeedbackSettings) -> FeedbackFunction | None:
    """The function that the settings name, with its arguments; UsageError where it cannot be had or called so."""
    if settings.feedback is None:
        return None
    name, given = settings.feedback, settings.feedback_args or {}
    module, _, path = f"sdft.feedback.{name}:{name}".partition(":") if name in FEEDBACKS else name.partition(":")
    sys.path.insert(0, os.getcwd())  # a command's own folder is there in place of it
    try:
        function = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # a module is a user's code, and may raise anything
        raise UsageError(f"feedback is {name!r}, which cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise UsageError(f"feedback is {name!r}; it must be a function, and {path} is a {type(function).__name__}")
    return bound(name, function, given)


def bound(name: str, function: Callable[..., Any], given: dict[str, Any]) -> FeedbackFunction:
    """The function with the arguments that it is told beside the rollouts; UsageError where it does not take them."""
    try:
        inspect.signature(function).bind([], **given)
    except TypeError as error:
        raise UsageError(
            f"feedback is {name!r} and feedback_args {given!r}, with which it cannot be called: {error}"
        ) from error
    except ValueError:  # a function of C has no signature
        pass
    return functools.partial(function, **given)


def name_of(function: Any) -> str:
    """What a function of feedback is called in settings and errors."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"
