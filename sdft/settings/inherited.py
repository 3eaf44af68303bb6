"""The settings that come from transformers' Trainer: what works here, what is refused, what has no use.

Every field of `TrainingArguments` stands in one of the lists below (tests/test_sdft_inherited holds the installed
release against them). What is refused would do nothing, or something else than it says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft.errors import UsageError, shown
from sdft.settings.checks import check_at_least, check_between, check_not_below, chosen

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Settings that do here what transformers says that they do.
WORKS = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2
    adam_epsilon gradient_accumulation_steps average_tokens_across_devices max_grad_norm bf16 fp16 tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config neftune_noise_alpha
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to
    run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps
    eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config debug
    skip_memory_metrics resume_from_checkpoint local_rank
    """.split()  # noqa: SIM905
)

#: Settings that are refused unless they are as they come, and why.
REFUSED = {
    "label_smoothing_factor": "what is learned is the teacher's distribution, or the demonstration as it is",
    "bf16_full_eval": "answers are evaluated in the precision of training",
    "fp16_full_eval": "answers are evaluated in the precision of training",
    "torch_compile": "the loss is no forward pass of the model's",
    "torch_compile_backend": "the loss is no forward pass of the model's",
    "torch_compile_mode": "the loss is no forward pass of the model's",
    "auto_find_batch_size": "the batch is what the step learns from; max_forward_tokens bounds the memory it takes",
    "enable_jit_checkpoint": "SIGTERM leaves a checkpoint as it is",
    "remove_unused_columns": "the rows are made of other columns than the model's",
    "deepspeed": "several GPUs take DDP or FSDP2 (accelerate launch)",
    "parallelism_config": "several GPUs take DDP or FSDP2 (accelerate launch)",
}

#: Settings of what is not done here: the Trainer's own evaluation and prediction, and columns of token ids.
NO_BEARING = frozenset(
    """
    use_cache prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics label_names length_column_name dataloader_pin_memory do_train do_eval
    do_predict
    """.split()  # noqa: SIM905
)

#: What settings that work do here, where transformers' words name other things.
SAID_HERE = {
    "eval_strategy": "When to evaluate on eval_file and general_file during training.",
    "load_best_model_at_end": "Load the best checkpoint at the end, by metric_for_best_model. Takes eval_strategy, and "
    "save_strategy the same or best.",
    "metric_for_best_model": "What the best model is the best by: accuracy (on eval_file; what is taken if not set) or "
    "forgetting (on general_file).",
    "greater_is_better": "Whether more of metric_for_best_model is better; if not set, of accuracy it is and of "
    "forgetting not.",
    "max_steps": "How many optimizer steps the run has, instead of num_train_epochs; -1: as those have it.",
    "use_liger_kernel": "Use Liger's kernels in the layers of the model (package liger-kernel).",
    "train_sampling_strategy": "The order of the rows: random or sequential.",
}

#: The same, where they are arguments of the Trainer's.
REFUSED_ARGUMENTS = {
    "data_collator": "rows become batches after the rollouts",
    "compute_loss_func": "the loss is set by divergence",
    "compute_metrics": "evaluate reports accuracy and forgetting",
    "preprocess_logits_for_metrics": "there are no logits",
    "model_init": "the teacher is made from one model",
}

LARGEST_SEED = 2**32 - 1  # that numpy takes


def _max_steps(name: str, value: Any) -> None:
    if value != -1:
        try:
            check_at_least(name, value, 1)
        except UsageError as error:
            raise UsageError(f"{error}, or -1, with which num_train_epochs counts") from error


#: What a number of transformers' may be, by its check; each that is taken stands here. None is taken where it is the
#: default.
NUMBERS: dict[str, Callable[[str, Any], None]] = {
    "max_steps": _max_steps,
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), partial(check_between, low=0)),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "warmup_steps",
            "eval_delay",
            "neftune_noise_alpha",
        ),
        partial(check_not_below, low=0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), partial(check_not_below, low=0, high=1)),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
        ),
        partial(check_at_least, low=1),
    ),
    **dict.fromkeys(("dataloader_num_workers", "save_total_limit"), partial(check_at_least, low=0)),
    **dict.fromkeys(("seed", "data_seed"), partial(check_at_least, low=0, high=LARGEST_SEED)),
    "local_rank": partial(check_at_least, low=-1),
}

_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
#: What a word of transformers' may be, where its type does not say so.
CHOICES = {
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "train_sampling_strategy": ("random", "sequential"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
}
#: What `debug` may have, one or several of them.
DEBUG = ("underflow_overflow", "tpu_metrics_debug")

#: Mappings, and those of which a JSON file may be named instead.
MAPPINGS = (
    "lr_scheduler_kwargs",
    "liger_kernel_config",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)
MAPPINGS_OR_FILES = ("accelerator_config", "fsdp_config")


def help_here(name: str, text: str) -> str:
    """What --help-all says of a setting, of which transformers says `text`."""
    if name in REFUSED:
        return f"Must be left as it is: {REFUSED[name]}."
    return "Has no bearing here." if name in NO_BEARING else SAID_HERE.get(name, text)


def check_values(values: Mapping[str, Any]) -> None:
    """UsageError for a value of transformers' settings that it would take and fail at, or do something else by."""
    for name, value in values.items():
        if value is None:  # where that is no value, its field says so
            continue
        if name in NUMBERS:
            NUMBERS[name](name, value)
        elif name in CHOICES:
            chosen(name, value, CHOICES[name])
        elif name == "debug":
            for word in value.split() if isinstance(value, str) else value:
                chosen(name, word, DEBUG)
        elif name in MAPPINGS and not isinstance(parsed(value), dict):
            raise UsageError(f"{name} is {shown(value)}; it must be a mapping")
        elif name in MAPPINGS_OR_FILES and isinstance(parsed(value), str) and not Path(value).is_file():
            raise UsageError(f"{name} is {shown(value)}; it must be a mapping, or a JSON file that is there")
    if values.get("rows_on_disk") and (workers := values.get("dataloader_num_workers")):
        raise UsageError(
            f"rows_on_disk is True and dataloader_num_workers {workers}; it must be 0, for other processes do not read "
            "the file of rows"
        )


def parsed(value: Any) -> Any:
    """The mapping that a text in JSON is; any other value as it is."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def check_settings(config: TrainingArguments) -> None:
    """UsageError for a setting of transformers' that this loop does not apply."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, reason in REFUSED.items():
        if name in defaults and (value := getattr(config, name)) != defaults[name]:
            raise UsageError(f"{name} is {shown(value)}; it must be {defaults[name]!r}: {reason}")


def check_arguments(names: Collection[str]) -> None:
    """UsageError for an argument of the Trainer's that this one has no use for."""
    for name in names:
        if name in REFUSED_ARGUMENTS:
            raise UsageError(f"{name} is set; it must not be: {REFUSED_ARGUMENTS[name]}")
