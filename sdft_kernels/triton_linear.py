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
from triton import knobs

from sdft_kernels.chunk import Head
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores
from sdft_kernels.triton_divergence import combine, kernel_settings
from sdft_kernels.triton_math import FAR_BELOW, add_bias, split_columns, transform
from sdft_kernels.triton_scoring import store_scores
from sdft_kernels.triton_sums import RECORD, fold, fold_pair, merge, store_pair

Tile = tuple[int, int, int, int]

#: Tiles to choose from for one model and for two: tokens, vocabulary entries, hidden entries, and warps. Larger ones
#: have no registers left for a soft cap and a bias, or for the second model; AMD's are those that have with triton 3.6
#: as well, whose code takes more.
SCORE_TILES: dict[str, tuple[Tile, ...]] = {
    "cuda": ((128, 128, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)),
    "hip": ((128, 64, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)),
}
PROCESS_TILES: dict[str, tuple[Tile, ...]] = {
    "cuda": ((128, 64, 64, 8), (64, 64, 64, 8)),
    "hip": ((64, 64, 64, 4), (64, 64, 32, 4)),
}
LARGEST_TILE = (128, 128)
LARGEST_BLOCK_K = 64
#: Beside the tile. Stages are tiles of hidden entries in flight: an AMD multiprocessor has 64 KiB of shared memory, not
#: NVIDIA's 164 to 228. The limit on registers lets NVIDIA's assembler take all; left to itself it spills a few, so that
#: another program may run beside this one.
DEVICE_OPTIONS = {"cuda": {"num_stages": 3, "maxnreg": 255}, "hip": {"num_stages": 2}}

#: Programs that keep a large device busy: 132 multiprocessors, two programs or two turns each.
ENOUGH_PROGRAMS = 264
MOST_SPLITS = 256

#: Floats of a split's record for one model: 16 bytes.
SCORE_RECORD = tl.constexpr(4)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernels here take operands of this dtype: tensor cores would round float32 ones to TF32."""
    return dtype in (torch.bfloat16, torch.float16)


def score_hidden(hidden: Tensor, head: Head, scores: TokenScores, options: LogitOptions) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    tokens, vocab = len(hidden), len(head.weight)
    if tokens == 0:
        return
    splits = split_vocabulary(tokens, vocab)
    hidden, weight = operand(hidden), operand(head.weight)
    partial = hidden.new_empty((tokens, splits, SCORE_RECORD.value), dtype=torch.float32)
    score_hidden_kernel[_grid(tokens, splits)](
        *(hidden, weight, head.bias, hidden.stride(0), weight.stride(0)),
        *(tokens, vocab, hidden.shape[1], splits),
        *(partial, scores.labels, scores.logprob),
        *(options.scale, options.softcap or 1.0, options.temperature),
        CAPPED=options.softcap is not None,
        WHOLE_BLOCKS=hidden.shape[1] % LARGEST_BLOCK_K == 0,
    )
    combine_scores_kernel[(tokens,)](
        *(partial, scores.logprob, scores.top1, scores.entropy, scores.logsumexp), SPLITS=splits, num_warps=1
    )


def process_hidden(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Head,
    teacher: Head,
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
    process_hidden_kernel[_grid(tokens, splits)](
        *(student_hidden, student_weight, student.bias),
        *(student_hidden.stride(0), student_weight.stride(0), student_hidden.shape[1]),
        *(teacher_hidden, teacher_weight, teacher.bias),
        *(teacher_hidden.stride(0), teacher_weight.stride(0), teacher_hidden.shape[1]),
        *(tokens, vocab, splits),
        *(partial, rows.labels, rows.student_logprob, rows.teacher_logprob),
        **kernel_settings(objective),
        SHARED_HEAD=shared_head,
        WHOLE_BLOCKS=student_hidden.shape[1] % LARGEST_BLOCK_K == 0 and teacher_hidden.shape[1] % LARGEST_BLOCK_K == 0,
    )
    combine(partial, None, None, rows, objective)


def split_vocabulary(tokens: int, vocab: int) -> int:
    """Programs that share a tile of tokens: a power of two, enough to fill the device, each with a tile of the head."""
    splits, (tile_tokens, tile_vocab) = 1, LARGEST_TILE
    tiles = triton.cdiv(tokens, tile_tokens)
    while splits < MOST_SPLITS and tiles * splits < ENOUGH_PROGRAMS and 2 * splits * tile_vocab <= vocab:
        splits *= 2
    return splits


class Operands:
    """Heads as the kernels take them, made for the first chunk of tokens that needs them and kept for the others."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def head(self, head: Head) -> Head:
        """The same head; of two with one weight, both have one weight again."""
        if id(head.weight) not in self._made:
            self._made[id(head.weight)] = operand(head.weight)
        return Head(self._made[id(head.weight)], head.bias)


