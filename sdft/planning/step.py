"""One training step without values: rollouts, the teacher's scores, the loss, gradients and the optimizer.

The model is made from its configuration and the step runs the code that trains, on tensors that have a shape and no
values, while `MemoryTracker` counts what they would take.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel
from transformers.training_args import OptimizerNames

from sdft._compat import with_cache
from sdft.batch import Batch, Sample, demonstrations_of, group, lay_out, parts_within
from sdft.errors import UsageError
from sdft.forward import autocasting, evaluating
from sdft.launch import switch_off_dropout
from sdft.loss import demonstration_loss, distillation_loss
from sdft.models.adapters import add_lora, causal_lm
from sdft.planning.pretend import Device
from sdft.planning.tracker import Peak
from sdft.rollouts.kv_cache import roomy_cache
from sdft.settings.config import LoraArguments, SDFTConfig
from sdft.teacher import Teacher, make_teacher

#: Optimizers whose state is computed: two numbers of 8 bits for each parameter that trains.
EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit")
#: Optimizers whose state torch makes. The second makes copies of all parameters on the way; the first does not.
FUSED, FOREACH = "adamw_torch_fused", "adamw_torch"
OPTIMIZERS = (FUSED, FOREACH, *EIGHT_BITS)


@dataclass(frozen=True)
class Lengths:
    """The tokens of a prompt, of a rollout, and of what the teacher is shown beside the prompt."""

    prompt: int
    rollout: int
    demonstration: int


@dataclass(frozen=True)
class Measured:
    """What a step takes: the peak of all, and the peak of each phase."""

    peak: Peak
    phases: dict[str, Peak]


class Step:
    """A model with its teacher and optimizer, of which a step can be run for any length."""

    def __init__(
        self, model_config: Any, dtype: str, lora: LoraArguments, config: SDFTConfig, device: Device | None = None
    ) -> None:
        check_plannable(config)
        self.config, self.device = config, device or Device()
        self.tracker = self.device.tracker
        with self.device.planning():
            self._make(model_config, dtype, lora)

    def run(self, lengths: Lengths) -> Measured:
        """The memory of a step in which every sequence has these lengths."""
        self.tracker.forget_peak()
        with self.device.planning():
            with self.tracker.phase("rollouts"), self.tracker.part("rollouts"):
                self._rollouts(lengths)
            self._train(lengths)
            with self.tracker.phase("optimizer step"), self.tracker.part("optimizer step"):
                self._update()
            for parameter in self._trained:
                parameter.grad = None
        return Measured(self.tracker.peak, self.tracker.peaks)

    @property
    def parameters(self) -> int:
        """How many numbers the model has, with its adapter."""
        return sum(parameter.numel() for parameter in self.learner.parameters())

    def loss_tokens(self, lengths: Lengths) -> int:
        """The tokens that the loss compares at once."""
        return len(self._largest_piece(lengths)[0]) * (lengths.rollout - self.config.skip_tokens)

    def _make(self, model_config: Any, dtype: str, lora: LoraArguments) -> None:
        chosen = model_config.get_text_config().dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        with self.tracker.part("weights"), self.device.tensors:
            model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(model_config, dtype=chosen))
        if self.config.freeze_embeddings:
            cast(nn.Module, model.get_input_embeddings()).requires_grad_(False)
        with self.tracker.part("adapter"):
            self.learner = add_lora(model, lora)
        switch_off_dropout(self.learner)
        self._trained = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        with self.tracker.part("teacher"):
            self.teacher: Teacher | None = None
            if self.config.method == "sdft":
                self.teacher = make_teacher(self.config.teacher, self.learner, self.config.ema_rate)
        if self.config.activation_checkpointing or self.config.gradient_checkpointing:
            # The older name is that of transformers 5.17.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(
                {
                    "use_reentrant": False,
                    "preserve_rng_state": False,
                    "determinism_check": "none",  # it compares devices, and the backward pass has left the pretence
                    # So that layers which run again are on the device again.
                    "context_fn": lambda: (contextlib.nullcontext(), self.device.pretence()),
                }
            )
        self.learner.train()
        with self.tracker.part("optimizer"):
            self._make_optimizer()

    def _make_optimizer(self) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        name = OptimizerNames(self.config.optim).value
        if name in EIGHT_BITS:
            self._states = [
                torch.empty(2, p.numel(), dtype=torch.uint8, device=self.device.tensors) for p in self._trained
            ]
            return
        for parameter in self._trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW(self._trained, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        for group_ in optimizer.param_groups:
            group_["foreach"] = self.device.kind == "cuda"
        self.optimizer = optimizer if name == FOREACH else None
        self._states = [tensor for state in optimizer.state.values() for tensor in state.values()]

    def _label_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.relabel(parameter.grad, "gradients")

    @property
    def _rows(self) -> int:
        """The rollouts of a step."""
        of_micro_batch = self.config.per_device_train_batch_size * self.config.rollouts_per_prompt
        return of_micro_batch * self.config.gradient_accumulation_steps

    @torch.no_grad()
    def _rollouts(self, lengths: Lengths) -> None:
        """The step at which keys and values of all tokens are there, after the prompts were read."""
        if self.config.method != "sdft":
            return
        at_once = self.config.rollout_batch_size or self._rows
        rows = 1 if isinstance(at_once, str) else min(self._rows, at_once)  # where the memory says, one has to fit
        model = causal_lm(self.learner)
        update = Cache.update

        def labelled(cache: Any, *args: Any, **kwargs: Any) -> Any:
            with self.tracker.part("keys and values"):
                return update(cache, *args, **kwargs)

        prompt = lengths.prompt + (lengths.demonstration if self.config.rollout_from == "teacher" else 0)
        with evaluating(self.learner), mock.patch.object(Cache, "update", labelled):
            cache = roomy_cache(model) or DynamicCache(config=model.config.get_text_config(decoder=True))
            self._next_token(model, self._ids(rows, prompt), cache)
            for number, layer in enumerate(cache.layers):
                keys, values = cast(Any, layer).keys, cast(Any, layer).values
                window = getattr(layer, "sliding_window", None) or lengths.rollout
                new = [
                    each.new_empty(*each.shape[:2], min(lengths.rollout - 1, window), each.shape[3])
                    for each in (keys, values)
                ]
                cache.update(new[0], new[1], number)
                del new, keys, values
            self._next_token(model, self._ids(rows, 1), cache)

    def _next_token(self, model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
        """Logits of one token a row, in float32, and their probabilities: what sampling takes."""
        with self._autocast():  # around each forward pass, as accelerate puts it there
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(model, cache)).logits
        torch.softmax(logits[:, -1].to(torch.float32, copy=True), dim=-1)

    @property
    def _mixed(self) -> torch.dtype | None:
        """The type of mixed-precision products, None where there are none."""
        return torch.bfloat16 if self.config.bf16 else None

    def _autocast(self) -> torch.autocast:
        return autocasting(torch.device(self.device.kind), self._mixed)

    def _ids(self, rows: int, tokens: int) -> Tensor:
        return torch.zeros(rows, tokens, dtype=torch.long, device=self.device.tensors)

    def _train(self, lengths: Lengths) -> None:
        batch, several = self._batch(lengths)
        if several:  # all but the first find gradients there, which theirs are added to
            with self.tracker.part("gradients"):
                for parameter in self._trained:
                    parameter.grad = torch.empty_like(parameter)
        self._micro_batch(batch)

    def _micro_batch(self, batch: Batch) -> None:
        tracker, student, share = self.tracker, causal_lm(self.learner), self.config.demonstration_weight
        with tracker.phase("forward"), tracker.part("activations"), self._autocast():
            if self.teacher is None:
                loss = demonstration_loss(student, batch, self.config, self._mixed).total
            else:
                scoring = _Both(tracker.phase("scoring"), tracker.part("scoring"))
                loss = distillation_loss(student, self.teacher, batch, self.config, self._mixed, timed=scoring).total
                if share:
                    shown = demonstration_loss(student, demonstrations_of(batch), self.config, self._mixed)
                    loss = (1 - share) * loss + share * shown.total
        with tracker.phase("backward"), tracker.part("backward"):
            loss.backward()

    def _batch(self, lengths: Lengths) -> tuple[Batch, bool]:
        """The largest piece of a micro-batch, and whether a step has several."""
        piece, several = self._largest_piece(lengths)
        with torch.device("cpu"), self.tracker.part("batch"):
            laid_out = lay_out(piece, self.config.skip_tokens, self.config.loss_normalisation)
            return {name: self._there(tensor) for name, tensor in laid_out.items()}, several

    def _largest_piece(self, lengths: Lengths) -> tuple[list[Sample], bool]:
        config = self.config
        rows = config.per_device_train_batch_size * config.rollouts_per_prompt
        shown = config.method == "sft" or config.demonstration_weight
        sample = Sample(
            [0] * lengths.prompt,
            [0] * (lengths.demonstration if config.method == "sft" else lengths.rollout),
            [0] * (lengths.prompt + lengths.demonstration) if config.method == "sdft" else None,
            [0] * lengths.demonstration if shown and config.method == "sdft" else None,
            [0.0] * (lengths.rollout - config.skip_tokens) if config.num_iterations > 1 else None,
        )
        samples = [sample] * rows
        parts = parts_within(samples, config.max_forward_tokens) if config.max_forward_tokens else 1
        return max(group(samples, parts), key=len), parts * config.gradient_accumulation_steps > 1

    def _there(self, tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device.tensors)

    def _update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.learner)


class _Both(contextlib.ExitStack):
    """Two contexts as one."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[None]) -> None:
        super().__init__()
        self._contexts = contexts

    def __enter__(self) -> Any:
        for context in self._contexts:
            self.enter_context(context)
        return super().__enter__()


def check_plannable(config: SDFTConfig) -> None:
    """UsageError for what is not planned."""
    optimizer = OptimizerNames(config.optim).value
    if optimizer not in OPTIMIZERS:
        *others, last = OPTIMIZERS
        raise UsageError(f"optim is {optimizer!r}; of optimizers sdft plan knows {', '.join(others)} and {last}")
    if config.fp16:
        raise UsageError("fp16 is True; sdft plan has mixed precision only as bf16, so it must be False")
    if config.teacher_offload:
        raise UsageError("teacher_offload is True, which sdft plan does not know; for the plan it must be False")
    if config.activation_offload:
        raise UsageError("activation_offload is True, which sdft plan does not know; for the plan it must be False")
