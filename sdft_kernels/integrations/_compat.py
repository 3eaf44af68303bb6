"""Every private or unstable interface of TRL and Liger that the integrations use, each with its reason.

tests/test_integrations_compat.py says in a sentence which of them a new release has moved.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

#: The releases under which the tests have passed.
TRIED = {"trl": "1.16", "liger-kernel": "0.8"}


def warn_of_untried(package: str) -> None:
    """A warning for a release under which the tests have not passed: TRL's trainers promise no stable insides."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return
    if found.split(".")[:2] != TRIED[package].split("."):
        warnings.warn(
            f"{package} is {found}; sdft_kernels.integrations was tried with {TRIED[package]}, and its losses may "
            "differ from what another release computes",
            stacklevel=3,
        )


class Override(NamedTuple):
    """A method of one of TRL's trainers that a subclass here replaces: its parameters, and what for."""

    trainer: str
    parameters: tuple[str, ...]
    reason: str


#: No public hook of these trainers lies between the models' forward pass and the loss.
OVERRIDES = {
    "_forward_logits": Override(
        "SDFTTrainer", ("model", "input_ids", "attention_mask", "logits_to_keep"), "it gives hidden states for logits"
    ),
    "_compute_teacher_student_logits": Override(
        "SDFTTrainer", ("model", "teacher_model", "inputs"), "log-probabilities may be all that the loss needs"
    ),
    "_compute_self_distillation_loss": Override(
        "SDFTTrainer", ("model", "inputs", "distillation_logits"), "the loss is made of hidden states"
    ),
    "_compute_policy_loss": Override(
        "SDPOTrainer", ("inputs", "student_logits"), "its log-probabilities come without logits"
    ),
    "_compute_rollout_logps": Override(
        "SDFTTrainer",
        ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
        "log-probabilities come without logits",
    ),
    "_compute_loss": Override(
        "DistillationTrainer", ("unwrapped_student", "inputs", "num_items_in_batch"), "another function is the loss"
    ),
}


def with_names(function: Any, **names: Any) -> Any:
    """The function with other values for some of its module's names. TRL's methods reach their losses by these alone,
    and to set them in the module would change TRL's own trainers."""
    missing = [name for name in names if name not in function.__code__.co_names]
    if missing:
        raise ImportError(f"{function.__qualname__} of the installed TRL no longer uses {', '.join(missing)}")
    return FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def log_distillation_loss(trainer: Any, mode: str, value: float) -> None:
    """TRL's SDFT and SDPO trainers log their loss under two names that only this method has."""
    trainer._log_self_distillation_metric(mode, value)


def model_inputs(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What TRL's GOLD trainer gives to a model besides tokens and their mask: images, for one that reads them."""
    return trainer._get_model_forward_kwargs(inputs)


def iw_opd_loss(
    trainer: Any,
    student: Tensor,
    labels: Tensor,
    teacher: Tensor,
    rollout: Tensor | None,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """TRL's loss of importance-weighted on-policy distillation, with its metrics, of log-probabilities (B, K).

    The method takes the student's logits and nothing else of it: here each position has one, which is its
    log-probability already.
    """
    compute = with_names(type(trainer)._compute_iw_opd_loss, F=SimpleNamespace(log_softmax=lambda scaled, dim: scaled))
    logits = (student * trainer.temperature).unsqueeze(-1)
    return compute(trainer, logits, torch.zeros_like(labels), labels, teacher, rollout, num_items_in_batch)


def check_tokenizers(trainer: Any) -> None:
    """TRL's IW-OPD trainer refuses a teacher with another tokenizer where it computes the loss, by this method."""
    trainer._raise_if_local_teacher_tokenizer_mismatch()


def construct_instead(base: type, fused: type, chosen: Callable[[type], type]) -> Callable[[], None]:
    """Have whoever constructs the class, or a subclass, get `chosen(class)`, of which `fused` is a part. Returns what
    undoes it. A trainer has no factory to put another class into; its `__init__` is met by every one of them."""
    original: Callable[..., None] = vars(base)["__init__"]
    if original.__name__ == "_construct":
        raise RuntimeError(f"{base.__name__} constructs another class already: apply_to_trl was called before")

    def _construct(self: Any, *positional: Any, **named: Any) -> None:
        kind = chosen(type(self))
        if kind is type(self):
            original(self, *positional, **named)
        else:
            self.__class__ = kind
            cast(Any, fused).__init__(self, *positional, **named)

    _construct.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    setattr(base, "__init__", _construct)  # noqa: B010

    def undo() -> None:
        setattr(base, "__init__", original)  # noqa: B010

    return undo
