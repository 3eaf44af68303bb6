"""Hidden states times heads on the tensor cores, each tile of logits folded into running sums where it was made.

No logit reaches device memory. A program has a tile of tokens and a split of the vocabulary, and leaves a record for
each of its tokens; a second, tiny kernel makes the tokens' values of their splits' records. For half-precision
operands only: float32 ones would be rounded to TF32. There is no gradient here, and no divergence from a mixture,
whose second pass would have to multiply again.

Programs that run together have neighbouring tiles of tokens and the same split, so that they share the head's tiles
in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.backends.gpu.divergence import combine, kernel_settings
from sdft_kernels.backends.gpu.math import form, split_columns
from sdft_kernels.backends.gpu.operands import Tile, choices, copies_tiles, operand, source
from sdft_kernels.backends.gpu.scoring import store_scores
from sdft_kernels.backends.gpu.sums import DOT, PEAK, RECORD, SUM, fold, fold_pair, merge, store_pair
from sdft_kernels.backends.gpu.tiles import biases, finish_logits, has_label, logit_at, masked_logits, product, tile
from sdft_kernels.backends.interface import HeadOperands
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores

#: The tiles that the tuner tries, for one model and for two: tokens, vocabulary entries, hidden entries, and warps.
#: Larger ones leave no registers for a soft cap and a bias, or for the second model. AMD's are small enough for
#: triton 3.6 too, whose code needs more registers. On Hopper an engine copies whole tiles, and matrix products read
#: them where it puts them: so threads hold nothing but sums, and tiles are larger (docs/gpu.md: 1.2 to 1.8 times as
#: fast).
SCORE_TILES: dict[str, tuple[Tile, ...]] = {
    "hopper": ((128, 256, 64, 8), (128, 128, 64, 8)),
    "cuda": ((128, 128, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)),
    "hip": ((128, 64, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)),
}
PROCESS_TILES: dict[str, tuple[Tile, ...]] = {
    "hopper": ((128, 128, 64, 8),),
    "cuda": ((128, 64, 64, 8), (64, 64, 64, 8)),
    "hip": ((64, 64, 64, 4), (64, 64, 32, 4)),
}
LARGEST_TILE = (128, 256)
LARGEST_BLOCK_K = 64

#: So many programs keep a large device busy: it has 132 multiprocessors, which run two programs each, or two in turn.
ENOUGH_PROGRAMS = 264
MOST_SPLITS = 256

#: A split's record for one model is 4 floats, 16 bytes. The first three are those of a pair's record.
SCORE_RECORD = tl.constexpr(4)


def score_hidden(hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    tokens, vocab = len(hidden), len(head.weight)
    if tokens == 0:
        return
    splits = split_vocabulary(tokens, vocab)
    hidden, weight = operand(hidden), operand(head.weight)
    partial = hidden.new_empty((tokens, splits, SCORE_RECORD.value), dtype=torch.float32)
    copied = copies_tiles(hidden) and head.bias is None  # a large tile leaves no registers for a bias
    score_hidden_kernel[_grid(tokens, splits)](
        *(source(hidden, copied), source(weight, copied), head.bias, hidden.stride(0), weight.stride(0)),
        *(tokens, vocab, hidden.shape[1], splits),
        *(partial, scores.labels, scores.logprob),
        *(options.inner, options.factor),
        FORM=form(options),
        WHOLE_BLOCKS=hidden.shape[1] % LARGEST_BLOCK_K == 0,
        COPIED=copied,
    )
    combine_scores_kernel[(tokens,)](
        *(partial, scores.logprob, scores.top1, scores.entropy, scores.logsumexp, options.factor),
        SPLITS=splits,
        num_warps=1,
    )


def process_hidden(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: HeadOperands,
    teacher: HeadOperands,
    rows: TokenRows,
    objective: Objective,
) -> None:
    """Fills `rows` for reverse or forward KL of C tokens' hidden states, (C, Hs) and (C, Ht).

    Where the heads are the same tensor, each of its tiles is loaded once for both.
    """
    tokens, vocab = len(student_hidden), len(student.weight)
    if tokens == 0:
        return
    shared_head = teacher.weight is student.weight
    student_weight = operand(student.weight)
    teacher_weight = student_weight if shared_head else operand(teacher.weight)
    student_hidden, teacher_hidden = operand(student_hidden), operand(teacher_hidden)
    splits = split_vocabulary(tokens, vocab)
    partial = student_hidden.new_empty((tokens, splits, RECORD.value), dtype=torch.float32)
    copied = copies_tiles(student_hidden) and student.bias is None and teacher.bias is None
    process_hidden_kernel[_grid(tokens, splits)](
        *(source(student_hidden, copied), source(student_weight, copied), student.bias),
        *(student_hidden.stride(0), student_weight.stride(0), student_hidden.shape[1]),
        *(source(teacher_hidden, copied), source(teacher_weight, copied), teacher.bias),
        *(teacher_hidden.stride(0), teacher_weight.stride(0), teacher_hidden.shape[1]),
        *(tokens, vocab, splits),
        *(partial, rows.labels, rows.student_logprob, rows.teacher_logprob),
        **kernel_settings(objective),
        SHARED_HEAD=shared_head,
        WHOLE_BLOCKS=student_hidden.shape[1] % LARGEST_BLOCK_K == 0 and teacher_hidden.shape[1] % LARGEST_BLOCK_K == 0,
        COPIED=copied,
    )
    combine(partial, None, None, None, rows, objective, vocab)


def split_vocabulary(tokens: int, vocab: int) -> int:
    """How many programs share a tile of tokens: a power of two that fills the device, at most the head's tiles."""
    splits, (tile_tokens, tile_vocab) = 1, LARGEST_TILE
    tiles = triton.cdiv(tokens, tile_tokens)
    while splits < MOST_SPLITS and tiles * splits < ENOUGH_PROGRAMS and 2 * splits * tile_vocab <= vocab:
        splits *= 2
    return splits


