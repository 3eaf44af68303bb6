"""TRL's DistillationTrainer: its own forward passes, with the fused loss in the place of its chunked one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import DistillationTrainer

from sdft_kernels.fused_linear import fused_linear_divergence
from sdft_kernels.integrations import _compat
from sdft_kernels.integrations.models import named, shared_dtype, whole
from sdft_kernels.integrations.trl import refusals


def fused_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's `_chunked_divergence_loss`: the loss, the sum of the student's entropies and the number of tokens."""
    valid = completion_mask != 0
    tensors = (
        student_hidden_states[valid],
        whole(student_lm_head_weight),
        teacher_hidden_states[valid],
        whole(teacher_lm_head_weight),
    )
    dtype = shared_dtype(*tensors)
    out = fused_linear_divergence(
        *(tensor.to(dtype) for tensor in tensors),
        student_bias=None if student_lm_head_bias is None else whole(student_lm_head_bias),
        teacher_bias=None if teacher_lm_head_bias is None else whole(teacher_lm_head_bias),
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        temperature=temperature,
        reduction="sum",
        **named(beta),
    )
    tokens = valid.sum()
    if num_items_in_batch is None:
        num_items_in_batch = tokens.clamp(min=1)
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(out.loss.device)
    return out.loss / num_items_in_batch, out.student_entropy.sum(), tokens


class FusedDistillationTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer`, with the loss made from hidden states by the fused kernels."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        if (args := refusals.given_to(self, super().__init__, positional, named).get("args")) is not None:
            refusals.check_share(args, "beta")
        super().__init__(*positional, **named)

    _compute_loss = _compat.with_names(
        DistillationTrainer._compute_loss, _chunked_divergence_loss=fused_divergence_loss
    )