def operand(matrix: Tensor) -> Tensor:
    """The same in rows that load 16 bytes at a time: contiguous, aligned, zeros up to a multiple of 16 entries."""
    rows, size = matrix.shape
    if matrix.stride(1) != 1 or size % 16 or matrix.stride(0) % 16 or matrix.data_ptr() % 16:
        aligned = matrix.new_zeros(rows, -(-size // 16) * 16)
        aligned[:, :size] = matrix
        matrix = aligned
    # Triton's interpreter would multiply the bit patterns of bfloat16; in float32 the products are the same.
    return matrix.float() if knobs.runtime.interpret else matrix


def _grid(tokens: int, splits: int) -> Callable[[dict[str, Any]], tuple[int, int]]:
    return lambda meta: (triton.cdiv(tokens, meta["BLOCK_M"]), splits)


def configurations(tiles: dict[str, tuple[Tile, ...]], backend: str) -> list[triton.Config]:
    """What the tuner tries on a device. The interpreter cannot tell which is faster, and gets the first."""
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, **DEVICE_OPTIONS[backend])
        for m, n, k, warps in tiles[backend][: 1 if knobs.runtime.interpret else None]
    ]


#: Of the devices that this torch is built for.
_BACKEND = "cuda" if torch.version.hip is None else "hip"


@triton.jit
def row_pointers(pointer, stride, first, rows, BLOCK: tl.constexpr):
    """(BLOCK, 1) pointers to rows from `first` on. Past the last they stay there: what is read needs no mask."""
    return pointer + tl.minimum(first + tl.arange(0, BLOCK), rows - 1).to(tl.int64)[:, None] * stride


