"""Liger's fused JSD losses, by the same names and with the same arguments: a change of the import is enough.

    from sdft_kernels.integrations.liger import LigerFusedLinearJSDLoss

Logits are float32 here whatever the inputs; Liger's chunked loss makes them in the inputs' type. Liger need not be
installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft_kernels.cross_entropy import fused_linear_cross_entropy
from sdft_kernels.fused_linear import fused_linear_divergence
from sdft_kernels.integrations._compat import warn_of_untried
from sdft_kernels.integrations.models import named
from sdft_kernels.outputs import DivergenceOutput

warn_of_untried("liger-kernel")


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`: means over the tokens that are not ignored.

    The divergence and the cross-entropy come from the same logits, and their gradient from the same products.

    A teacher's head that is wider than the student's is compared as Liger does it: the student's logits are taken to be
    0 for what it lacks. That is a distribution over the teacher's vocabulary, in which padding has some probability;
    `fused_linear_divergence` would compare what both have. The cross-entropy is of the student's own vocabulary, and
    then takes products of its own.

    Args:
        weight_hard_loss: the share of the cross-entropy on `true_labels`.
        weight_soft_loss: the share of the divergence.
        beta: 0 is forward KL, 1 reverse KL, and between them the JSD in which the teacher's share is β.
        ignore_index: the label of tokens to leave out.
        temperature: divides the logits of the divergence, and not those of the cross-entropy.
        compiled: of no effect here.
        chunk_size: of no effect here, where chunks follow from the device's memory.
        return_soft_hard_loss: return (loss, soft loss, hard loss), where the last two have no gradient.

    Example:
        >>> import torch
        >>> loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.1, weight_soft_loss=0.9)
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> loss(h, w, torch.randn(5, 8), w, torch.randint(100, (5,))).backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of hidden states (N, H), heads (V, H) and labels (N,)."""
        live = _live("true_labels", true_labels, student_input, self.ignore_index)
        labels = torch.where(live == 0, 0, true_labels)
        wants_hard = self.weight_hard_loss != 0 or self.return_soft_hard_loss
        together = wants_hard and self.weight_soft_loss != 0 and len(teacher_weight) <= len(student_weight)
        hard_term: dict[str, Any] = {}
        if together:
            hard_term = {"hard_labels": labels, "hard_weight": self.weight_hard_loss / self.weight_soft_loss}
        out = _divergence(
            student_input,
            *_widened(student_weight, student_bias, len(teacher_weight)),
            teacher_input,
            teacher_weight,
            teacher_bias,
            live,
            named(self.beta),
            self.temperature,
            **hard_term,
        )
        loss, hard = self.weight_soft_loss * out.loss, out.hard_loss
        if wants_hard and not together:
            apart = fused_linear_cross_entropy(
                student_input, student_weight, labels, bias=student_bias, token_weight=live
            )
            loss, hard = loss + self.weight_hard_loss * apart.loss, apart.token_loss
        if not self.return_soft_hard_loss:
            return loss
        assert hard is not None
        soft, hard = ((values * live).sum() / live.sum().clamp(min=1) for values in (out.token_loss, hard))
        return loss, soft, hard


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: the mean over all tokens, or over those with a label.

    Args:
        jsd_beta: 0 is forward KL, 1 reverse KL, and between them the JSD in which the teacher's share is β.
        ignore_index: the label of tokens to leave out.
        temperature: divides the logits.
        accum_dtype: of no effect here, where the weight's gradient accumulates in float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states (N, H) and heads (V, H), of the tokens whose label (N,) is not ignored."""
        live = None
        if shift_labels is not None:
            live = _live("shift_labels", shift_labels, student_input, self.ignore_index)
        return _divergence(
            student_input,
            student_weight,
            None,
            teacher_input,
            teacher_weight,
            None,
            live,
            named(self.jsd_beta, "jsd_beta"),
            self.temperature,
        ).loss


def _divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    live: Tensor | None,
    divergence: dict[str, Any],
    temperature: float,
    **hard_term: Any,
) -> DivergenceOutput:
    if len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"student_weight has {len(student_weight)} rows and teacher_weight {len(teacher_weight)}; both must have "
            "one for each token of the vocabulary"
        )
    with _ligers_names():
        return fused_linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            token_weight=live,
            temperature=temperature,
            **divergence,
            **hard_term,
        )


#: What the loss calls its arguments, and what they are called here.
NAMES = {
    "student_hidden": "student_input",
    "teacher_hidden": "teacher_input",
    "hard_labels": "true_labels",
    "hard_weight": "weight_hard_loss / weight_soft_loss",
}


@contextmanager
def _ligers_names() -> Iterator[None]:
    """Errors of the loss name its arguments as Liger does."""
    try:
        yield
    except (ValueError, TypeError) as error:
        message = str(error)
        for name, ligers in NAMES.items():
            message = message.replace(name, ligers)
        raise type(error)(message) from None


def _live(name: str, labels: Any, hidden: Tensor, ignore_index: int) -> Tensor:
    """1 for each token (N,) with a label, and 0 for those that are ignored."""
    if hidden.dim() != 2:
        raise ValueError(f"student_input must have shape (N, H), not {tuple(hidden.shape)}")
    if not isinstance(labels, Tensor) or labels.shape != hidden.shape[:1] or labels.is_floating_point():
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
        without = "; LigerFusedLinearJSD takes none" if labels is None else ""
        raise ValueError(f"{name} must be whole numbers of shape ({len(hidden)},), not {found}{without}")
    return (labels != ignore_index).float()


def _widened(weight: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
    """A head with as many rows, and with logits of 0 for those that it lacks."""
    missing = rows - len(weight)
    if missing <= 0:
        return weight, bias
    return nn.functional.pad(weight, (0, 0, 0, missing)), None if bias is None else nn.functional.pad(
        bias, (0, missing)
    )
