"""The definition: the same losses in plain full-logits torch, differentiated by autograd.

Slow, and it holds every logit; nothing but tests and benchmarks should call it. Give it float64 tensors to get
the values that the fused loss is measured against.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sdft_kernels.divergences import MASKED
from sdft_kernels.outputs import CrossEntropyOutput, DivergenceOutput, TopkDivergenceOutput


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z = softcap(scale · (h Wᵀ + b)) / temperature, (N, V); where b is -inf, a constant -2^100 · |scale| is capped."""
    y = scale * (hidden @ weight.T)
    if bias is not None:
        bias = bias.to(y)
        y = torch.where(bias > MASKED, y + scale * bias, abs(scale) * MASKED)
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
    return {"jsd": (1 - beta) * kl_p + beta * kl_q, "skew_reverse_kl": kl_p, "skew_forward_kl": kl_q}[divergence]


def cross_entropy_per_token(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
) -> Tensor:
    """The cross-entropy of each row of (N, V) logits with its label, and what the options add, (N,)."""
    log_p = logits.log_softmax(-1)
    label_logprob = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    likelihood = (1 - label_smoothing) * label_logprob + label_smoothing * log_p.mean(-1)
    return -likelihood + z_loss * logits.logsumexp(-1).square() - entropy_weight * entropy


def coarse_per_token(
    log_p: Tensor,
    ids: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor,
    divergence: str,
    beta: float = 0.5,
    *,
    tail: str = "bucket",
) -> tuple[Tensor, Tensor]:
    """Of each row of (N, V) log-probabilities, (N,): the divergence from a teacher who gives K entries, (N, K), and the
    rest's log-probability, (N,); and the student's log-probability of the rest. What is -inf is no entry."""
    given = teacher_logprobs > -math.inf
    rest = torch.ones_like(log_p).scatter_add(1, torch.where(given, ids, 0), -given.to(log_p)) > 0
    some = rest.any(-1, keepdim=True)
    student_tail = torch.where(rest | ~some, log_p, -math.inf).logsumexp(-1, keepdim=True)
    outcomes = torch.cat((given, some & (tail == "bucket")), 1)

    def normalised(entries: Tensor, rest: Tensor) -> Tensor:
        both = torch.where(outcomes, torch.cat((entries, rest), 1), -math.inf)
        return torch.where(outcomes, both.log_softmax(-1), MASKED)

    student_tail = torch.where(some, student_tail, -math.inf)
    log_p_coarse = normalised(log_p.gather(1, torch.where(given, ids, 0)), student_tail)
    log_q_coarse = normalised(teacher_logprobs, teacher_tail.unsqueeze(1).clamp(min=MASKED))
    return divergence_per_token(log_p_coarse, log_q_coarse, divergence, beta), student_tail.squeeze(1)


