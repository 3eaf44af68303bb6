"""What the losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DivergenceOutput(NamedTuple):
    """The result of `fused_linear_divergence`.

    Everything but `loss` is detached, float32 (float64 for float64 inputs), in nats, and 0 for a token whose
    weight is 0.

    Attributes:
        loss: scalar, or (N,) for reduction="none"; differentiable.
        token_loss: (N,) the divergence of each token, unweighted.
        student_entropy: (N,) entropy of the student's next-token distribution.
        teacher_entropy: (N,) entropy of the teacher's.
        student_logprob: (N,) the student's log-probability of the label; None without labels.
        teacher_logprob: (N,) the teacher's.
        hard_loss: (N,) the cross-entropy of the hard labels, unweighted; None without hard labels.
    """

    loss: Tensor
    token_loss: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    hard_loss: Tensor | None = None


class CrossEntropyOutput(NamedTuple):
    """The result of `fused_linear_cross_entropy`.

    Everything but `loss` is detached, float32 (float64 for float64 inputs), in nats, and 0 for a token that is ignored
    or whose weight is 0.

    Attributes:
        loss: scalar, or (N,) for reduction="none"; differentiable.
        token_loss: (N,) the loss of each token, unweighted, with all that `label_smoothing`, `z_loss` and
            `entropy_weight` add.
        logprob: (N,) log-probability of the label.
        entropy: (N,) entropy of the next-token distribution.
        logsumexp: (N,) log Σ exp(z) over the vocabulary.
    """

    loss: Tensor
    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor


class TopkDivergenceOutput(NamedTuple):
    """The result of `fused_linear_topk_divergence`.

    Everything but `loss` is detached, float32 (float64 for float64 inputs), in nats, and 0 for a token whose weight
    is 0.

    Attributes:
        loss: scalar, or (N,) for reduction="none"; differentiable.
        token_loss: (N,) the divergence of each token, unweighted.
        student_entropy: (N,) entropy of the student's next-token distribution over the whole vocabulary.
        student_tail_logprob: (N,) the student's log-probability of all entries that the teacher does not give, -inf
            where it gives all. Far above the teacher's, it says that the student has left what the entries cover.
        student_logprob: (N,) the student's log-probability of the label; None without labels.
    """

    loss: Tensor
    token_loss: Tensor
    student_entropy: Tensor
    student_tail_logprob: Tensor
    student_logprob: Tensor | None
