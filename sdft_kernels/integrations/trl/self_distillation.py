"""TRL's SDFT and SDPO trainers: the loss from hidden states, computed within the student's forward pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl.experimental.sdft import SDFTTrainer, loss_utils
from trl.experimental.sdpo import SDPOTrainer

from sdft_kernels import checks
from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.models import (
    View,
    as_forward_of,
    check_head,
    divergence,
    hidden_states,
    logprobs,
    logprobs_at,
    topk_divergence,
)
from sdft_kernels.integrations.trl import refusals

#: The trainer is the next base of each class below.
Trainer: Any = object


class SelfDistillation(Trainer):
    """Between one of TRL's two self-distillation trainers and a class below: what both replace of it.

    TRL's `compute_loss` runs as the student's forward pass. `_forward_logits` gives it views in place of logits, and
    its `_compute_teacher_student_logits` lines them up with the completions.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        given = refusals.given_to(self, super().__init__, positional, named)
        self.check_settings(refusals.configuration(self, given))
        super().__init__(*positional, **named)
        check_head(self.model, precision=self.accelerator.autocast())

    def check_settings(self, args: Any) -> None:
        """ValueError for another loss than one of two local models."""
        refusals.must_be(args, "use_teacher_server", False, refusals.SERVER)
        checks.one_of("distillation_mode", args.distillation_mode, tuple(LOSSES))
        if args.distillation_mode == "topk_logits" and args.distillation_topk is None:
            raise ValueError("distillation_topk is None; 'topk_logits' needs the number of tokens to compare")
        refusals.check_share(args, "distillation_alpha")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        student, compute = self.accelerator.unwrap_model(model), super().compute_loss
        return as_forward_of(model, student, lambda: compute(student, inputs, return_outputs, num_items_in_batch))

    def _forward_logits(self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> View:
        bare = self.accelerator.unwrap_model(model)

        def kept() -> Tensor:
            hidden = hidden_states(bare, input_ids=input_ids, attention_mask=attention_mask)
            return hidden[:, :-1][:, -logits_to_keep:]

        within = model is self.model  # whose forward pass this is a part of
        with self.accelerator.autocast():
            return View.of(bare, kept() if within else as_forward_of(model, bare, kept))

    def _compute_teacher_student_logits(self, model: Any, teacher_model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's record with views in place of logits, and where that is all the loss needs, with log-probabilities."""
        views = super()._compute_teacher_student_logits(model, teacher_model, inputs)
        if self.args.distillation_mode != "sampled_token":
            return views
        student = self.sampled(views.student_logits, inputs)
        with torch.no_grad():
            return replace(views, student_logits=student, teacher_logits=self.sampled(views.teacher_logits, inputs))

    def sampled(self, view: View | Tensor, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities (B, K) of the completions' tokens: of a view, or those that were made of one before."""
        if isinstance(view, Tensor):
            return view
        with self.accelerator.autocast():
            return logprobs_at(view, inputs["completion_ids"], inputs["completion_mask"].bool(), self.temperature)

    def _compute_self_distillation_loss(self, model: Any, inputs: dict[str, Any], distillation_logits: Any) -> Tensor:
        """TRL's loss, which is the mean over sequences of their tokens' mean. What it logs is the mean over tokens."""
        loss, mean = LOSSES[self.args.distillation_mode](self, distillation_logits, inputs.get("old_per_token_logps"))
        mode = "train" if model.training else "eval"
        _compat.log_distillation_loss(self, mode, self.accelerator.gather(mean.detach()).mean().item())
        return loss

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


def sequence_weights(loss_mask: Tensor) -> Tensor:
    """The weights (B, K) of tokens in the mean over sequences of their tokens' mean."""
    return loss_mask / loss_mask.sum(-1, keepdim=True).clamp(min=1) / len(loss_mask)


def divergence_loss(trainer: Any, views: Any, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss for "full_logits" and "topk_logits", and the mean over tokens."""
    mask, clip = views.loss_mask.bool(), trainer.args.distillation_is_clip
    compare, sampled = _comparison(trainer.args), {}
    if clip is not None and old_logprobs is not None:
        sampled = {
            "labels": views.completion_ids[mask],
            "old_logprobs": old_logprobs[mask],
            "importance_clip": min(clip, LARGEST_RATIO),
        }
    with trainer.accelerator.autocast():
        out = compare(
            views.student_logits.at(mask),
            views.teacher_logits.at(mask),
            trainer.args.distillation_alpha,
            temperature=trainer.temperature,
            token_weight=sequence_weights(views.loss_mask)[mask],
            reduction="sum",
            **sampled,
        )
    token_loss = out.token_loss
    if clip is not None and out.student_logprob is not None:
        token_loss = loss_utils.apply_importance_sampling_clipping(
            token_loss, out.student_logprob, sampled["old_logprobs"], clip
        )
    return out.loss, token_loss.sum() / mask.sum().clamp(min=1)


def _comparison(args: Any) -> Any:
    """`divergence`, or `topk_divergence` of as many tokens as the settings say."""
    if args.distillation_mode != "topk_logits":
        return divergence
    tail = "bucket" if args.distillation_add_tail else "dropped"
    return partial(topk_divergence, k=args.distillation_topk, tail=tail)


def sampled_token_loss(trainer: Any, views: Any, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss for "sampled_token", TRL's `compute_sampled_token_self_distillation_loss`, and the mean over tokens."""
    student, teacher, clip = views.student_logits, views.teacher_logits, trainer.args.distillation_is_clip
    token_loss = (student - teacher).detach() * student
    if clip is not None and old_logprobs is not None:
        token_loss = loss_utils.apply_importance_sampling_clipping(token_loss, student, old_logprobs, clip)
    mean = (token_loss * views.loss_mask).sum() / views.loss_mask.sum().clamp(min=1)
    return (token_loss * sequence_weights(views.loss_mask)).sum(), mean


#: By `distillation_mode`.
LOSSES = {"full_logits": divergence_loss, "topk_logits": divergence_loss, "sampled_token": sampled_token_loss}

#: TRL limits the logarithm of an importance weight to 20.
LARGEST_RATIO = float(torch.tensor(20.0).exp())


class FusedSDFTTrainer(SelfDistillation, SDFTTrainer):  # type: ignore[misc]  # views pass where TRL has logits
    """TRL's `SDFTTrainer` for a local teacher, without logits in memory."""


class FusedSDPOTrainer(SelfDistillation, SDPOTrainer):  # type: ignore[misc]  # as above
    """TRL's `SDPOTrainer` for a local teacher, with its policy loss, without logits in memory."""

    def _compute_policy_loss(self, inputs: dict[str, Any], student_logits: View | Tensor) -> Tensor:
        student = self.sampled(student_logits, inputs)
        old = inputs.get("old_per_token_logps")
        if old is not None:  # where nothing counts, both are 0, and their ratio is 1
            inputs = {**inputs, "old_per_token_logps": old.where(inputs["completion_mask"].bool(), 0.0)}
        theirs: Any = super()._compute_policy_loss
        compute = _compat.with_names(theirs.__func__, selective_log_softmax=lambda logprobs, labels: logprobs)
        return compute(self, inputs, student)
