"""TRL's SDFT and SDPO trainers: the loss from hidden states, computed within the student's forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.experimental.sdft import SDFTTrainer, loss_utils
from trl.experimental.sdpo import SDPOTrainer

from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.models import View, as_forward_of, check_head, divergence, hidden_states, logprobs
from sdft_kernels.integrations.trl import refusals

#: The trainer is the next base of each class below.
Trainer: Any = object


@dataclass(frozen=True)
class Scored:
    """The loss of a micro-batch, and what TRL logs of it: the mean over tokens of what the loss weighs by sequence."""

    loss: Tensor
    token_mean: Tensor


class SelfDistillation(Trainer):
    """Between one of TRL's two self-distillation trainers and a class below: what both replace of it.

    `_forward_logits` gives views in place of logits, TRL's `_compute_teacher_student_logits` lines them up with the
    completions, and the loss is made of them at once.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        if (args := refusals.given_to(super().__init__, positional, named).get("args")) is not None:  # TRL refuses that
            self.check_settings(args)
        super().__init__(*positional, **named)
        check_head(self.model, precision=self.accelerator.autocast())

    def check_settings(self, args: Any) -> None:
        """ValueError for another loss than the divergence of two local models."""
        refusals.must_be(args, "use_teacher_server", False, refusals.SERVER)
        reason = refusals.SAMPLED if args.distillation_mode == "sampled_token" else refusals.TOP_K
        refusals.must_be(args, "distillation_mode", "full_logits", reason)
        refusals.check_share(args, "distillation_alpha")

    def _forward_logits(self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> View:
        bare = self.accelerator.unwrap_model(model)

        def kept() -> Tensor:
            hidden = hidden_states(bare, input_ids=input_ids, attention_mask=attention_mask)
            return hidden[:, :-1][:, -logits_to_keep:]

        within = model is self.model  # whose forward pass this is a part of
        with self.accelerator.autocast():
            return View.of(bare, kept() if within else as_forward_of(model, bare, kept))

    def _compute_teacher_student_logits(self, model: Any, teacher_model: Any, inputs: dict[str, Any]) -> Scored:
        student = self.accelerator.unwrap_model(model)
        lined_up = super()._compute_teacher_student_logits

        def scored() -> tuple[Tensor, Tensor]:
            views = lined_up(student, teacher_model, inputs)
            with self.accelerator.autocast():
                return self.loss_of(views, inputs.get("old_per_token_logps"))

        return Scored(*as_forward_of(model, student, scored))

    def loss_of(self, views: Any, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
        """TRL's loss, which is the mean over sequences of their tokens' mean, and the mean over tokens."""
        mask = views.loss_mask.bool()
        clip = self.args.distillation_is_clip
        sampled: dict[str, Any] = {}
        if clip is not None and old_logprobs is not None:
            sampled = {
                "labels": views.completion_ids[mask],
                "old_logprobs": old_logprobs[mask],
                "importance_clip": min(clip, LARGEST_RATIO),
            }
        weight = views.loss_mask / views.loss_mask.sum(-1, keepdim=True).clamp(min=1) / len(mask)
        out = divergence(
            views.student_logits.at(mask),
            views.teacher_logits.at(mask),
            self.args.distillation_alpha,
            temperature=self.temperature,
            token_weight=weight[mask],
            reduction="sum",
            **sampled,
        )
        token_loss = out.token_loss
        if clip is not None and out.student_logprob is not None:
            token_loss = loss_utils.apply_importance_sampling_clipping(
                token_loss, out.student_logprob, sampled["old_logprobs"], clip
            )
        return out.loss, token_loss.sum() / mask.sum().clamp(min=1)

    def _compute_self_distillation_loss(
        self, model: Any, inputs: dict[str, Any], distillation_logits: Scored
    ) -> Tensor:
        mode = "train" if model.training else "eval"
        mean = self.accelerator.gather(distillation_logits.token_mean).mean()
        _compat.log_distillation_loss(self, mode, mean.item())
        return distillation_logits.loss

    def _compute_rollout_logps(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor | None:
        def scored(view: View, labels: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return logprobs(view, labels, self.temperature)

        compute = _compat.with_names(super()._compute_rollout_logps.__func__, selective_log_softmax=scored)
        return as_forward_of(
            self.model, self.model, lambda: compute(self, prompt_ids, prompt_mask, completion_ids, completion_mask)
        )


#: TRL limits the logarithm of an importance weight to 20.
LARGEST_RATIO = float(torch.tensor(20.0).exp())


class FusedSDFTTrainer(SelfDistillation, SDFTTrainer):  # type: ignore[misc]  # views pass where TRL has logits
    """TRL's `SDFTTrainer` for `distillation_mode="full_logits"`, without logits in memory."""


class FusedSDPOTrainer(SelfDistillation, SDPOTrainer):  # type: ignore[misc]  # as above
    """TRL's `SDPOTrainer` for "full_logits" and `distillation_weight=1`, without logits in memory."""

    def check_settings(self, args: Any) -> None:
        super().check_settings(args)
        refusals.must_be(args, "distillation_weight", 1.0, refusals.SAMPLED)
