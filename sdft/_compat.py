"""Every interface of transformers, accelerate and torch that is private or has another name in another release.

Each has its reason here. tests/test_sdft_compat.py says in a sentence which of them a new release has moved.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

# torch documents dispatch modes and says where they are; there is no public module for them, nor for trees of tensors.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from transformers import Cache, ContinuousBatchingConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion

# Continuous batching has no public class for a processor of logits that knows the requests, nor for its hints.
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.utils import WorkloadHints as WorkloadHints

# The Trainer


class Override(NamedTuple):
    """A method of the Trainer's that a subclass here replaces: the parameters that it relies on, and what for."""

    parameters: tuple[str, ...]
    reason: str


#: The Trainer calls these between its own steps, and no callback or argument reaches the same places.
OVERRIDES = {
    "_get_output_dir": Override(("trial",), "a checkpoint is written into a folder aside until it is whole"),
    "_save_checkpoint": Override(("model", "trial"), "a checkpoint is published in one move, and has files of ours"),
    "_push_from_checkpoint": Override(("checkpoint_folder",), "a checkpoint is pushed once it has its name"),
    "_load_from_checkpoint": Override(("resume_from_checkpoint", "model"), "a checkpoint has files of ours"),
    "_load_best_model": Override((), "a schedule-free optimizer keeps two sets of weights"),
    "_save": Override(("output_dir", "state_dict"), "tied weights are saved once, and peft asks no hub"),
    "save_model": Override(("output_dir", "_internal_call"), "a model is published in one move"),
    "_get_train_sampler": Override(("train_dataset",), "rows come again for each step that their samples serve"),
    "_get_grad_norm": Override(("model", "grad_norm"), "training stops before weights take in what is not finite"),
    "_track_num_input_tokens": Override(("inputs",), "a micro-batch is a list of batches"),
}


def on_device(trainer: Trainer, inputs: Any) -> Any:
    """Inputs of a model where it computes. The Trainer's public methods do the same only on the way to a loss."""
    return trainer._prepare_inputs(inputs)


def optimizer_steps(trainer: Trainer) -> int:
    """The optimizer steps of a whole run, as the Trainer will count them: it stores their number only in `train`."""
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


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


def use_one_gpu(args: TrainingArguments) -> None:
    """Have the Trainer leave all GPUs but the first alone: it would wrap the model in DataParallel, and asks nobody."""
    args._n_gpu = min(args.n_gpu, 1)


if TYPE_CHECKING or hasattr(TrainingArguments, "activation_checkpointing"):
    Arguments = TrainingArguments
else:

    @dataclasses.dataclass
    class Arguments(TrainingArguments):
        """TrainingArguments of 5.17 and 5.19, where activation checkpointing had its older names alone."""

        activation_checkpointing: bool = dataclasses.field(
            default=False, metadata={"help": "Recompute activations in the backward pass, which saves memory."}
        )
        activation_checkpointing_kwargs: Any = dataclasses.field(
            default=None, metadata={"help": "Arguments of torch.utils.checkpoint."}
        )

        def __post_init__(self) -> None:
            self.gradient_checkpointing = self.gradient_checkpointing or self.activation_checkpointing
            self.gradient_checkpointing_kwargs = (
                self.gradient_checkpointing_kwargs or self.activation_checkpointing_kwargs
            )
            super().__post_init__()
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


# Models

#: FSDP's own activation checkpointing puts this before the names of a layer's parameters; torch has a constant for it,
#: in a private module.
CHECKPOINTED = "_checkpoint_wrapped_module."


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


def names_in_files(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as `save_pretrained` would write them, which offers no way to that but a file. In memory they may be
    others: of all experts in one tensor."""
    return revert_weight_conversion(model, weights)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the model's attention implementation: `set_attn_implementation` is public, and asking is not."""
    return model.config._attn_implementation


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether `generate` would make a DynamicCache for the model, which no public name says."""
    return getattr(model, "_supports_default_dynamic_cache", lambda: False)()


def takes_static_cache(model: PreTrainedModel) -> bool:
    """Whether the model's passes have fixed shapes with a StaticCache, so that they can be compiled: no public name
    says it."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def forward_without_autocast(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The forward pass that accelerate has wrapped, if it has. Its `extract_model_from_parallel` gives that too, and
    takes the wrapper off for good."""
    return vars(model).get("_original_forward")


# Continuous batching

#: In 5.17 a page of the cache is called a block, and flash attention is looked for in any case. GPU machines that only
#: have that measure rollouts too (docs/gpu.md).
_PAGES_ARE_BLOCKS = "page_size" not in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}

#: Where the manager reports, as a warning or an error, what is expected or raised here.
BATCHING_LOGGER = "ContinuousBatchingLogger"


def batching_config(*, page_size: int, auto_switch_to_flash: bool, **options: Any) -> ContinuousBatchingConfig:
    """transformers' ContinuousBatchingConfig by its newest names."""
    if _PAGES_ARE_BLOCKS:
        return ContinuousBatchingConfig(block_size=page_size, **options)
    return ContinuousBatchingConfig(page_size=page_size, auto_switch_to_flash=auto_switch_to_flash, **options)


class RequestProcessor(ContinuousBatchingLogitsProcessor):
    """A processor that learns which requests a step writes a token of. A subclass makes a tensor of them in
    `prepare_tensor_args`, and is called with it."""

    def __init__(self) -> None:
        self.supported_kwargs, self.ignored_kwargs = {}, ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()


def add_processor(manager: Any, processor: Any) -> None:
    """Have the manager, which only knows the processors of its settings, use this one too."""
    own = manager.logit_processor
    own.logits_processor.append(processor)
    own.tensors_required += isinstance(processor, RequestProcessor)
    own.do_processing = True


def request_name(request: Any) -> str:
    """By which name `add_requests` knows what a RequestProcessor is given: there it has no public one."""
    return request.state.request_id


def tokens_written(request: Any) -> list[int]:
    """The tokens of the completion so far of what a RequestProcessor is given."""
    return request.state.generated_tokens


def fatal_error(manager: Any) -> Exception | None:
    """The error that has ended the manager's thread, which its results do not tell."""
    return manager.background_thread_status.fatal_error


# vLLM


def keep_vllm_from_packing_weights() -> None:
    """Have vLLM multiply by weights as they are, in engines that are made after this. On a CPU it packs copies for
    oneDNN and other kernels, which no setting keeps it from: new weights then find no place, and a head that is tied to
    the embeddings keeps its old copy and says nothing."""
    from vllm.model_executor.layers import utils

    def multiply_plainly(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = multiply_plainly


# Planning

#: What `item` and comparisons in Python run: no public operator reads a number on the host.
READ_NUMBER = torch.ops.aten._local_scalar_dense


def storage_number(storage: torch.UntypedStorage) -> int:
    """Tells a storage from all others that live. Its address does not: without values it is 0."""
    return storage._cdata
