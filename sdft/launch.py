"""Ways to launch and wrap a model under which the loss would be another, or nothing would train: refused, or mended."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations.liger import apply_liger_kernel

from sdft.errors import SettingsError, TrainingError, UsageError
from sdft.memory.host import give_back_at_once
from sdft.memory.tiles import tile
from sdft.models.adapters import causal_lm, has_adapter
from sdft.rollouts.drafts import check_drafts
from sdft.rollouts.kv_cache import check_static_cache
from sdft.rollouts.writer import check_weights
from sdft.settings.config import SDFTConfig
from sdft.settings.idle import OF_TRAINING, without_effect
from sdft.settings.inherited import REFUSED
from sdft.settings.rollouts import AUTO, VLLM
from sdft.settings.teachers import MODEL

logger = logging.getLogger(__name__)

#: Among an optimizer's arguments: it is made for the model itself, or its layers.
OF_MODEL = {"params", "model", "optimizer_dict"}


def prepare(trainer: Trainer, *, corrects: bool) -> None:
    """Before any teacher is made: refuse what cannot work, and give the model what its settings ask for.

    What was set and does nothing is said; `corrects` is whether the rollouts' probabilities correct the loss.
    """
    check_launch(trainer)
    model, args = causal_lm(cast(nn.Module, trainer.model)), cast(SDFTConfig, trainer.args)
    for sentence in without_effect(OF_TRAINING, args, corrects=corrects):
        logger.warning(sentence)
    check_rollouts(model, args, sharded=trainer.is_fsdp_enabled)
    if args.rollout_lag and args.method == "sdft":
        _check_lag(args, corrects)
    prepare_packages(trainer)
    prepare_memory(model, args)


def check_launch(trainer: Trainer) -> None:
    """UsageError for what cannot work."""
    if trainer.is_deepspeed_enabled:
        raise UsageError("deepspeed is set; it must not be: several GPUs take DDP or FSDP2 (accelerate launch)")
    state = trainer.accelerator.state  # in which `accelerate launch` and its configuration have a say
    if (dynamo := state.dynamo_plugin.backend) != DynamoBackend.NO:
        raise UsageError(f"dynamo_backend is {dynamo.value}; it must be no: {REFUSED['torch_compile']}")
    loading = trainer.accelerator.dataloader_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(loading, name):
            raise UsageError(f"accelerator_config has {name}; it must not, for batches are rows and go to one process")
    if trainer.accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise UsageError(f"mixed_precision is {trainer.accelerator.mixed_precision!r}; it may be no, bf16 or fp16")
    if state.distributed_type == DistributedType.MEGATRON_LM or getattr(state, "parallelism_config", None) is not None:
        raise UsageError(
            "accelerate is set to split layers or sequences over processes; it must not be: several GPUs take DDP or "
            "FSDP2"
        )
    model = cast(nn.Module, trainer.model)
    if trainer.train_dataset is not None and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("the model has no parameter that trains (requires_grad); at least one must")
    half = next((name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None)
    if half is not None:
        raise UsageError(
            f"{half} trains in float16, which is too coarse for optimizers; its type must be float32 or bfloat16, and "
            "fp16 may be set for the products"
        )
    quantised = getattr(causal_lm(cast(nn.Module, trainer.model)).config, "quantization_config", None)
    if trainer.args.device.type == "cpu" and getattr(quantised, "quant_method", None) == "bitsandbytes":
        raise UsageError(
            "the model is quantised by bitsandbytes and trains on a CPU; it must be on a GPU, for on a CPU its weights "
            "are rounded again each time rollouts and training alternate"
        )
    args = cast(SDFTConfig, trainer.args)
    if args.rollout_backend == VLLM:
        _check_vllm(args, fsdp=trainer.is_fsdp_enabled)
        check_weights(causal_lm(cast(nn.Module, trainer.model)))
    if trainer.is_fsdp_enabled:
        adapter = has_adapter(cast(nn.Module, trainer.model))
        _check_fsdp(trainer.accelerator.state.fsdp_plugin, adapter, cast(SDFTConfig, trainer.args))


def _check_vllm(args: SDFTConfig, *, fsdp: bool) -> None:
    others = "the run is under FSDP" if fsdp else f"the run has {args.world_size} processes"
    if fsdp or (args.world_size > 1 and args.rollout_server is None):
        server = "" if fsdp else " (or rollout_server may be set)"
        raise UsageError(
            f"rollout_backend is 'vllm', and {others}; it must be generate, for vLLM serves one process{server}"
        )


def _check_lag(args: SDFTConfig, corrects: bool) -> None:
    if not corrects:
        raise UsageError(
            "rollout_lag is 1, and rollout_correction 'auto' corrects nothing where tokens are drawn from another "
            "distribution than the loss compares; it must be 0, or rollout_correction truncate"
        )
    if args.device.type == "cuda" and args.rollout_server is None:
        raise UsageError(
            "rollout_lag is 1, and vLLM's engine in this process sleeps while the student learns on a GPU; it must be "
            "0, or rollout_server the URL of a vLLM server"
        )


def _check_fsdp(plugin: Any, adapter: bool, args: SDFTConfig) -> None:
    """What FSDP's `plugin` says; and have it not round what the loss returns."""
    if plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}; it must be 2 (--fsdp_version 2)")
    if plugin.activation_checkpointing and adapter:  # peft then finds nothing to save
        raise UsageError(
            "fsdp_config has activation_checkpointing; with an adapter it must not, but activation_checkpointing may "
            "be set beside it"
        )
    if args.rollout_batch_size == AUTO:  # processes with unlike numbers of batches would wait for each other
        raise UsageError(
            f"rollout_batch_size is {AUTO!r}; under FSDP, where all processes write as many rollouts at once, it must "
            "be a number or not set"
        )
    cache = args.teacher_cache_gib
    if (
        cache and adapter and args.teacher != MODEL
    ):  # the processes would read unlike numbers of prompts, and wait for each other
        raise UsageError(
            f"teacher_cache_gib is {cache}; under FSDP with an adapter, whose teacher is sharded, it must be 0"
        )
    if plugin.mixed_precision_policy is not None:
        # By default all that a forward pass returns is rounded to its type: losses and log-probabilities here.
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


