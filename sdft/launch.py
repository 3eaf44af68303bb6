"""Ways to launch and wrap a model under which the loss would be another, or nothing would train: refused, or mended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.integrations.liger import apply_liger_kernel
from transformers.training_args import OptimizerNames

from sdft.config import SDFTConfig
from sdft.errors import UsageError
from sdft.models import has_adapter


def check_launch(trainer: Trainer) -> None:
    """UsageError for what cannot work, before any teacher is made."""
    if trainer.is_deepspeed_enabled:
        raise UsageError("deepspeed is set; it must not be: several GPUs take DDP or FSDP2 (accelerate launch)")
    if trainer.args.torch_compile:
        raise UsageError("torch_compile is True; it must be False, for the loss is no forward pass of the model's")
    if trainer.is_fsdp_enabled:
        adapter = has_adapter(cast(nn.Module, trainer.model))
        _check_fsdp(trainer.accelerator.state.fsdp_plugin, adapter, cast(SDFTConfig, trainer.args).teacher_cache_gib)


def _check_fsdp(plugin: Any, adapter: bool, teacher_cache_gib: float) -> None:
    """What FSDP's `plugin` says; and have it not round what the loss returns."""
    if plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}; it must be 2 (--fsdp_version 2)")
    if plugin.activation_checkpointing and adapter:  # peft then finds nothing to save
        raise UsageError(
            "fsdp_config has activation_checkpointing; with an adapter it must not, but activation_checkpointing may "
            "be set beside it"
        )
    if teacher_cache_gib and adapter:  # the processes would read unlike numbers of prompts, and wait for each other
        raise UsageError(
            f"teacher_cache_gib is {teacher_cache_gib}; under FSDP with an adapter, whose teacher is sharded, it must "
            "be 0"
        )
    if plugin.mixed_precision_policy is not None:
        # By default all that a forward pass returns is rounded to its type: losses and log-probabilities here.
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def prepare_packages(trainer: Trainer) -> None:
    """Use liger-kernel where it is asked for, and find out whether the optimizer is installed.

    The Trainer does both when training begins: after teachers were copied, which would keep the model's own modules,
    and after all that is measured before.
    """
    args = trainer.args
    with _installed(f"use_liger_kernel is {args.use_liger_kernel}"):
        if args.use_liger_kernel:
            apply_liger_kernel(trainer.model, args.liger_kernel_config)
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        with _installed(f"optim is '{OptimizerNames(args.optim).value}'"):
            trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, trainer.model))


@contextlib.contextmanager
def _installed(asked: str) -> Iterator[None]:
    """UsageError where what was asked for is not to be had."""
    try:
        yield
    except (ImportError, ValueError) as error:
        raise UsageError(f"{asked}, which cannot be had here: {' '.join(str(error).split())}") from error


def switch_off_dropout(model: nn.Module) -> None:
    """Student and teacher are compared token by token; dropout would be noise in what the student learns."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            cast(Any, module).attention_dropout = 0.0
