"""The definition: the same loss in plain full-logits torch, differentiated by autograd.

Slow, and it holds every logit; nothing but tests and benchmarks should call it. Give it float64 tensors to get
the values that the fused loss is measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdft_kernels.outputs import DivergenceOutput


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z = softcap(scale · (h Wᵀ + b)) / temperature, (N, V)."""
    y = hidden @ weight.T
    if bias is not None:
        y = y + bias
    y = scale * y
    if softcap is not None:
        y = softcap * torch.tanh(y / softcap)
    return y / temperature


def divergence_per_token(log_p: Tensor, log_q: Tensor, divergence: str, beta: float = 0.5) -> Tensor:
    """The divergence of each row of two (N, V) tensors of log-probabilities, (N,)."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    kl_p = (p * (log_p - log_m)).sum(-1)
    kl_q = (q * (log_q - log_m)).sum(-1)
    return {"jsd": (1 - beta) * kl_p + beta * kl_q, "skew_reverse_kl": kl_p, "skew_forward_kl": kl_q}[
        divergence
    ]


def reference_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> DivergenceOutput:
    """As `sdft_kernels.fused_linear_divergence`, which documents the arguments, with all logits held."""
    vocab = vocab_size or min(student_weight.shape[0], teacher_weight.shape[0])
    weight = (
        torch.ones_like(student_hidden[:, 0])
        if token_weight is None
        else token_weight.to(student_hidden.dtype)
    )
    live = (weight != 0).unsqueeze(1)
    log_p = logits(
        torch.where(live, student_hidden, 0),
        student_weight[:vocab],
        None if student_bias is None else student_bias[:vocab],
        scale=student_logit_scale,
        softcap=student_softcap,
        temperature=temperature,
    ).log_softmax(-1)
    with torch.no_grad():
        log_q = logits(
            torch.where(live, teacher_hidden, 0),
            teacher_weight[:vocab],
            None if teacher_bias is None else teacher_bias[:vocab],
            scale=teacher_logit_scale,
            softcap=teacher_softcap,
            temperature=temperature,
        ).log_softmax(-1)
    token_loss = torch.where(live.squeeze(1), divergence_per_token(log_p, log_q, divergence, beta), 0)

    def reported(x: Tensor) -> Tensor:
        return torch.where(live.squeeze(1), x.detach(), 0)

    student_logprob = teacher_logprob = None
    effective = weight
    if labels is not None:
        student_logprob = reported(log_p.gather(1, labels.unsqueeze(1)).squeeze(1))
        teacher_logprob = reported(log_q.gather(1, labels.unsqueeze(1)).squeeze(1))
        if old_logprobs is not None:
            ratio = torch.exp(torch.where(live.squeeze(1), student_logprob - old_logprobs, 0))
            effective = weight * (ratio if importance_clip is None else ratio.clamp(max=importance_clip))
    weighted = effective * token_loss
    total = weight.sum()
    loss = {
        "none": weighted,
        "sum": weighted.sum(),
        "mean": weighted.sum() / torch.where(total == 0, 1, total),
    }[reduction]
    return DivergenceOutput(
        loss=loss,
        token_loss=token_loss.detach(),
        student_entropy=reported(-(log_p.exp() * log_p).sum(-1)),
        teacher_entropy=reported(-(log_q.exp() * log_q).sum(-1)),
        student_logprob=student_logprob,
        teacher_logprob=teacher_logprob,
    )
