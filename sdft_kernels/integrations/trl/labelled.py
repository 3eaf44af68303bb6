"""TRL's trainers whose batches have labels, GKD, GOLD and IW-OPD: the loss of the positions that have one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer

from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.models import View, as_forward_of, check_head, divergence, hidden_states
from sdft_kernels.integrations.trl import refusals

#: The trainer is the next base of each class below.
Trainer: Any = object

IGNORED = -100


class Labelled(Trainer):
    """Between one of TRL's trainers and a class below: `compute_loss` without logits."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        given = refusals.given_to(super().__init__, positional, named)
        if (args := given.get("args")) is not None:  # TRL refuses that
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
        labelled = inputs["labels"][:, 1:] != IGNORED  # the hidden state at one position predicts the next token

        def view(model: Any) -> View:
            return View.of(model, hidden_states(model, **self.inputs_of(inputs))[:, :-1]).at(labelled)

        def summed() -> Tensor:
            with self.accelerator.autocast():
                seen = view(student)
                with torch.no_grad():
                    teachers = as_forward_of(self.teacher_model, teacher, lambda: view(teacher))
                temperature = self.loss_temperature()
                return divergence(seen, teachers, self.beta, temperature=temperature, reduction="sum").loss

        self.teacher_model.eval()
        total = as_forward_of(model, student, summed)
        if num_items_in_batch is None:
            num_items_in_batch = labelled.sum().clamp_min(1)
        elif isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        loss = total / num_items_in_batch
        return (loss, {}) if return_outputs else loss

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
    """TRL's `IWOPDTrainer` for `distillation_objective="jsd"` and `loss_top_k=0`, without logits in memory."""

    def check_settings(self, args: Any) -> None:
        refusals.must_be(args, "use_teacher_server", False, refusals.SERVER)
        refusals.must_be(args, "distillation_objective", "jsd", refusals.SAMPLED)
        refusals.must_be(args, "loss_top_k", 0, refusals.TOP_K)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        _compat.check_tokenizers(self)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
