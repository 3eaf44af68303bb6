"""Settings of TRL's trainers that the fused loss has no answer to: refused before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sdft_kernels import arguments

TOP_K = "the fused loss compares whole vocabularies"
SERVER = "the fused loss takes hidden states of a local teacher, and a server gives log-probabilities"


def given_to(construct: Callable[..., None], positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """The arguments that construct a trainer, by their names; its configuration is `args`, or TRL makes one."""
    return inspect.signature(construct).bind(*positional, **named).arguments


def must_be(args: Any, name: str, needed: Any, reason: str) -> None:
    """ValueError where a setting is not what the fused loss needs."""
    if (value := getattr(args, name)) != needed:
        raise ValueError(f"{name} is {value!r}; it must be {needed!r} here: {reason}")


def check_share(args: Any, name: str) -> None:
    """ValueError for a β or α so near 0 or 1 that float32 hardly tells the mixture from one of the models."""
    beta = getattr(args, name)
    if beta in (0, 1):
        return
    try:
        arguments.teachers_share(beta, "jsd")
    except ValueError as error:
        raise ValueError(str(error).replace("beta", name, 1)) from None


def no_logits(trainer: object) -> ValueError:
    return ValueError(
        f"{type(trainer).__name__} has no logits to return: compute_metrics, preprocess_logits_for_metrics and predict "
        "need TRL's own trainer"
    )
