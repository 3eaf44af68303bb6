"""What one model's logits say of each token, as a Triton kernel: one pass over the row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.divergences import LogitOptions
from sdft_kernels.tokens import TokenScores
from sdft_kernels.triton_math import load_logits, transform

BLOCK = 2048
WARPS = 4


def score_rows(logits: Tensor, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` from (R, V) float32 products, rows 16-byte aligned and padded to a multiple of 16 entries."""
    tokens, vocab = logits.shape
    if tokens == 0:
        return
    score_kernel[(tokens,)](
        logits,
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
    """One program a row, with a running maximum a: Σ exp(z - a) and Σ exp(z - a) (z - a)."""
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * stride
    a = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        z = load_logits(logits_pointer, stride, start + tl.arange(0, BLOCK), vocab, scale, softcap, temperature, CAPPED)
        new_a = tl.maximum(a, tl.max(z, 0))
        shift = tl.where(start == 0, 0.0, a - new_a)
        dot = tl.exp(shift) * (dot + shift * total)
        total *= tl.exp(shift)
        a = new_a
        z -= a
        e = tl.exp(z)
        total += e
        dot += e * z
    whole = tl.sum(total, 0)
    log_sum = tl.log(whole)
    tl.store(entropy_pointer + row, log_sum - tl.sum(dot, 0) / whole)
    tl.store(logsumexp_pointer + row, a + log_sum)
    if labels_pointer is not None:
        z = transform(tl.load(logits_pointer + tl.load(labels_pointer + row)), scale, softcap, temperature, CAPPED)
        tl.store(logprob_pointer + row, (z - a) - log_sum)
        tl.store(top1_pointer + row, z >= a)
