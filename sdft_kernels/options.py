"""What a call of the loss is given: tensors and settings, each one object from the public function to the operator.

`sdft_kernels.arguments` checks both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdft_kernels.divergences import CROSS_ENTROPY, Coarse, HardTerm, LogitOptions, Objective


@dataclass(frozen=True)
class LossInputs:
    """The tensors of `fused_linear_divergence`, which says what each is, in the operator's order.

    Both of the hard term are given, or none. The operator is given a hard weight of 0 and any label in its range where
    the label is ignored.
    """

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    token_weight: Tensor | None
    labels: Tensor | None
    old_logprobs: Tensor | None
    hard_labels: Tensor | None = None
    hard_weight: Tensor | None = None


@dataclass(frozen=True)
class LossOptions:
    """The settings of `fused_linear_divergence`, which says what each means.

    Without a hard term, `hard_temperature` is None.
    """

    divergence: str
    beta: float
    temperature: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    importance_clip: float | None
    reduction: str
    vocab_size: int | None
    max_chunk_bytes: int | None
    backend: str
    hard_temperature: float | None = None

    def compared(self, student_weight: Tensor, teacher_weight: Tensor) -> int:
        """The number of vocabulary entries that are compared: the first ones of both heads."""
        return self.vocab_size or min(student_weight.shape[0], teacher_weight.shape[0])

    @property
    def objective(self) -> Objective:
        """What is computed for each token."""
        return Objective(
            self.divergence,
            self.beta,
            LogitOptions(self.student_logit_scale, self.student_softcap, self.temperature),
            LogitOptions(self.teacher_logit_scale, self.teacher_softcap, self.temperature),
            self.importance_clip,
            None if self.hard_temperature is None else HardTerm(self.hard_temperature),
        )


@dataclass(frozen=True)
class CrossEntropyInputs:
    """The tensors of `fused_linear_cross_entropy`, in the operator's order.

    The operator is given a `token_weight`, which is 0 where the label is ignored.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    token_weight: Tensor | None


@dataclass(frozen=True)
class CrossEntropyOptions:
    """The settings of `fused_linear_cross_entropy`, which says what each means."""

    temperature: float
    logit_scale: float
    softcap: float | None
    label_smoothing: float
    z_loss: float
    entropy_weight: float
    reduction: str
    vocab_size: int | None
    max_chunk_bytes: int | None
    backend: str

    @property
    def objective(self) -> Objective:
        """What is computed for each token."""
        return Objective(
            CROSS_ENTROPY,
            student=LogitOptions(self.logit_scale, self.softcap, self.temperature),
            hard=HardTerm(self.temperature, self.label_smoothing, self.z_loss, self.entropy_weight),
        )


@dataclass(frozen=True)
class TopkInputs:
    """The tensors of `fused_linear_topk_divergence`, in the operator's order."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    teacher_tail_logprob: Tensor | None
    token_weight: Tensor | None
    labels: Tensor | None
    old_logprobs: Tensor | None


@dataclass(frozen=True)
class TopkOptions:
    """The settings of `fused_linear_topk_divergence`, which says what each means."""

    divergence: str
    beta: float
    tail: str
    temperature: float
    logit_scale: float
    softcap: float | None
    importance_clip: float | None
    reduction: str
    vocab_size: int | None
    max_chunk_bytes: int | None
    backend: str

    @property
    def objective(self) -> Objective:
        """What is computed for each token."""
        return Objective(
            CROSS_ENTROPY,
            student=LogitOptions(self.logit_scale, self.softcap, self.temperature),
            importance_clip=self.importance_clip,
            hard=HardTerm(self.temperature),
            coarse=Coarse(self.divergence, self.beta, self.tail),
        )
