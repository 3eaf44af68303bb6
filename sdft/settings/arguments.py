"""`SDFTConfig`: the method's settings together with those of a Hugging Face run.

Learning rate, scheduler, accumulation, mixed precision, checkpoints, logging: each is there under its usual name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from sdft._compat import Arguments
from sdft.errors import SettingsError, UsageError
from sdft.rollouts.generate import BACKENDS
from sdft.settings.checks import chosen
from sdft.settings.config import MethodSettings
from sdft.settings.inherited import CHOICES, NUMBERS, check_settings, check_values, parsed
from sdft.settings.rollouts import VLLM
from sdft_kernels.arguments import LEAST_SHARE

METRICS = ("accuracy", "forgetting")
FOLLOW_METRIC = ("reduce_lr_on_plateau", "greedy")  # the schedules that wait for a metric to get no better


@dataclass
class SDFTConfig(MethodSettings, Arguments):
    """Settings of `SDFTTrainer`: the method's own, and all of `transformers.TrainingArguments`.

    >>> SDFTConfig(output_dir="runs/mine", divergence="reverse_kl", teacher="ema", ema_rate=0.01, learning_rate=2e-5)
    """

    def __post_init__(self) -> None:
        MethodSettings.__post_init__(self)
        if not LEAST_SHARE <= self.beta <= 1 - LEAST_SHARE:
            raise UsageError(
                f"beta is {self.beta!r}; it must be at least {LEAST_SHARE:g} and at most 1 - {LEAST_SHARE:g}, beyond "
                "which float32 does not tell the mixture from one of the models"
            )
        self.rollout_backend = chosen("rollout_backend", self.rollout_backend, (*BACKENDS, VLLM))
        for field in dataclasses.fields(self):
            if field.name in NUMBERS and getattr(self, field.name) is None and field.default is not None:
                raise UsageError(f"{field.name} is None; it must be a number")
        check_values(vars(self))
        check_settings(self)
        for name, choices in CHOICES.items():
            if getattr(self, name) is not None:
                setattr(self, name, chosen(name, getattr(self, name), choices))
        order = self.train_sampling_strategy
        if order == "sequential" and self.num_iterations > 1:
            raise UsageError(
                f"train_sampling_strategy is 'sequential' and num_iterations {self.num_iterations}; rows that serve "
                "several steps come in random order"
            )
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise UsageError("save_strategy is 'best', and eval_strategy is 'no', which says of no model that it is")
        self._choose_metric()
        if self.bf16 and not self.use_cpu and not is_torch_bf16_gpu_available():
            raise UsageError("bf16 is True, and there is no GPU here that computes in it; use_cpu may be set beside it")
        if self.accelerator_config is not None:
            self.accelerator_config = accelerator_config(self.accelerator_config)
        try:
            Arguments.__post_init__(self)
        except (ImportError, RuntimeError) as error:  # a ValueError says what is wrong, as a UsageError is one
            raise SettingsError(f"the settings ask for what is not here: {' '.join(str(error).split())}") from error
        if (cast(dict[str, Any] | None, self.activation_checkpointing_kwargs) or {}).get("offload"):
            raise UsageError(
                "activation_checkpointing_kwargs has offload; it must not, but activation_offload may be True instead"
            )
        if self.activation_offload and not (self.activation_checkpointing or self.gradient_checkpointing):
            raise UsageError(
                "activation_offload is True and activation_checkpointing is not set; it must be, for what is kept in "
                "host memory are the inputs of checkpointed layers"
            )
        check_installed("report_to", self.report_to)
        if self.lr_scheduler_type in FOLLOW_METRIC:
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode, **cast(dict[str, Any], self.lr_scheduler_kwargs or {})}
        # The teacher is a copy of the model, so each process must load it, not only the first.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    def __getstate__(self) -> dict[str, Any]:
        """What the Trainer pickles into training_args.bin, which others may read: without the secret."""
        return vars(self) | {"hub_token": None}

    def _choose_metric(self) -> None:
        """What the best model is the best by: one of the metrics that evaluation during training has."""
        if self.metric_for_best_model is None:
            wanted = self.load_best_model_at_end or self.save_strategy == "best"
            if not wanted and self.lr_scheduler_type not in FOLLOW_METRIC:
                return
            self.metric_for_best_model = "accuracy"
        metric = self.metric_for_best_model.removeprefix("eval_")  # which the Trainer adds
        self.metric_for_best_model = chosen("metric_for_best_model", metric, METRICS)
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model == "accuracy"


def accelerator_config(given: Any) -> Any:
    """accelerate's settings, of a mapping or of a JSON file that has one; UsageError where it has others."""
    if isinstance(given, AcceleratorConfig):
        return given
    try:
        found = parsed(given)
        return AcceleratorConfig(**(found if isinstance(found, dict) else json.loads(Path(given).read_text("utf-8"))))
    except (TypeError, ValueError) as error:
        raise UsageError(f"accelerator_config is {given!r}, which accelerate does not take: {error}") from error


def check_installed(name: str, trackers: Any) -> None:
    """Refuse a tracker that the Trainer does not know or that is not installed."""
    installed = get_available_reporting_integrations()
    for tracker in trackers:
        if tracker not in (*installed, "azure_ml", "flyte"):  # these two are not always listed where they are
            raise UsageError(
                f"{name} is {tracker!r}, which is not installed; it may be {' or '.join(['none', *installed])}"
            )
