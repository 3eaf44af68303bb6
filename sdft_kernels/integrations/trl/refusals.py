"""Settings of TRL's trainers that the fused loss has no answer to: refused before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sdft_kernels.integrations import models

TOP_K = "the fused loss compares whole vocabularies"
SERVER = "the fused loss takes hidden states of a local teacher, and a server gives log-probabilities"


def given_to(
    trainer: object, construct: Callable[..., None], positional: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """The arguments that construct a trainer, by their names; its configuration is `args`, or TRL may make one."""
    try:
        return inspect.signature(construct).bind(*positional, **named).arguments
    except TypeError as error:
        raise TypeError(f"{type(trainer).__name__}: {error}") from None


def configuration(trainer: object, given: dict[str, Any]) -> Any:
    """The trainer's configuration, where TRL would make none itself."""
    if given.get("args") is None:
        raise TypeError(
            f"{type(trainer).__name__} needs args, the configuration that TRL has for it: none is the default"
        )
    return given["args"]


def must_be(args: Any, name: str, needed: Any, reason: str) -> None:
    """ValueError where a setting is not what the fused loss needs."""
    if (value := getattr(args, name)) != needed:
        raise ValueError(f"{name} is {value!r}; it must be {needed!r} here: {reason}")


def check_share(args: Any, name: str) -> None:
    """ValueError for a β or α that names no divergence, or one that float32 hardly tells from another."""
    models.named(getattr(args, name), name)


def no_logits(trainer: object) -> ValueError:
    return ValueError(
        f"{type(trainer).__name__} has no logits to return: compute_metrics, preprocess_logits_for_metrics and predict "
        "need TRL's own trainer"
    )
