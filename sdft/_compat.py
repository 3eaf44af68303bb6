"""Interfaces of transformers that are private or have other names in other releases, each with its reason."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Cache, ContinuousBatchingConfig, PreTrainedModel, Trainer, TrainingArguments

#: In 5.17 a page of the cache is called a block, and flash attention is looked for in any case. GPU machines that only
#: have that measure rollouts too (docs/gpu.md).
_PAGES_ARE_BLOCKS = "page_size" not in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}


def batching_config(*, page_size: int, auto_switch_to_flash: bool, **options: Any) -> ContinuousBatchingConfig:
    """transformers' ContinuousBatchingConfig by its newest names."""
    if _PAGES_ARE_BLOCKS:
        return ContinuousBatchingConfig(block_size=page_size, **options)
    return ContinuousBatchingConfig(page_size=page_size, auto_switch_to_flash=auto_switch_to_flash, **options)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The quantised model with plain weights, in its type: what transformers' `dequantize` gives, and leaves undone.

    It keeps the quantised weights' conversions, with which the model could not be saved, and the marks of their types.
    """
    model = model.dequantize()
    setattr(model, "_weight_conversions", [])  # noqa: B010  # a name that the class does not declare
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            setattr(model, mark, False)
    return model


def cache_argument(module: nn.Module) -> str | None:
    """What the module's forward pass calls the cache of keys and values, where it takes one: renamed in 5.24."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def with_cache(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """The argument by which the module's forward pass, or `generate`, takes the cache."""
    return {} if cache is None else {cache_argument(module) or "past_key_values": cache}


def is_compiled(model: nn.Module) -> bool:
    """Whether this is what `torch.compile` returns for a model; the class itself takes a second to import."""
    return hasattr(model, "_orig_mod")


def load_best_model(trainer: Trainer) -> None:
    """What the Trainer does after its last step; where there was no step to make, it offers no way to that."""
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()


if TYPE_CHECKING or hasattr(TrainingArguments, "activation_checkpointing"):
    Arguments = TrainingArguments
else:

    @dataclasses.dataclass
    class Arguments(TrainingArguments):
        """TrainingArguments of 5.17, where activation checkpointing had its older name alone."""

        activation_checkpointing: bool = dataclasses.field(
            default=False, metadata={"help": "Recompute activations in the backward pass, which saves memory."}
        )

        def __post_init__(self) -> None:
            self.gradient_checkpointing = self.gradient_checkpointing or self.activation_checkpointing
            super().__post_init__()
