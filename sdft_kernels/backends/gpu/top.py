"""The coarse divergence of a block of logits, by the kernels of a cross-entropy.

Before they read the logits, the entries that the teacher gives are taken out, so that the softmax is the rest's.
Between their last two, torch compares the few outcomes of each row and replaces the constants of the gradient, into
which the entries' own is then put.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_kernels.backends.gpu.divergence import ROW_CENTRE, ROW_FACTOR, process_rows
from sdft_kernels.backends.tiles import Target
from sdft_kernels.backends.torch import compare_top, store_top
from sdft_kernels.divergences import MASKED, LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TopTokens


def process_top_rows(
    student: Tensor,
    top: TopTokens,
    rows: TokenRows,
    objective: Objective,
    gradient: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """Fills `rows` and `gradient` as `process_rows` does, from (R, V) float32 products, which are overwritten."""
    tokens, vocab = student.shape
    if tokens == 0:
        return
    options = objective.student
    ids = top.ids.where(top.ids < vocab, top.ids[:, :1])  # what is no entry is a row's first one once more
    u = _u_at(student, ids, bias, options)
    label_z = None
    if rows.labels is not None:
        label_z = options.factor * _u_at(student, rows.labels.unsqueeze(1), bias, options).squeeze(1).double()
    masked = -torch.inf if options.softcap is not None else MASKED
    student.scatter_(1, ids, -masked if options.inner < 0 else masked)
    unused, entropy, logsumexp = (torch.empty_like(rows.loss) for _ in range(3))
    rest = TokenRows(rows.weight, None, None, unused, entropy, None, torch.zeros_like(unused), None, logsumexp)
    lacking: list[Tensor] = []

    def compare_rows(constants: Tensor | None) -> None:
        z = options.factor * u.double()
        compared = compare_top(rows, objective, z.T, logsumexp.double(), entropy.double(), vocab)
        store_top(rows, objective, compared, label_z)
        factor = rows.weight.double() * (options.scale / options.temperature)
        if constants is not None:
            constants[:, ROW_CENTRE.value] = -compared.of_rest
            constants[:, ROW_FACTOR.value] = factor
            of_entries = Target.of(ids.T, u.T, options, factor * compared.of_entries.T).weight.T
            lacking.append(torch.where(factor.unsqueeze(1) == 0, 0, of_entries))

    process_rows(student, None, rest, objective, gradient, bias, before_gradient=compare_rows)
    if gradient is not None:
        entries = lacking.pop()
        gradient.scatter_(1, ids, entries.where(top.ids < vocab, entries[:, :1]).to(gradient.dtype))


def _u_at(products: Tensor, ids: Tensor, bias: Tensor | None, options: LogitOptions) -> Tensor:
    """u at some entries of each row, (R, K)."""
    y = products.gather(1, ids)
    u = (y if bias is None else y + bias[ids]) * options.inner
    return u if options.softcap is None else u.tanh_()
