"""What one model's logits say of each token, as a Triton kernel: one pass over the row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.divergences import LogitOptions
from sdft_kernels.tokens import TokenScores
from sdft_kernels.triton_math import load_logit, load_logits
from sdft_kernels.triton_sums import fold

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
        *(options.scale, options.softcap or 1.0, options.temperature),
        CAPPED=options.softcap is not None,
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
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
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
        z = load_logits(logits_pointer, bias_pointer, stride, columns, vocab, scale, softcap, temperature, CAPPED)
        a, total, dot, _, _, _ = fold(z, a, total, dot)
    label_logit = 0.0
    if labels_pointer is not None:
        label = tl.load(labels_pointer + row)
        label_logit = load_logit(logits_pointer, bias_pointer, label, vocab, scale, softcap, temperature, CAPPED)
    store_scores(
        label_logit,
        tl.max(a),
        tl.sum(total),
        tl.sum(dot),
        row,
        logprob_pointer,
        top1_pointer,
        entropy_pointer,
        logsumexp_pointer,
    )


@triton.jit
def store_scores(label_logit, a, total, dot, row, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer):
    """What a row's maximum a, Σ exp(z - a), Σ exp(z - a) (z - a) and its label's logit, if it has one, say of it."""
    log_sum = tl.log(total)
    tl.store(entropy_pointer + row, log_sum - dot / total)
    tl.store(logsumexp_pointer + row, a + log_sum)
    if logprob_pointer is not None:
        tl.store(logprob_pointer + row, (label_logit - a) - log_sum)
        tl.store(top1_pointer + row, label_logit >= a)