def reduced(weighted: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """Σ w·L / Σ w, Σ w·L, or w·L of each token, from w·L and w, (N,)."""
    total = weight.sum()
    return {
        "none": weighted,
        "sum": weighted.sum(),
        "mean": weighted.sum() / torch.where(total == 0, 1, total),
    }[reduction]


def divergence_of_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    hard_weight: float | Tensor | None = None,
    hard_labels: Tensor | None = None,
    hard_temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> DivergenceOutput:
    """The loss of two (N, V) tensors of logits z, differentiable with respect to the student's.

    `temperature` has divided them; the hard term's logits are z · temperature / hard_temperature.
    """
    weight = torch.ones_like(student_logits[:, 0]) if token_weight is None else token_weight.to(student_logits.dtype)
    live = weight != 0
    log_p = student_logits.log_softmax(-1)
    log_q = teacher_logits.detach().log_softmax(-1)

    def spared(x: Tensor) -> Tensor:
        return torch.where(live, x, 0)

    token_loss = spared(divergence_per_token(log_p, log_q, divergence, beta))
    student_logprob = teacher_logprob = None
    effective = weight
    if labels is not None:
        targets = torch.where(live, labels, 0).unsqueeze(1)
        student_logprob = spared(log_p.detach().gather(1, targets).squeeze(1))
        teacher_logprob = spared(log_q.gather(1, targets).squeeze(1))
        if old_logprobs is not None:
            effective = weight * spared(student_logprob - old_logprobs).exp().clamp(max=importance_clip or math.inf)
    with_hard, hard_loss = token_loss, None
    if hard_labels is not None:
        counted = live & (hard_labels != ignore_index)
        hard_logits = student_logits * (temperature / hard_temperature)
        hard_loss = torch.where(counted, cross_entropy_per_token(hard_logits, torch.where(counted, hard_labels, 0)), 0)
        with_hard = token_loss + (1.0 if hard_weight is None else hard_weight) * hard_loss
    return DivergenceOutput(
        loss=reduced(effective * with_hard, weight, reduction),
        token_loss=token_loss.detach(),
        student_entropy=spared(-(log_p.exp() * log_p).sum(-1)).detach(),
        teacher_entropy=spared(-(log_q.exp() * log_q).sum(-1)),
        student_logprob=student_logprob,
        teacher_logprob=teacher_logprob,
        hard_loss=None if hard_loss is None else hard_loss.detach(),
    )


def reference_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> DivergenceOutput:
    """As `sdft_kernels.fused_linear_divergence`, which documents the arguments, with all logits held."""
    vocab = vocab_size or min(student_weight.shape[0], teacher_weight.shape[0])
    token_weight = options.get("token_weight")

    def side(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
        if token_weight is not None:
            hidden = torch.where((token_weight != 0).unsqueeze(1), hidden, 0)
        bias = None if bias is None else bias[:vocab]
        return logits(hidden, weight[:vocab], bias, scale=scale, softcap=softcap, temperature=temperature)

    student = side(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    with torch.no_grad():
        teacher = side(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    return divergence_of_logits(student, teacher, temperature=temperature, **options)


def reference_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    **options: float,
) -> CrossEntropyOutput:
    """As `sdft_kernels.fused_linear_cross_entropy`, which documents the arguments, with all logits held."""
    token_weight = torch.ones_like(hidden[:, 0]) if token_weight is None else token_weight.to(hidden.dtype)
    token_weight = torch.where(labels == ignore_index, 0, token_weight)
    live = token_weight != 0
    hidden, labels = torch.where(live.unsqueeze(1), hidden, 0), torch.where(live, labels, 0)
    bias = None if bias is None else bias[:vocab_size]
    z = logits(hidden, weight[:vocab_size], bias, scale=logit_scale, softcap=softcap, temperature=temperature)
    log_p = z.detach().log_softmax(-1)
    token_loss = torch.where(live, cross_entropy_per_token(z, labels, **options), 0)
    return CrossEntropyOutput(
        loss=reduced(token_weight * token_loss, token_weight, reduction),
        token_loss=token_loss.detach(),
        logprob=torch.where(live, log_p.gather(1, labels.unsqueeze(1)).squeeze(1), 0),
        entropy=torch.where(live, -(log_p.exp() * log_p).sum(-1), 0),
        logsumexp=torch.where(live, z.detach().logsumexp(-1), 0),
    )


def reference_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
) -> TopkDivergenceOutput:
    """As `sdft_kernels.fused_linear_topk_divergence`, which documents the arguments, with all logits held."""
    token_weight = torch.ones_like(hidden[:, 0]) if token_weight is None else token_weight.to(hidden.dtype)
    live = token_weight != 0
    hidden = torch.where(live.unsqueeze(1), hidden, 0)
    bias = None if bias is None else bias[:vocab_size]
    z = logits(hidden, weight[:vocab_size], bias, scale=logit_scale, softcap=softcap, temperature=temperature)
    log_p, teacher_logprobs = z.log_softmax(-1), teacher_logprobs.to(z)
    if teacher_tail_logprob is None:
        teacher_tail_logprob = torch.log((1 - teacher_logprobs.exp().sum(-1)).clamp(min=1e-7))
    token_loss, student_tail = coarse_per_token(
        log_p, teacher_ids, teacher_logprobs, teacher_tail_logprob.to(z), divergence, beta, tail=tail
    )
    token_loss, student_logprob, effective = torch.where(live, token_loss, 0), None, token_weight
    if labels is not None:
        targets = torch.where(live, labels, 0).unsqueeze(1)
        student_logprob = torch.where(live, log_p.detach().gather(1, targets).squeeze(1), 0)
        if old_logprobs is not None:
            ratio = torch.where(live, student_logprob - old_logprobs, 0).exp()
            effective = token_weight * ratio.clamp(max=importance_clip or math.inf)
    return TopkDivergenceOutput(
        loss=reduced(effective * token_loss, token_weight, reduction),
        token_loss=token_loss.detach(),
        student_entropy=torch.where(live, -(log_p.exp() * log_p).sum(-1), 0).detach(),
        student_tail_logprob=torch.where(live, student_tail, 0).detach(),
        student_logprob=student_logprob,
    )
