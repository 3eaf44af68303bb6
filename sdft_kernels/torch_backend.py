"""Row operations on a block of logits in plain torch, in place: for CPU, and any device without Triton.

A block is worked on in tiles small enough to stay in the last-level cache, since every operation is one pass
over the tile. Each logit's exponential is taken once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_kernels.divergences import DIVERGENCES, LogitOptions, Objective, Tile, row_dot
from sdft_kernels.tokens import TokenRows, TokenScores

#: Bytes of a tile of four buffers at the most: a quarter of a common last-level cache was fastest of what was tried.
TILE_BYTES = 8 << 20


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
    scratch = student.new_empty((2 if objective.student.softcap is None else 3, size, vocab))
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        _process_tile(student[part], teacher[part], rows[part], objective, scratch, gradient is not None)
    if gradient is not None and gradient is not student:
        gradient.copy_(student)


def _process_tile(
    student: Tensor, teacher: Tensor, rows: TokenRows, objective: Objective, scratch: Tensor, with_gradient: bool
) -> None:
    options, tokens = objective.student, student.shape[0]
    capped = None if options.softcap is None else scratch[2, :tokens]
    _transform(student, options, keep_tanh=capped)
    _transform(teacher, objective.teacher)
    p, p_sum, _ = _exponentials(student, scratch[0, :tokens])
    q, q_sum, _ = _exponentials(teacher, scratch[1, :tokens])
    rows.student_entropy.copy_(_entropy(student, p, p_sum))
    rows.teacher_entropy.copy_(_entropy(teacher, q, q_sum))
    if rows.labels is not None and rows.student_logprob is not None and rows.teacher_logprob is not None:
        rows.student_logprob.copy_(_label_logits(student, rows.labels) - p_sum.log().squeeze(1))
        rows.teacher_logprob.copy_(_label_logits(teacher, rows.labels) - q_sum.log().squeeze(1))
        if rows.old_logprobs is not None:
            rows.weight.mul_(importance_weight(rows.student_logprob, rows.old_logprobs, objective.importance_clip))

    tile = Tile(student, teacher, p, q, p_sum, q_sum)
    factor = rows.weight.unsqueeze(1) * (options.scale / options.temperature) if with_gradient else None
    rows.loss.copy_(DIVERGENCES[objective.divergence](tile, objective.beta, factor).squeeze(1))
    if with_gradient and capped is not None:
        student.mul_(capped.square_().neg_().add_(1))


def score_rows(logits: Tensor, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` from (R, V) products of hidden states and a head, which are overwritten."""
    tokens, vocab = logits.shape
    size = max(1, min(tokens, TILE_BYTES // (2 * logits.element_size() * vocab)))
    scratch = logits.new_empty((size, vocab))
    for start in range(0, tokens, size):
        tile, rows = logits[start : start + size], scores[start : start + size]
        _transform(tile, options)
        exponentials, total, largest = _exponentials(tile, scratch[: tile.shape[0]])
        rows.entropy.copy_(_entropy(tile, exponentials, total))
        rows.logsumexp.copy_((largest + total.log()).squeeze(1))
        if rows.labels is not None and rows.logprob is not None and rows.top1 is not None:
            below_largest = _label_logits(tile, rows.labels)
            rows.logprob.copy_(below_largest - total.log().squeeze(1))
            rows.top1.copy_(below_largest >= 0)


def importance_weight(logprob: Tensor, old_logprob: Tensor, clip: float | None) -> Tensor:
    """min(exp(logprob - old_logprob), clip): how much likelier the sampled token is now than when sampled."""
    ratio = torch.exp(logprob - old_logprob)
    return ratio if clip is None else ratio.clamp_(max=clip)


def _transform(logits: Tensor, options: LogitOptions, keep_tanh: Tensor | None = None) -> None:
    """y → z in place; tanh(y / softcap) goes to `keep_tanh`, which its derivative needs."""
    if options.softcap is None:
        if options.scale != options.temperature:
            logits.mul_(options.scale / options.temperature)
        return
    logits.mul_(options.scale / options.softcap).tanh_()
    if keep_tanh is not None:
        keep_tanh.copy_(logits)
    logits.mul_(options.softcap / options.temperature)


def _exponentials(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes each row's maximum off in place; the exponentials, and their row sums and the maxima, (R, 1)."""
    largest = logits.amax(1, keepdim=True)
    exponentials = torch.exp(logits.sub_(largest), out=out)
    return exponentials, exponentials.sum(1, keepdim=True), largest


def _entropy(logits: Tensor, exponentials: Tensor, total: Tensor) -> Tensor:
    """(R,) from logits less their maximum, their exponentials and the sums of these."""
    return (total.log() - row_dot(exponentials, logits) / total).squeeze(1)


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1)