@triton.jit
def load_columns(row_pointers, start, size, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """(M, BLOCK) of rows of `size` entries, 0 past their end; WHOLE where that is the end of a block."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        return tl.load(row_pointers + columns)
    else:
        return tl.load(row_pointers + columns, mask=columns < size, other=0.0)


@triton.jit
def product(hidden_rows, weight_rows, total, size, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr):
    """`total` and the (M, N) products of M rows and N rows of `size` entries."""
    for start in range(0, size, BLOCK_K):
        h = load_columns(hidden_rows, start, size, BLOCK_K, WHOLE)
        w = load_columns(weight_rows, start, size, BLOCK_K, WHOLE)
        total = tl.dot(h, tl.trans(w), total)
    return total


@triton.jit
def biases(bias_pointer, columns, vocab, BLOCK_M: tl.constexpr):
    """What products are added to: (BLOCK_M, N) of the head's bias at `columns`, (1, N), or 0 where it has none.

    Added to products that are there already, it would need registers of its own.
    """
    total = tl.zeros([BLOCK_M, columns.shape[1]], tl.float32)
    if bias_pointer is not None:
        total += tl.load(bias_pointer + columns, mask=columns < vocab, other=0.0).to(tl.float32)
    return total


@triton.jit
def finish_logits(y, bias_pointer, columns, vocab, scale, softcap, temperature, CAPPED: tl.constexpr):
    """Transformed logits of (M, N) products at `columns`, (1, N); far below all others past the vocabulary."""
    y = add_bias(y, bias_pointer, columns, vocab)
    return tl.where(columns < vocab, transform(y, scale, softcap, temperature, CAPPED), FAR_BELOW)


@triton.jit
def logit_at(z, columns, labels):
    """(M, 1) logits at labels, (M, 1), that are among the columns, else 0."""
    return tl.sum(tl.where(columns == labels, z, 0.0), 1, keep_dims=True)


@triton.autotune(configurations(SCORE_TILES, _BACKEND), key=["vocab", "size", "splits"])
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
    scale,
    softcap,
    temperature,
    CAPPED: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes (max a, Σ exp(z - a), Σ exp(z - a) (z - a)) of a split of BLOCK_M rows, and the logits at their labels,
    each by the program that has the label, where `combine_scores_kernel` expects them."""
    first_row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = rows < tokens
    hidden_rows = row_pointers(hidden_pointer, hidden_stride, first_row, tokens, BLOCK_M)
    if labels_pointer is not None:
        labels = tl.load(labels_pointer + rows, mask=inside, other=-1).to(tl.int32)
        label_logit = tl.zeros([BLOCK_M, 1], tl.float32)
    a = tl.full([BLOCK_M, 1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    dot = tl.zeros([BLOCK_M, 1], tl.float32)
    first_column, past_column = split_columns(split, splits, vocab, BLOCK_N)
    for start in range(first_column, past_column, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)[None, :]
        weight_rows = row_pointers(weight_pointer, weight_stride, start, vocab, BLOCK_N)
        y = biases(bias_pointer, columns, vocab, BLOCK_M)
        y = product(hidden_rows, weight_rows, y, size, BLOCK_K, WHOLE_BLOCKS)
        z = transform(y, scale, softcap, temperature, CAPPED)
        # Few blocks need more than a product, a maximum and an exponential of each logit: the vocabulary's last one,
        # and those that have a label.
        if start + BLOCK_N > vocab:
            z = tl.where(columns < vocab, z, FAR_BELOW)
        if labels_pointer is not None:  # noqa: SIM102
            if tl.max(((labels >= start) & (labels < start + BLOCK_N)).to(tl.int32)) > 0:
                label_logit += logit_at(z, columns, labels)
        a, total, dot, _, _, _ = fold(z, a, total, dot)
    record = partial_pointer + (rows * splits + split) * SCORE_RECORD
    tl.store(record, a, mask=inside)
    tl.store(record + 1, total, mask=inside)
    tl.store(record + 2, dot, mask=inside)
    if labels_pointer is not None:
        here = (labels >= first_column) & (labels < past_column)
        tl.store(logprob_pointer + rows, label_logit, mask=here)


@triton.jit
def combine_scores_kernel(
    partial_pointer, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer, SPLITS: tl.constexpr
):
    """One program a row: its values from its splits' records; the log-probability is written over the logit."""
    row = tl.program_id(0).to(tl.int64)
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * SCORE_RECORD
    a, total, dot, _ = merge(tl.load(record), tl.load(record + 1), tl.load(record + 2))
    label_logit = 0.0
    if logprob_pointer is not None:
        label_logit = tl.load(logprob_pointer + row)
    store_scores(label_logit, a, total, dot, row, logprob_pointer, top1_pointer, entropy_pointer, logsumexp_pointer)


@triton.autotune(
    configurations(PROCESS_TILES, _BACKEND), key=["vocab", "student_size", "teacher_size", "splits", "SHARED_HEAD"]
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
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    SHARED_HEAD: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the records (see `fold_pair`) of a split of BLOCK_M rows of both models' logits, and the logits at their
    labels, each by the program that has the label, where `combine_kernel` expects them."""
    first_row = tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = rows < tokens
    student_rows = row_pointers(student_pointer, student_stride, first_row, tokens, BLOCK_M)
    teacher_rows = row_pointers(teacher_pointer, teacher_stride, first_row, tokens, BLOCK_M)
    if labels_pointer is not None:
        labels = tl.load(labels_pointer + rows, mask=inside, other=-1).to(tl.int32)
        student_label_logit = tl.zeros([BLOCK_M, 1], tl.float32)
        teacher_label_logit = tl.zeros([BLOCK_M, 1], tl.float32)
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
        weight_rows = row_pointers(student_weight_pointer, student_weight_stride, start, vocab, BLOCK_N)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SHARED_HEAD:
            for k in range(0, student_size, BLOCK_K):
                w = tl.trans(load_columns(weight_rows, k, student_size, BLOCK_K, WHOLE_BLOCKS))
                s = tl.dot(load_columns(student_rows, k, student_size, BLOCK_K, WHOLE_BLOCKS), w, s)
                t = tl.dot(load_columns(teacher_rows, k, student_size, BLOCK_K, WHOLE_BLOCKS), w, t)
        else:
            s = product(student_rows, weight_rows, s, student_size, BLOCK_K, WHOLE_BLOCKS)
            weight_rows = row_pointers(teacher_weight_pointer, teacher_weight_stride, start, vocab, BLOCK_N)
            t = product(teacher_rows, weight_rows, t, teacher_size, BLOCK_K, WHOLE_BLOCKS)
        s = finish_logits(
            s, student_bias_pointer, columns, vocab, student_scale, student_softcap, temperature, STUDENT_CAPPED
        )
        t = finish_logits(
            t, teacher_bias_pointer, columns, vocab, teacher_scale, teacher_softcap, temperature, TEACHER_CAPPED
        )
        if labels_pointer is not None:
            student_label_logit += logit_at(s, columns, labels)
            teacher_label_logit += logit_at(t, columns, labels)
        a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak = fold_pair(
            s, t, a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak, DIVERGENCE
        )
    record = partial_pointer + (rows * splits + split) * RECORD
    store_pair(record, inside, a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak)
    if labels_pointer is not None:
        here = (labels >= first_column) & (labels < past_column)
        tl.store(student_logprob_pointer + rows, student_label_logit, mask=here)
        tl.store(teacher_logprob_pointer + rows, teacher_label_logit, mask=here)
