"""The scores of one model's logits, as a Triton kernel that passes over a row once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.backends.gpu.math import form, load_logit, load_logits
from sdft_kernels.backends.gpu.sums import fold
from sdft_kernels.divergences import LogitOptions
from sdft_kernels.tokens import TokenScores

BLOCK = 2048
WARPS = 4


def score_rows(logits: Tensor, bias: Tensor | None, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` from (R, V) float32 products and the head's bias, (V,) or None.

    Rows and bias start 16-byte aligned, padded to a multiple of 16 entries.
    """
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    score_kernel[(tokens,)](
        logits,
        bias,
        logits.stride(0),
        vocab,
        *(scores.labels, scores.logprob, scores.top1, scores.entropy, scores.logsumexp),
        *(options.inner, options.factor),
        FORM=form(options),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )


@triton.jit
def score_kernel(
    logits_pointer,
    bias_pointer,
    stride,
    vocab,
    labels_pointer,
    logprob_pointer,
    top1_pointer,
    entropy_pointer,
    logsumexp_pointer,
    inner,
    factor,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * stride
    a = tl.full([1, 1], float("-inf"), tl.float32)
    total = tl.zeros([1, BLOCK], tl.float32)
    dot = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        u = load_logits(logits_pointer, bias_pointer, stride, columns, vocab, inner, FORM)
        a, total, dot, _, _, _ = fold(u, a, total, dot, factor)
    label_u = 0.0
    if labels_pointer is not None:
        label = tl.load(labels_pointer + row)
        label_u = load_logit(logits_pointer, bias_pointer, label, vocab, inner, FORM)
    store_scores(
        label_u,
        tl.max(a),
        tl.sum(total),
        tl.sum(dot),
        factor,
        row,
        logprob_pointer,
        top1_pointer,
        entropy_pointer,
        logsumexp_pointer,
    )


@triton.jit
def store_scores(
    label_u, a, total, dot, factor, row, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer
):
    """The scores of a row, from its running values (see `fold`) and u at its label, if it has one."""
    log_sum = tl.log(total)
    tl.store(entropy_pointer + row, log_sum - dot / total)
    tl.store(logsumexp_pointer + row, a * factor + log_sum)
    if logprob_pointer is not None:
        tl.store(logprob_pointer + row, (label_u - a) * factor - log_sum)
        tl.store(top1_pointer + row, label_u >= a)
