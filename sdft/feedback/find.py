"""From the name of a function of feedback to the function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sdft.errors import UsageError
from sdft.feedback.interface import FeedbackFunction
from sdft.named_functions import imported
from sdft.settings.config import MethodSettings
from sdft.settings.feedback import ALONE, FEEDBACKS


def find_feedback(settings: MethodSettings) -> FeedbackFunction | None:
    """The function that the settings name, with its arguments; UsageError where it cannot be had or called so, or where
    it would leave out every rollout."""
    if settings.feedback is None:
        return None
    name, given = settings.feedback, settings.feedback_args or {}
    function = imported("feedback", name, f"sdft.feedback.{name}:{name}" if name in FEEDBACKS else name)
    found = bound(name, function, given)
    if name in FEEDBACKS:
        found([])  # without rollouts it looks at its arguments alone
    if name in ALONE and settings.rollouts_per_prompt == 1 and not given.get(ALONE[name]):
        raise UsageError(
            f"feedback is {name!r} and rollouts_per_prompt 1; it must be at least 2, or feedback_args "
            f"{{{ALONE[name]}: true}}, for a rollout without another of its prompt is left out"
        )
    return found


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
