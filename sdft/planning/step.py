"""One training step without values: rollouts, the teacher's scores, the loss, gradients and the optimizer.

The model is made from its configuration and the step runs the code that trains, on tensors that have a shape and no
values, while `MemoryTracker` counts what they would take.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from sdft import loss as losses
from sdft._compat import with_cache
from sdft.batch import Batch, Sample, demonstrations_of, group, lay_out, parts_within
from sdft.errors import UsageError
from sdft.forward import autocasting, evaluating
from sdft.launch import switch_off_dropout
from sdft.loss import demonstration_loss, distillation_loss
from sdft.memory.tiles import tile
from sdft.models.adapters import add_lora, causal_lm
from sdft.models.few_bits import stored_type
from sdft.planning.losses import OTHERS
from sdft.planning.optimizers import StepsOf, check_known
from sdft.planning.pretend import Device
from sdft.planning.quantised import Quantisation, quantisation_of, quantise
from sdft.planning.tracker import Peak
from sdft.rollouts.kv_cache import roomy_cache
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments
from sdft.teacher import ModelTeacher, Teacher, make_teacher
from sdft.teacher_model import OtherModel, teacher_of
from sdft.token_weights import Weighed
from sdft_kernels import CrossEntropyOutput, DivergenceOutput, fused_linear_cross_entropy, fused_linear_divergence

#: The phase of the loss, which a step of another loss has otherwise.
LOSS = "loss"


@dataclass(frozen=True)
class Lengths:
    """The tokens of a prompt, of a rollout, and of what the teacher is shown beside the prompt."""

    prompt: int
    rollout: int
    demonstration: int


@dataclass(frozen=True)
class Measured:
    """What a step takes: the peak of each phase, that of host memory, and by name those of other losses at the place of
    this one."""

    phases: dict[str, Peak]
    host: Peak = field(default_factory=Peak)
    other_losses: dict[str, Peak] = field(default_factory=dict)

    @property
    def peak(self) -> Peak:
        """The peak of all."""
        return max(self.phases.values(), key=lambda peak: peak.total)

    def with_loss(self, name: str) -> Measured:
        """The same step with another loss."""
        return Measured(self.phases | {LOSS: self.other_losses[name]}, self.host)


class Step:
    """A model with its teacher and optimizer, of which a step can be run for any length."""

    def __init__(
        self,
        model_config: Any,
        dtype: str,
        lora: LoraArguments,
        config: SDFTConfig,
        device: Device | None = None,
        *,
        teacher_config: Any = None,
    ) -> None:
        """`teacher_config` is the configuration of another model that teaches."""
        check_plannable(config)
        self.config, self.device = config, device or Device()
        self.tracker = self.device.tracker
        with self.device.planning():
            self._make(model_config, dtype, lora, teacher_config)

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
        return Measured(self.tracker.peaks, self.tracker.host_peak, self.tracker.asides)

    def _make(self, model_config: Any, dtype: str, lora: LoraArguments, teacher_config: Any) -> None:
        with self.tracker.part("weights"):
            model = self._model(model_config, dtype)
        if (how := quantisation_of(model_config)) is not None and not lora.lora_rank:
            raise UsageError(
                f"lora_rank is 0, and the model's weights are in {how.bits} bits, which do not train; it must be at "
                "least 1"
            )
        numbers = _numel(model)
        if how is not None:
            with self.tracker.part("weights"):
                quantise(model, how)
        numbers -= _numel(model)
        if self.config.freeze_embeddings:
            cast(nn.Module, model.get_input_embeddings()).requires_grad_(False)
        with self.tracker.part("adapter"):
            self.learner = add_lora(model, lora)
        self.parameters = numbers + _numel(self.learner)  # how many numbers the model has, with its adapter
        switch_off_dropout(self.learner)
        tile(causal_lm(self.learner), self.config.max_forward_tokens)
        self._trained = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        with self.tracker.part("teacher"):
            self.teacher: Teacher | None = None
            if self.config.method == "sdft":
                self.teacher = teacher_of(self.config, self.learner, self._other_teacher(teacher_config))
            self.base: Teacher | None = None
            if self.config.method == "sft" and self.config.base_kl_weight:
                self.base = make_teacher("base", self.learner, 0, offload=self.config.teacher_offload)
        if self.config.activation_checkpointing or self.config.gradient_checkpointing:
            # The older name is that of transformers 5.17.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(
                {
                    "use_reentrant": False,
                    "preserve_rng_state": False,
                    "determinism_check": "none",  # it compares devices, and the backward pass has left the pretence
                }
            )
        self.learner.train()
        with self.tracker.part("optimizer"):
            self._make_optimizer()

    def _model(self, model_config: Any, dtype: str) -> PreTrainedModel:
        """A model of this configuration, with weights in this type."""
        chosen = stored_type(model_config) if dtype == "auto" else getattr(torch, dtype)
        with self.device.tensors:
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(model_config, dtype=chosen))

    def _other_teacher(self, model_config: Any) -> OtherModel | None:
        """The other model that teaches, which training loads into host memory."""
        if model_config is None:
            return None
        offloaded = self.config.teacher_offload
        with self.tracker.in_host_memory() if offloaded else contextlib.nullcontext():
            model = self._model(model_config, self.config.teacher_dtype)
        how, bits = quantisation_of(model_config), self.config.teacher_bits
        if bits is not None and how is not None:
            raise UsageError(f"teacher_bits is {bits}, and teacher_model is quantised already; it must not be set")
        if bits is not None:
            how = Quantisation(bits, scales_quantised=True, products=model.dtype)
        if how is not None:
            quantise(model, how)
        return OtherModel(model)

    def _make_optimizer(self) -> None:
        embeddings = {id(module.weight) for module in self.learner.modules() if isinstance(module, nn.Embedding)}
        self.optimizer = StepsOf(self.config, self._trained, embeddings, self.device)

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
        if self.config.rollout_from == "teacher" and isinstance(self.teacher, ModelTeacher):
            model = self.teacher.model
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
        if self.config.fp16:  # whose scaler works on the gradients in place
            return torch.float16
        return torch.bfloat16 if self.config.bf16 else None

    def _autocast(self) -> torch.autocast:
        return autocasting(torch.device(self.device.kind), self._mixed)

    def _ids(self, rows: int, tokens: int) -> Tensor:
        return torch.zeros(rows, tokens, dtype=torch.long, device=self.device.tensors)

    def _train(self, lengths: Lengths) -> None:
        batch, several = self.batch(lengths)
        if several:  # all but the first find gradients there, which theirs are added to
            with self.tracker.part("gradients"):
                for parameter in self._trained:
                    parameter.grad = torch.empty_like(parameter)
        self.micro_batch(batch)

    def micro_batch(self, batch: Batch) -> None:
        """Scoring, the forward pass with its loss, and the backward pass."""
        tracker, student, share = self.tracker, causal_lm(self.learner), self.config.demonstration_weight
        compared = mock.patch.object(losses, "fused_linear_divergence", self._compare)
        shown = mock.patch.object(losses, "fused_linear_cross_entropy", self._cross_entropy)
        weighed = mock.patch.object(losses, "weigh", _weigh)
        with tracker.phase("forward"), tracker.part("activations"), self._autocast(), compared, shown, weighed:
            scoring = _Both(tracker.phase("scoring"), tracker.part("scoring"))
            if self.teacher is None:
                loss = demonstration_loss(student, batch, self.config, self._mixed, self.base, timed=scoring).total
            else:
                loss = distillation_loss(student, self.teacher, batch, self.config, self._mixed, timed=scoring).total
                if share:
                    of_labels = demonstration_loss(student, demonstrations_of(batch), self.config, self._mixed)
                    loss = (1 - share) * loss + share * of_labels.total
        with tracker.phase("backward"), tracker.part("backward"):
            loss.backward()

    def _compare(self, *tensors: Tensor, **options: Any) -> DivergenceOutput:
        """The loss; before it, what other losses would take at its place."""
        # A comparison without gradients only says what tokens count; another loss takes the place of the one after it.
        for name, loss in OTHERS.items() if not self.device.real and torch.is_grad_enabled() else ():
            with self.tracker.aside(name), self.tracker.part("loss"):
                loss(*tensors)
        with self.tracker.phase(LOSS):
            return fused_linear_divergence(*tensors, **options)

    def _cross_entropy(self, *tensors: Tensor, **options: Any) -> CrossEntropyOutput:
        with self.tracker.phase(LOSS):
            return fused_linear_cross_entropy(*tensors, **options)

    def batch(self, lengths: Lengths) -> tuple[Batch, bool]:
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
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.learner)


def _weigh(out: DivergenceOutput, batch: Batch, config: SDFTConfig) -> Weighed:
    """What tokens count, without values: those of a function of a user's own are not asked for."""
    none = torch.zeros_like(out.token_loss, dtype=torch.bool)
    return Weighed(out, torch.ones_like(out.token_loss), none, config.divergence_clip)


class _Both(contextlib.ExitStack):
    """Two contexts as one."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[None]) -> None:
        super().__init__()
        self._contexts = contexts

    def __enter__(self) -> Any:
        for context in self._contexts:
            self.enter_context(context)
        return super().__enter__()


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_plannable(config: SDFTConfig) -> None:
    """UsageError for what is not planned."""
    check_known(config.optim)
    if config.fp16 and config.bf16:
        raise UsageError("fp16 and bf16 are True; at most one may be")