def _grid(tokens: int, splits: int) -> Callable[[dict[str, Any]], tuple[int, int]]:
    return lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]), splits)


@triton.autotune(**choices(SCORE_TILES), key=["vocab", "size", "splits", "COPIED"])
@triton.jit
def score_hidden_kernel(
    hidden_pointer,
    weight_pointer,
    bias_pointer,
    hidden_stride,
    weight_stride,
    tokens,
    vocab,
    size,
    splits,
    partial_pointer,
    labels_pointer,
    logprob_pointer,
    inner,
    factor,
    FORM: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the running values (see `fold`) of a split of BLOCK_M rows, and u at their labels, each by the program
    that has the label, where `combine_scores_kernel` expects them."""
    first_row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = rows < tokens
    if labels_pointer is not None:
        labels = tl.load(labels_pointer + rows, mask=inside, other=-1).to(tl.int32)
        label_u = tl.zeros([BLOCK_M, 1], tl.float32)
    a = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    dot = tl.zeros([BLOCK_M, 1], tl.float32)
    first_column, past_column = split_columns(split, splits, vocab, BLOCK_N)
    for start in range(first_column, past_column, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)[None, :]
        y = product(
            hidden_pointer,
            hidden_stride,
            first_row,
            tokens,
            weight_pointer,
            weight_stride,
            start,
            vocab,
            size,
            biases(bias_pointer, columns, vocab, BLOCK_M),
            BLOCK_K,
            COPIED,
            WHOLE_BLOCKS,
        )
        u = masked_logits(y, start, columns, vocab, inner, FORM)
        if labels_pointer is not None:  # noqa: SIM102  # known when compiling; what is within is not
            if has_label(labels, start, BLOCK_N):
                label_u += logit_at(u, columns, labels)
        a, total, dot, _, _, _ = fold(u, a, total, dot, factor)
    record = partial_pointer + (rows * splits + split) * SCORE_RECORD
    tl.store(record + PEAK, a, mask=inside)
    tl.store(record + SUM, total, mask=inside)
    tl.store(record + DOT, dot, mask=inside)
    if labels_pointer is not None:
        here = (labels >= first_column) & (labels < past_column)
        tl.store(logprob_pointer + rows, label_u, mask=here)


@triton.jit
def combine_scores_kernel(
    partial_pointer, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer, factor, SPLITS: tl.constexpr
):
    """One program a row: its values from its splits' records; the log-probability is written over the label's u."""
    row = tl.program_id(0).to(tl.int64)
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * SCORE_RECORD
    a, total, dot, _ = merge(tl.load(record + PEAK), tl.load(record + SUM), tl.load(record + DOT), factor)
    label_u = 0.0
    if logprob_pointer is not None:
        label_u = tl.load(logprob_pointer + row)
    store_scores(label_u, a, total, dot, factor, row, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer)


@triton.autotune(
    **choices(PROCESS_TILES), key=["vocab", "student_size", "teacher_size", "splits", "SHARED_HEAD", "COPIED"]
)
@triton.jit
def process_hidden_kernel(
    student_pointer,
    student_weight_pointer,
    student_bias_pointer,
    student_stride,
    student_weight_stride,
    student_size,
    teacher_pointer,
    teacher_weight_pointer,
    teacher_bias_pointer,
    teacher_stride,
    teacher_weight_stride,
    teacher_size,
    tokens,
    vocab,
    splits,
    partial_pointer,
    labels_pointer,
    student_logprob_pointer,
    teacher_logprob_pointer,
    student_inner,
    teacher_inner,
    student_factor,
    teacher_factor,
    DIVERGENCE: tl.constexpr,
    STUDENT_FORM: tl.constexpr,
    TEACHER_FORM: tl.constexpr,
    SHARED_HEAD: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    COPIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the records (see `fold_pair`) of a split of BLOCK_M rows of both models' logits, and their u at the
    labels, each by the program that has the label, where `combine_kernel` expects them."""
    first_row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = rows < tokens
    if labels_pointer is not None:
        labels = tl.load(labels_pointer + rows, mask=inside, other=-1).to(tl.int32)
        student_label_u = tl.zeros([BLOCK_M, 1], tl.float32)
        teacher_label_u = tl.zeros([BLOCK_M, 1], tl.float32)
    a = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    b = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    student_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    student_dot = tl.zeros([BLOCK_M, 1], tl.float32)
    teacher_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    teacher_dot = tl.zeros([BLOCK_M, 1], tl.float32)
    cross = tl.zeros([BLOCK_M, 1], tl.float32)
    at_peak = tl.zeros([BLOCK_M, 1], tl.float32)
    first_column, past_column = split_columns(split, splits, vocab, BLOCK_N)
    for start in range(first_column, past_column, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)[None, :]
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SHARED_HEAD:
            for k in range(0, student_size, BLOCK_K):
                w = tl.trans(
                    tile(
                        student_weight_pointer,
                        student_weight_stride,
                        start,
                        vocab,
                        k,
                        student_size,
                        BLOCK_N,
                        BLOCK_K,
                        COPIED,
                        WHOLE_BLOCKS,
                    )
                )
                h = tile(
                    student_pointer,
                    student_stride,
                    first_row,
                    tokens,
                    k,
                    student_size,
                    BLOCK_M,
                    BLOCK_K,
                    COPIED,
                    WHOLE_BLOCKS,
                )
                s = tl.dot(h, w, s)
                h = tile(
                    teacher_pointer,
                    teacher_stride,
                    first_row,
                    tokens,
                    k,
                    student_size,
                    BLOCK_M,
                    BLOCK_K,
                    COPIED,
                    WHOLE_BLOCKS,
                )
                t = tl.dot(h, w, t)
        else:
            s = product(
                student_pointer,
                student_stride,
                first_row,
                tokens,
                student_weight_pointer,
                student_weight_stride,
                start,
                vocab,
                student_size,
                s,
                BLOCK_K,
                COPIED,
                WHOLE_BLOCKS,
            )
            t = product(
                teacher_pointer,
                teacher_stride,
                first_row,
                tokens,
                teacher_weight_pointer,
                teacher_weight_stride,
                start,
                vocab,
                teacher_size,
                t,
                BLOCK_K,
                COPIED,
                WHOLE_BLOCKS,
            )
        if COPIED:
            s = masked_logits(s, start, columns, vocab, student_inner, STUDENT_FORM)
            t = masked_logits(t, start, columns, vocab, teacher_inner, TEACHER_FORM)
            if labels_pointer is not None:  # noqa: SIM102  # known when compiling; what is within is not
                if has_label(labels, start, BLOCK_N):
                    student_label_u += logit_at(s, columns, labels)
                    teacher_label_u += logit_at(t, columns, labels)
        else:
            s = finish_logits(s, student_bias_pointer, columns, vocab, student_inner, STUDENT_FORM)
            t = finish_logits(t, teacher_bias_pointer, columns, vocab, teacher_inner, TEACHER_FORM)
            if labels_pointer is not None:
                student_label_u += logit_at(s, columns, labels)
                teacher_label_u += logit_at(t, columns, labels)
        a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak = fold_pair(
            s,
            t,
            a,
            student_sum,
            student_dot,
            b,
            teacher_sum,
            teacher_dot,
            cross,
            at_peak,
            student_factor,
            teacher_factor,
            DIVERGENCE,
        )
    record = partial_pointer + (rows * splits + split) * RECORD
    store_pair(record, inside, a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak)
    if labels_pointer is not None:
        here = (labels >= first_column) & (labels < past_column)
        tl.store(student_logprob_pointer + rows, student_label_u, mask=here)
        tl.store(teacher_logprob_pointer + rows, teacher_label_u, mask=here)
