"""The divergence as a torch operator: its schema and its fake kernel; autograd.py has its formula."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import autograd, registration
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunk_loop import Side, Wanted, check_labels, run_chunks, token_weights
from sdft_kernels.options import LossInputs, LossOptions
from sdft_kernels.tokens import LiveTokens, TokenRows, on_its_device

OpResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@registration.flat
def forward(
    given: LossInputs,
    options: LossOptions,
    operands: torch.dtype,
    wanted: Wanted,
) -> OpResult:
    """Returns the loss, six vectors over tokens, the gradients of hidden states, head and bias, and the factor that
    these gradients are still to be multiplied with.

    What is not wanted comes back empty. `operands` is the dtype of the products' operands.
    """
    hidden, labels, old_logprobs = given.student_hidden, given.labels, given.old_logprobs
    dtypes = Dtypes.of(operands, given.student_weight.dtype, hidden.device)
    live = LiveTokens(given.token_weight, hidden.shape[0])
    weight, missing_factor = token_weights(
        live, given.token_weight, hidden, options.reduction, dtypes, options.objective
    )
    vocab = options.compared(given.student_weight, given.teacher_weight)
    if labels is not None:
        labels = live.take(labels).contiguous()
        check_labels(labels, vocab)
    if old_logprobs is not None:
        old_logprobs = live.take(old_logprobs).to(dtypes.wide).contiguous()
    loss, student_entropy, teacher_entropy = (hidden.new_empty(live.count, dtype=dtypes.wide) for _ in range(3))
    logprobs = [None if labels is None else torch.empty_like(loss) for _ in range(2)]
    rows = TokenRows(weight, labels, old_logprobs, loss, student_entropy, teacher_entropy, logprobs[0], logprobs[1])
    if given.hard_labels is not None and given.hard_weight is not None:
        rows.hard_labels = live.take(given.hard_labels).contiguous()
        rows.hard_weight = live.take(given.hard_weight).to(dtypes.wide).contiguous()
        rows.hard_loss = torch.empty_like(loss)
        check_labels(rows.hard_labels, vocab, "hard_labels")
    # Autocast has had its say in `operands`; from here on it would lower the softmax arithmetic as well.
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        gradients = run_chunks(
            Side(hidden, given.student_weight, given.student_bias),
            Side(given.teacher_hidden, given.teacher_weight, given.teacher_bias),
            live,
            rows,
            options,
            vocab,
            dtypes,
            wanted,
        )
    hard = 0 if rows.hard_weight is None or rows.hard_loss is None else rows.hard_weight * rows.hard_loss
    weighted = live.spread(rows.weight * (loss + hard))
    student_logprob, teacher_logprob, hard_loss = (
        loss.new_empty(0) if v is None else live.spread(v) for v in (*logprobs, rows.hard_loss)
    )
    return (
        (weighted if options.reduction == "none" else weighted.sum()) * missing_factor,
        live.spread(loss),
        live.spread(student_entropy),
        live.spread(teacher_entropy),
        student_logprob,
        teacher_logprob,
        hard_loss,
        gradients.hidden,
        gradients.weight.to(dtypes.head_gradient),
        gradients.bias,
        missing_factor,
    )


def _fake(*values: Any) -> OpResult:
    given = dict(zip(inspect.signature(forward).parameters, values, strict=True))
    hidden, weight = given["student_hidden"], given["student_weight"]
    wide = Dtypes.of(given["operands"], weight.dtype, hidden.device).wide
    tokens = hidden.shape[0]
    labelled = 0 if given["labels"] is None else tokens
    return (
        hidden.new_empty((tokens,) if given["reduction"] == "none" else (), dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(labelled, dtype=wide),
        hidden.new_empty(labelled, dtype=wide),
        hidden.new_empty(0 if given["hard_labels"] is None else tokens, dtype=wide),
        *autograd.empty_gradients(given, hidden, weight),
    )


fused_linear_divergence_op = autograd.differentiable("fused_linear_divergence", forward, _fake)
