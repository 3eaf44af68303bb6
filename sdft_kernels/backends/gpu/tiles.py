"""A tile of logits in registers: the product that makes it, its biases, its mask, and the logits at labels."""

from __future__ import annotations

import triton
import triton.language as tl

from sdft_kernels.backends.gpu.math import FAR_BELOW, add_bias, transform


@triton.jit
def tile(
    source,
    stride,
    first,
    rows,
    start,
    size,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(BLOCK, BLOCK_K) of a matrix of (rows, size) from row `first` and entry `start` on, entries past the end 0.

    What rows past the end hold does not matter: where no engine copies tiles, the last one again, which needs no mask.
    WHOLE where the entries end with a block.
    """
    if COPIED:
        return source.load([first, start])
    else:
        pointers = source + tl.minimum(first + tl.arange(0, BLOCK), rows - 1).to(tl.int64)[:, None] * stride
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        if WHOLE:
            return tl.load(pointers + columns)
        else:
            return tl.load(pointers + columns, mask=columns < size, other=0.0)


@triton.jit
def product(
    hidden,
    hidden_stride,
    first_row,
    tokens,
    weight,
    weight_stride,
    first_entry,
    vocab,
    size,
    total,
    BLOCK_K: tl.constexpr,
    COPIED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """`total` and the (M, N) products of hidden states and rows of a head."""
    BLOCK_M: tl.constexpr = total.shape[0]
    BLOCK_N: tl.constexpr = total.shape[1]
    for start in range(0, size, BLOCK_K):
        h = tile(hidden, hidden_stride, first_row, tokens, start, size, BLOCK_M, BLOCK_K, COPIED, WHOLE)
        w = tile(weight, weight_stride, first_entry, vocab, start, size, BLOCK_N, BLOCK_K, COPIED, WHOLE)
        total = tl.dot(h, tl.trans(w), total)
    return total


@triton.jit
def biases(bias_pointer, columns, vocab, BLOCK_M: tl.constexpr):
    """The start of a sum of products: the head's bias at `columns`, (1, N), in BLOCK_M rows, or 0 where it has none.

    Added to products that are there already, it would need registers of its own.
    """
    total = tl.zeros([BLOCK_M, columns.shape[1]], tl.float32)
    if bias_pointer is not None:
        total += tl.load(bias_pointer + columns, mask=columns < vocab, other=0.0).to(tl.float32)
    return total


@triton.jit
def finish_logits(y, bias_pointer, columns, vocab, inner, FORM: tl.constexpr):
    """u of (M, N) products at `columns`, (1, N); far below all others past the vocabulary."""
    y = add_bias(y, bias_pointer, columns, vocab)
    return tl.where(columns < vocab, transform(y, inner, FORM), FAR_BELOW)


@triton.jit
def masked_logits(y, start, columns, vocab, inner, FORM: tl.constexpr):
    """The same of products that lack no bias; only the vocabulary's last block takes a mask."""
    u = transform(y, inner, FORM)
    if start + columns.shape[1] > vocab:
        u = tl.where(columns < vocab, u, FAR_BELOW)
    return u


@triton.jit
def has_label(labels, start, BLOCK_N: tl.constexpr):
    """Whether one of the labels is in the block from `start` on, as in few blocks."""
    return tl.max(((labels >= start) & (labels < start + BLOCK_N)).to(tl.int32)) > 0


@triton.jit
def logit_at(u, columns, labels):
    """(M, 1) of u at labels, (M, 1), that are among the columns, else 0."""
    return tl.sum(tl.where(columns == labels, u, 0.0), 1, keep_dims=True)
