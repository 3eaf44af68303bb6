"""The checks of single names and numbers. An error is one sentence: the argument, what it was and what it may be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

#: The bounds of a logit's scale or soft cap over the temperature, and of its scale over the soft cap. A masked logit,
#: some -1e30, then stays 1,000 below the others or at the cap's end, and within float32.
LEAST_QUOTIENT, LARGEST_QUOTIENT = 1e-27, 1e6

#: What passes to kernels: numbers in float32, counts in int64.
LARGEST_FLOAT32, LARGEST_COUNT = torch.finfo(torch.float32).max, torch.iinfo(torch.int64).max


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that float64 holds, not an integer beyond it") from None


def between(name: str, value: Any, least: float, most: float) -> float:
    found = number(name, value)
    if not least <= found <= most:
        raise ValueError(f"{name} must lie between {least:g} and {most:g}, not be {value!r}")
    return found


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if abs(found := int(value)) > LARGEST_COUNT:
        raise ValueError(f"{name} must be a number that int64 holds, not {value}")
    return found


def finite(name: str, value: Any) -> float:
    return between(name, value, -LARGEST_FLOAT32, LARGEST_FLOAT32)


def positive(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 < found <= LARGEST_FLOAT32:
        raise ValueError(f"{name} must be positive and finite in float32, not {value!r}")
    return found


def nonzero(name: str, value: Any) -> float:
    found = number(name, value)
    if not 0 < abs(found) < math.inf:
        raise ValueError(f"{name} must be finite and not 0, not {value!r}")
    return found


def quotient(name: str, scale: float, divisor_name: str, divisor: float) -> None:
    """Checks a factor of the logits: its product with a masked one must be large, and float32 must hold it."""
    if not LEAST_QUOTIENT <= abs(scale) / divisor <= LARGEST_QUOTIENT:
        raise ValueError(
            f"{name} / {divisor_name} must lie between {LEAST_QUOTIENT:g} and {LARGEST_QUOTIENT:g} but for its sign, "
            f"not be {scale!r} / {divisor!r}"
        )


def count(name: str, value: Any, of: str) -> int | None:
    """A number of tokens or bytes, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be a number of {of} or None, not {type(value).__name__}")
    found = int(value)
    if not 0 < found <= LARGEST_COUNT:
        raise ValueError(f"{name} must be positive and under 2^63, not {value}")
    return found
