"""TRL's trainers whose batches have labels, GKD, GOLD and IW-OPD: the loss of the positions that have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer

from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.models import (
    View,
    as_forward_of,
    check_head,
    divergence,
    hidden_states,
    logprobs_at,
)
from sdft_kernels.integrations.trl import refusals

#: The trainer is the next base of each class below.
Trainer: Any = object

IGNORED = -100


class Labelled(Trainer):
    """Between one of TRL's trainers and a class below: `compute_loss` without logits."""

    #: Whether TRL makes a configuration where none is given.
    has_defaults = False

    def __init__(self, *positional: Any, **named: Any) -> None:
        given = refusals.given_to(self, super().__init__, positional, named)
        if given.get("args") is not None or not self.has_defaults:
            args = refusals.configuration(self, given)
            self.check_settings(args)
            refusals.check_share(args, "beta")
        if given.get("compute_metrics") is not None or given.get("preprocess_logits_for_metrics") is not None:
            raise refusals.no_logits(self)
        super().__init__(*positional, **named)
        check_head(self.model, precision=self.accelerator.autocast())
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        check_head(teacher, self.teacher_model, self.accelerator.autocast())

    def check_settings(self, args: Any) -> None:
        """ValueError for what a trainer has besides the divergence of two local models."""

    def inputs_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the models read."""
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def loss_temperature(self) -> float:
        return self.temperature

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """The loss; with `return_outputs` also the model's outputs, which are none: there are no logits."""
        student = self.accelerator.unwrap_model(model)
        teacher = self.accelerator.unwrap_model(self.teacher_model)

        def view(model: Any) -> View:  # the hidden state at one position predicts the next token
            return View.of(model, hidden_states(model, **self.inputs_of(inputs))[:, :-1])

        def computed() -> Tensor:
            with self.accelerator.autocast():
                seen = view(student)
                with torch.no_grad():
                    teachers = as_forward_of(self.teacher_model, teacher, lambda: view(teacher))
                return self.loss_of(seen, teachers, inputs, num_items_in_batch)

        self.teacher_model.eval()
        loss = as_forward_of(model, student, computed)
        return (loss, {}) if return_outputs else loss

    def loss_of(self, student: View, teacher: View, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        """The divergence of both models' views, divided by the number of tokens of the step."""
        labelled = inputs["labels"][:, 1:] != IGNORED
        temperature = self.loss_temperature()
        total = divergence(
            student.at(labelled), teacher.at(labelled), self.beta, temperature=temperature, reduction="sum"
        ).loss
        if items is None:
            items = labelled.sum().clamp_min(1)
        return total / (items.to(total.device) if isinstance(items, Tensor) else items)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        if not prediction_loss_only:
            raise refusals.no_logits(self)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)


class FusedGKDTrainer(Labelled, GKDTrainer):
    """TRL's `GKDTrainer` without logits in memory. As there, `temperature` is that of generation alone."""

    def loss_temperature(self) -> float:
        return 1.0


class FusedGOLDTrainer(Labelled, GOLDTrainer):
    """TRL's `GOLDTrainer` without logits in memory, for a teacher with its tokenizer (`use_uld_loss=False`)."""

    def check_settings(self, args: Any) -> None:
        refusals.must_be(args, "use_uld_loss", False, "it aligns other tokens with the student's, and needs all logits")

    def inputs_of(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**super().inputs_of(inputs), **_compat.model_inputs(self, inputs)}


class FusedIWOPDTrainer(Labelled, IWOPDTrainer):
    """TRL's `IWOPDTrainer` for a local teacher, without logits in memory: its default objective, and "jsd" without
    top-k."""

    has_defaults = True

    def check_settings(self, args: Any) -> None:
        refusals.must_be(args, "use_teacher_server", False, refusals.SERVER)
        if args.distillation_objective == "jsd":
            refusals.must_be(args, "loss_top_k", 0, refusals.TOP_K)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        _compat.check_tokenizers(self)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def loss_of(self, student: View, teacher: View, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        if self.distillation_objective == "jsd":
            return super().loss_of(student, teacher, inputs, items)
        labels = inputs["labels"][:, 1:]
        rollout = inputs.get("rollout_logprobs")  # vLLM's, over the whole width
        seen = logprobs_at(student, labels, labels != IGNORED, self.temperature)
        with torch.no_grad():
            taught = logprobs_at(teacher, labels, labels != IGNORED, self.temperature)
        return _compat.iw_opd_loss(self, seen, labels, taught, None if rollout is None else rollout[:, 1:], items)
