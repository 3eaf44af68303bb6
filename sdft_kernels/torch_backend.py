"""Row operations on a block of logits in plain torch, in place: for CPU, and any device without Triton.

A block is worked on in tiles small enough to stay in the last-level cache, since every operation is one pass
over the tile. Each logit's exponential is taken once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_kernels.divergences import DIVERGENCES, Objective, Tile, row_dot
from sdft_kernels.tokens import TokenRows

#: Bytes of one tile's five buffers at the most, about half of a common last-level cache.
TILE_BYTES = 16 << 20


def process_rows(
    student: Tensor,
    teacher: Tensor,
    rows: TokenRows,
    objective: Objective,
    gradient: Tensor | None,
) -> None:
    """Fills `rows` from (R, V) products of hidden states and heads, which are overwritten.

    `gradient`, where wanted, receives rows.weight · dL/dlogits; it may be `student` itself.
    """
    tokens, vocab = student.shape
    size = max(1, min(tokens, TILE_BYTES // (4 * student.element_size() * vocab)))
    scratch = student.new_empty((2 if objective.student_softcap is None else 3, size, vocab))
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        _process_tile(student[part], teacher[part], rows[part], objective, scratch, gradient is not None)
    if gradient is not None and gradient is not student:
        gradient.copy_(student)


def _process_tile(
    student: Tensor,
    teacher: Tensor,
    rows: TokenRows,
    objective: Objective,
    scratch: Tensor,
    with_gradient: bool,
) -> None:
    tokens = student.shape[0]
    temperature = objective.temperature
    capped = None if objective.student_softcap is None else scratch[2, :tokens]
    _transform(student, objective.student_scale, objective.student_softcap, temperature, keep_tanh=capped)
    _transform(teacher, objective.teacher_scale, objective.teacher_softcap, temperature)
    q, q_sum = _exponentials(teacher, rows.labels, out=scratch[1, :tokens], into=rows.teacher_logprob)
    p, p_sum = _exponentials(student, rows.labels, out=scratch[0, :tokens], into=rows.student_logprob)
    rows.teacher_entropy.copy_((q_sum.log() - row_dot(q, teacher) / q_sum).squeeze(1))
    rows.student_entropy.copy_((p_sum.log() - row_dot(p, student) / p_sum).squeeze(1))
    if rows.old_logprobs is not None and rows.student_logprob is not None:
        rows.weight.mul_(importance_weight(rows.student_logprob, rows.old_logprobs, objective.importance_clip))

    tile = Tile(student, teacher, p, q, p_sum, q_sum)
    factor = rows.weight.unsqueeze(1) * (objective.student_scale / temperature) if with_gradient else None
    rows.loss.copy_(DIVERGENCES[objective.divergence](tile, objective.beta, factor).squeeze(1))
    if with_gradient and capped is not None:
        student.mul_(capped.square_().neg_().add_(1))


def importance_weight(logprob: Tensor, old_logprob: Tensor, clip: float | None) -> Tensor:
    """min(exp(logprob - old_logprob), clip): how much likelier the sampled token is now than when sampled."""
    ratio = torch.exp(logprob - old_logprob)
    return ratio if clip is None else ratio.clamp_(max=clip)


def _transform(
    logits: Tensor, scale: float, softcap: float | None, temperature: float, keep_tanh: Tensor | None = None
) -> None:
    """y → z in place; tanh(y / softcap) goes to `keep_tanh`, which its derivative needs."""
    if softcap is None:
        if scale != temperature:
            logits.mul_(scale / temperature)
        return
    logits.mul_(scale / softcap).tanh_()
    if keep_tanh is not None:
        keep_tanh.copy_(logits)
    logits.mul_(softcap / temperature)


def _exponentials(logits: Tensor, labels: Tensor | None, *, out: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """Takes each row's maximum off in place; exponentials and their row sums; the labels' log-probs `into`."""
    logits.sub_(logits.amax(1, keepdim=True))
    exponentials = torch.exp(logits, out=out)
    total = exponentials.sum(1, keepdim=True)
    if labels is not None and into is not None:
        into.copy_((logits.gather(1, labels.unsqueeze(1)) - total.log()).squeeze(1))
    return exponentials, total
