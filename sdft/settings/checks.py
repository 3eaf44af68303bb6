"""Checks of single values: each refusal names the setting, what it was and what it may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from sdft.errors import UsageError


def chosen(name: str, value: Any, choices: Iterable[str]) -> str:
    """The choice that `value` names, in which case, hyphens and underscores do not count."""
    found = matching(value, choices)
    if found is None:
        *others, last = choices
        raise UsageError(f"{name} is {value!r}; it may be {', '.join(others)} or {last}")
    return found


def matching(value: Any, choices: Iterable[str]) -> str | None:
    """The one of `choices` that is `value` but for case, hyphens and underscores; None where there is none."""

    def plain(text: str) -> str:
        return text.strip().lower().replace("-", "_")

    return next((choice for choice in choices if isinstance(value, str) and plain(choice) == plain(value)), None)


def check_between(name: str, value: Any, low: float, high: float, *, closed_above: bool = False) -> None:
    """Refuse a number that is not above `low` and below `high` (or equal to it); NaN is neither."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low < value < high or (closed_above and value == high)):
        above = "" if high == math.inf else f" and {'at most' if closed_above else 'below'} {high}"
        raise UsageError(f"{name} is {value!r}; it must be a number above {low}{above}")


def check_temperature(name: str, value: Any) -> None:
    """Refuse what is neither a sampling temperature nor, None or 0, greedy decoding."""
    if value is not None and value != 0:
        check_between(name, value, 0, math.inf)


def check_from(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a number that is below `low` or above `high`; NaN is both."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a number from {low} to {high}")


def check_texts(name: str, value: Any) -> None:
    """Refuse what is neither None nor a list of texts with something in them."""
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) and text for text in value)):
        raise UsageError(f"{name} is {value!r}; it must be a list of texts, none of them empty")


def at_least_or(name: str, value: Any, low: int, word: str) -> int | str:
    """The value, a whole number of at least `low` or the word; anything else is refused."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if matching(value, (word,)) is None and not (is_number and value >= low):
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {low}, or {word}")
    return value if is_number else word


def check_at_least(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name} is {value!r}; it must be a whole number of at least {low}")