def check_rollouts(model: PreTrainedModel, args: SDFTConfig, *, sharded: bool) -> None:
    """UsageError where rollouts cannot have the drafts that are asked for, or the compiled passes."""
    if args.method != "sdft":
        return
    if args.rollout_draft != "none":
        reason = "its weights are sharded, and processes would make unlike numbers of passes" if sharded else None
        if reason := reason or check_drafts(model):
            raise UsageError(
                f"rollout_draft is {args.rollout_draft!r}; it must be none for {type(model).__name__}: {reason}"
            )
    if args.rollout_compile:
        reason = "its weights are sharded, and gathered for each pass" if sharded else check_static_cache(model)
        if reason:
            raise UsageError(f"rollout_compile is True; it must be False for {type(model).__name__}: {reason}")


def prepare_packages(trainer: Trainer) -> None:
    """Use liger-kernel where it is asked for, and find out whether the optimizer and its schedule can be made.

    The Trainer does all of it when training begins: after teachers were copied, which would keep the model's own
    modules, and after all that is measured before.
    """
    args = cast(SDFTConfig, trainer.args)
    with installed(f"use_liger_kernel is {args.use_liger_kernel}"):
        if args.use_liger_kernel:
            check_for_liger(args.device)
            apply_liger_kernel(trainer.model, args.liger_kernel_config)
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        with installed(said(args, "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")):
            made, options = trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, trainer.model))
            if isinstance(made, type) and issubclass(made, Optimizer) and not options.keys() & OF_MODEL:
                made(few_weights(args.device), **options)
    if trainer.lr_scheduler is None:
        with installed(said(args, "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")):
            steps = max(args.max_steps, 1)
            optimizer = torch.optim.SGD(few_weights(args.device), args.learning_rate)
            of_schedule = cast(dict[str, Any] | None, args.lr_scheduler_kwargs)
            get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, of_schedule)


def few_weights(device: torch.device) -> list[nn.Parameter]:
    """What an optimizer can be made for in no time."""
    return [nn.Parameter(torch.zeros(2, 2, device=device))]


def said(args: SDFTConfig, first: str, *others: str) -> str:
    """The first of the settings and those of the others that are not as they come, with their values."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    values = {name: getattr(args, name) for name in (first, *others)}
    plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in values.items()}
    return f"{first} is {plain[first]!r}" + "".join(
        f", {name} is {value!r}" for name, value in plain.items() if name != first and value != defaults[name]
    )


def prepare_memory(model: PreTrainedModel, args: SDFTConfig) -> None:
    """Have the model keep to the settings that save memory, and say which of them have no effect here."""
    if options := cast(dict[str, Any] | None, args.activation_checkpointing_kwargs):
        with installed(said(args, "activation_checkpointing_kwargs")):
            checkpoint(torch.clone, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
    tiled = tile(model, args.max_forward_tokens)
    if args.max_forward_tokens is not None and not tiled:
        logger.warning(
            "max_forward_tokens is %d, and %s has no MLP or norm that can work in tiles: a sample of more tokens goes "
            "through its layers whole",
            args.max_forward_tokens,
            type(model).__name__,
        )
    if args.device.type == "cpu":
        give_back_at_once()
        for name in ("activation_offload", "teacher_offload"):
            if getattr(args, name):
                logger.warning("%s has no effect on a CPU: everything is in host memory anyway", name)
        if args.rollout_compile:
            logger.warning("rollout_compile has no effect on a CPU: transformers compiles passes on GPUs alone")


def check_for_liger(device: torch.device) -> None:
    """UsageError for a device that Liger's kernels do not run on."""
    if device.type == "cpu":
        raise UsageError("use_liger_kernel is True; on a CPU it must be False, for Liger's kernels are for GPUs")


@contextlib.contextmanager
def installed(asked: str) -> Iterator[None]:
    """UsageError where what was asked for is not to be had, whatever the packages that would make it raise."""
    try:
        yield
    except (UsageError, TrainingError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # optimizers, schedules and trackers are others' code, and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"{asked}, which cannot be had here: {reason}") from error


def is_noise(name: str, value: Any) -> bool:
    """Whether a setting of a model, by its name and value, is how much of dropout or of a router's noise there is."""
    return isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)


def switch_off_dropout(model: nn.Module) -> None:
    """Student and teacher are compared token by token; dropout would be noise in what the student learns.

    It is a module, or a number that a module gives to a function; an adapter's layer has a number for each adapter.
    What is neither, `sdft.loss.check_head` finds.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            setattr(module, "p", 0.0)  # noqa: B010  # which not every module has
        for name, value in vars(module).items():
            if is_noise(name, value):
                setattr(module, name, 0.0)
            elif isinstance(value, dict) and "drop" in name:
                value.update({adapter: 0.0 for adapter, rate in value.items() if is_noise(name, rate)})
