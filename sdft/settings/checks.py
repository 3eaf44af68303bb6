"""Checks of single values: each refusal names the setting, what it was and what it may be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from sdft.errors import UsageError, shown

LARGEST = 3.4028234663852886e38  # that float32 holds, in which models compute
MOST = 2**63 - 1  # to which torch counts
#: Beyond these a temperature makes logits in float32 infinite, or all alike.
TEMPERATURES = (1e-5, 1e5)


def chosen(name: str, value: Any, choices: Iterable[str]) -> str:
    """The choice that `value` names, in which case, hyphens and underscores do not count."""
    found = matching(value, choices)
    if found is None:
        *others, last = choices
        raise UsageError(f"{name} is {shown(value)}; it may be {', '.join(others)} or {last}")
    return found


def chosen_or_own(name: str, value: Any, choices: Iterable[str]) -> str:
    """The choice that `value` names, or the place of a user's own function, module:function."""
    if found := matching(value, choices):
        return found
    if not isinstance(value, str) or not re.fullmatch(r"[\w.]+:[\w.]+", value):
        raise UsageError(f"{name} is {shown(value)}; it may be {', '.join(choices)} or module:function")
    return value


def matching(value: Any, choices: Iterable[str]) -> str | None:
    """The one of `choices` that is `value` but for case, hyphens and underscores; None where there is none."""

    def plain(text: str) -> str:
        return text.strip().lower().replace("-", "_")

    return next((choice for choice in choices if isinstance(value, str) and plain(choice) == plain(value)), None)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_between(name: str, value: Any, low: float, high: float = math.inf, *, closed_above: bool = False) -> None:
    """Refuse a number that is not above `low` and below `high` (or equal to it), or is not finite in float32."""
    within = is_number(value) and low < value <= min(high, LARGEST) and (closed_above or value < high)
    if not within:
        above = (
            ", and finite in float32" if high == math.inf else f" and {'at most' if closed_above else 'below'} {high}"
        )
        raise UsageError(f"{name} is {shown(value)}; it must be a number above {low}{above}")


def check_not_below(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuse a number that is below `low` or not below `high`, or is not finite in float32."""
    if not is_number(value) or not low <= value < high or value > LARGEST:
        below = ", and finite in float32" if high == math.inf else f" and below {high}"
        raise UsageError(f"{name} is {shown(value)}; it must be a number of at least {low}{below}")


def check_temperature(name: str, value: Any, *, or_greedy: bool = False) -> None:
    """Refuse what is no temperature; None and 0 are one where they may stand for greedy decoding."""
    if not (or_greedy and (value is None or (is_number(value) and value == 0))):
        check_from(name, value, *TEMPERATURES)


def check_from(name: str, value: Any, low: float, high: float, *, or_zero: bool = False) -> None:
    """Refuse a number that is below `low` or above `high`; NaN is both."""
    if not is_number(value) or not (low <= value <= high or (or_zero and value == 0)):
        zero = "0, or " if or_zero else ""
        raise UsageError(f"{name} is {shown(value)}; it must be {zero}a number from {low:g} to {high:g}")


def check_texts(name: str, value: Any) -> None:
    """Refuse what is neither None nor a list of texts with something in them."""
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) and text for text in value)):
        raise UsageError(f"{name} is {shown(value)}; it must be a list of texts, none of them empty")


def check_url(name: str, value: Any) -> None:
    """Refuse what is neither None nor an address that http has."""
    if value is not None and not (isinstance(value, str) and re.match(r"https?://[^/\s]+", value)):
        raise UsageError(f"{name} is {shown(value)}; it must be a URL that begins with http:// or https://")


def at_least_or(name: str, value: Any, low: int, word: str) -> int | str:
    """The value, a whole number of at least `low` or the word; anything else is refused."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if matching(value, (word,)) is None and not (is_whole and low <= value <= MOST):
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number of at least {low}, or {word}")
    return value if is_whole else word


def check_at_least(name: str, value: Any, low: int, high: int = MOST) -> None:
    """Refuse what is no whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        is_large = high < MOST or (is_number(value) and value > high)
        largest = f" and at most {high}" if is_large else ""
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number of at least {low}{largest}")


def check_switch(name: str, value: Any, *, or_none: bool = False) -> None:
    """Refuse what is neither True nor False: of a text, "false" too, Python makes True."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise UsageError(f"{name} is {shown(value)}; it must be True or False")


def check_switches(settings: Any) -> None:
    """Refuse a dataclass whose fields of type bool are anything else."""
    for field in dataclasses.fields(settings):
        kind = "bool" if field.type is bool else str(field.type)
        if kind in ("bool", "bool | None"):
            check_switch(field.name, getattr(settings, field.name), or_none=kind != "bool")
