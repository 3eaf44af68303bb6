"""The divergence of a block of logits and its gradient as Triton kernels.

Three launches a block, four for the divergences from a mixture: `partials` reads both models' logits once and
keeps running softmax sums; `mixture` reads them again where log(p/m) needs the finished sums; `combine` turns the
sums into per-token values and row constants; `gradient` reads the logits a last time and writes the gradient.
A row is split over several programs, so that few tokens still fill the device. Rows are 16-byte aligned and
padded, so that loads and stores are 16 bytes wide even where the vocabulary's size is odd: what lies in the
padding is read, replaced and never used.

Logits are read relative to a peak, the student's largest logit and the teacher's logit at the same token: there
both differences are exactly 0, and where p is nearly one-hot the sums keep their digits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.divergences import Objective, is_mixture
from sdft_kernels.tokens import TokenRows
from sdft_kernels.triton_math import (
    load_logits,
    log_over_mixture,
    log_ratio_at,
    mixture_score,
    split_columns,
    transform,
)

#: Vocabulary entries a program handles at once; 16 bytes a thread and load, four times.
BLOCK = 2048
#: The same for the second pass and the gradient of a mixture, whose elementary functions take more registers.
MIXTURE_BLOCK = 1024
WARPS = 4

#: Programs that keep a large device busy: 132 multiprocessors, several programs each.
ENOUGH_PROGRAMS = 1056
MOST_SPLITS = 16

#: Floats of a split's running sums and of a row's constants: 32 bytes each.
RECORD = tl.constexpr(8)


def process_rows(
    student: Tensor,
    teacher: Tensor,
    rows: TokenRows,
    objective: Objective,
    gradient: Tensor | None,
) -> None:
    """Fills `rows` from (R, V) float32 products of hidden states and heads, which may be overwritten.

    `gradient`, where wanted, receives rows.weight · dL/dlogits; it may be `student` itself. Rows of all three
    start 16-byte aligned, padded to a multiple of 16 entries.
    """
    tokens, vocab = student.shape
    if tokens == 0:
        return
    splits = split_rows(tokens, vocab)
    partial = student.new_empty((tokens, splits, RECORD.value))
    mixture = student.new_empty((tokens, splits, 2)) if is_mixture(objective.divergence) else partial
    constants = student.new_empty((tokens, RECORD.value))
    logits = (student, teacher, student.stride(0), teacher.stride(0), vocab)
    settings = _settings(objective)
    grid = (tokens, splits)
    partials_kernel[grid](*logits, partial, **settings, BLOCK=BLOCK, num_warps=WARPS)
    if is_mixture(objective.divergence):
        mixture_kernel[grid](
            *logits, partial, mixture, objective.beta, **settings, SPLITS=splits, BLOCK=MIXTURE_BLOCK, num_warps=WARPS
        )
    combine_kernel[(tokens,)](
        *logits,
        partial,
        mixture,
        constants,
        *(rows.weight, rows.labels, rows.old_logprobs, rows.loss, rows.student_entropy, rows.teacher_entropy),
        *(rows.student_logprob, rows.teacher_logprob),
        objective.beta,
        float("inf") if objective.importance_clip is None else objective.importance_clip,
        **settings,
        SPLITS=splits,
        num_warps=1,
    )
    if gradient is not None:
        block = MIXTURE_BLOCK if is_mixture(objective.divergence) else BLOCK
        gradient_kernel[(tokens, triton.cdiv(vocab, block))](
            *logits,
            gradient,
            gradient.stride(0),
            constants,
            objective.beta,
            **settings,
            BLOCK=block,
            num_warps=WARPS,
        )


def split_rows(tokens: int, vocab: int) -> int:
    """Programs that share a row: a power of two, enough to fill the device, none without a block of its own."""
    splits = 1
    while splits < MOST_SPLITS and tokens * splits < ENOUGH_PROGRAMS and 2 * splits * BLOCK <= vocab:
        splits *= 2
    return splits


def _settings(objective: Objective) -> dict[str, Any]:
    """What every kernel needs to know of the objective."""
    student, teacher = objective.student, objective.teacher
    return {
        "student_scale": student.scale,
        "teacher_scale": teacher.scale,
        "student_softcap": student.softcap or 1.0,
        "teacher_softcap": teacher.softcap or 1.0,
        "temperature": student.temperature,
        "DIVERGENCE": objective.divergence,
        "STUDENT_CAPPED": student.softcap is not None,
        "TEACHER_CAPPED": teacher.softcap is not None,
    }


@triton.jit
def partials_kernel(
    student_pointer,
    teacher_pointer,
    student_stride,
    teacher_stride,
    vocab,
    partial_pointer,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a split of a row of both models' logits s and t, with running maxima.

    Writes (student max a, Σ e, Σ e (s - a), teacher max b, Σ f, Σ f (t - b), D, t at the student's max c), with
    e = exp(s - a) and f = exp(t - b). For reverse KL, D = Σ e ((s - a) - (t - c)); for forward KL,
    D = Σ f ((t - b) - (s - a)).
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    student_pointer += row * student_stride
    teacher_pointer += row * teacher_stride
    student_max = float("-inf")
    teacher_max = float("-inf")
    at_peak = 0.0
    student_sum = tl.zeros([BLOCK], tl.float32)
    student_dot = tl.zeros([BLOCK], tl.float32)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    teacher_dot = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    first_column, past_column = split_columns(split, tl.num_programs(1), vocab, BLOCK)
    for start in range(first_column, past_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = load_logits(
            student_pointer, student_stride, columns, vocab, student_scale, student_softcap, temperature, STUDENT_CAPPED
        )
        t = load_logits(
            teacher_pointer, teacher_stride, columns, vocab, teacher_scale, teacher_softcap, temperature, TEACHER_CAPPED
        )
        block_max = tl.max(s, 0)
        new_student_max = tl.maximum(student_max, block_max)
        new_teacher_max = tl.maximum(teacher_max, tl.max(t, 0))
        # Sums so far, relative to the new maxima; on the first block there are none, and the shifts are 0.
        first = student_max == float("-inf")
        student_shift = tl.where(first, 0.0, student_max - new_student_max)
        teacher_shift = tl.where(first, 0.0, teacher_max - new_teacher_max)
        student_dot = tl.exp(student_shift) * (student_dot + student_shift * student_sum)
        teacher_dot = tl.exp(teacher_shift) * (teacher_dot + teacher_shift * teacher_sum)
        if DIVERGENCE == "reverse_kl":
            block_at_peak = tl.max(tl.where(s == block_max, t, float("-inf")), 0)
            new_at_peak = tl.where(block_max > student_max, block_at_peak, at_peak)
            peak_shift = tl.where(first, 0.0, at_peak - new_at_peak)
            cross = tl.exp(student_shift) * (cross + (student_shift - peak_shift) * student_sum)
            at_peak = new_at_peak
        elif DIVERGENCE == "forward_kl":
            cross = tl.exp(teacher_shift) * (cross + (teacher_shift - student_shift) * teacher_sum)
        else:
            block_at_peak = tl.max(tl.where(s == block_max, t, float("-inf")), 0)
            at_peak = tl.where(block_max > student_max, block_at_peak, at_peak)
        student_sum *= tl.exp(student_shift)
        teacher_sum *= tl.exp(teacher_shift)
        student_max = new_student_max
        teacher_max = new_teacher_max

        s -= student_max
        e = tl.exp(s)
        student_sum += e
        student_dot += e * s
        if DIVERGENCE == "reverse_kl":
            cross += e * (s - (t - at_peak))
        t -= teacher_max
        f = tl.exp(t)
        teacher_sum += f
        teacher_dot += f * t
        if DIVERGENCE == "forward_kl":
            cross += f * (t - s)
    record = partial_pointer + (row * tl.num_programs(1) + split) * RECORD
    tl.store(record, student_max)
    tl.store(record + 1, tl.sum(student_sum, 0))
    tl.store(record + 2, tl.sum(student_dot, 0))
    tl.store(record + 3, teacher_max)
    tl.store(record + 4, tl.sum(teacher_sum, 0))
    tl.store(record + 5, tl.sum(teacher_dot, 0))
    tl.store(record + 6, tl.sum(cross, 0))
    tl.store(record + 7, at_peak)


@triton.jit
def merge_softmax(partial_pointer, row, SPLITS: tl.constexpr):
    """A row's (student max, Σ e), (teacher max, Σ f) and teacher logit at the student's max, from its splits."""
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * RECORD
    student_max = tl.load(record)
    teacher_max = tl.load(record + 3)
    a = tl.max(student_max, 0)
    b = tl.max(teacher_max, 0)
    student_sum = tl.sum(tl.load(record + 1) * tl.exp(student_max - a), 0)
    teacher_sum = tl.sum(tl.load(record + 4) * tl.exp(teacher_max - b), 0)
    at_peak = tl.max(tl.where(student_max == a, tl.load(record + 7), float("-inf")), 0)
    return a, student_sum, b, teacher_sum, at_peak


@triton.jit
def mixture_kernel(
    student_pointer,
    teacher_pointer,
    student_stride,
    teacher_stride,
    vocab,
    partial_pointer,
    mixture_pointer,
    beta,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second pass of a mixture, over a split of a row: writes Σ p (g - g at the peak), and the loss's own sum,
    Σ p log(p/m) for the skewed reverse KL and Σ q log(q/m) for the other two."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    a, student_sum, b, teacher_sum, at_peak = merge_softmax(partial_pointer, row, SPLITS)
    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    peak_ratio = log_ratio_at(-student_log_sum, (at_peak - b) - teacher_log_sum)
    peak_score = mixture_score(peak_ratio, beta, DIVERGENCE)
    student_pointer += row * student_stride
    teacher_pointer += row * teacher_stride
    scores = tl.zeros([BLOCK], tl.float32)
    losses = tl.zeros([BLOCK], tl.float32)
    first_column, past_column = split_columns(split, tl.num_programs(1), vocab, BLOCK)
    for start in range(first_column, past_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = load_logits(
            student_pointer, student_stride, columns, vocab, student_scale, student_softcap, temperature, STUDENT_CAPPED
        )
        t = load_logits(
            teacher_pointer, teacher_stride, columns, vocab, teacher_scale, teacher_softcap, temperature, TEACHER_CAPPED
        )
        log_p = (s - a) - student_log_sum
        log_q = (t - b) - teacher_log_sum
        log_ratio = log_ratio_at(log_p, log_q)
        p = tl.exp(log_p)
        scores += p * (mixture_score(log_ratio, beta, DIVERGENCE) - peak_score)
        if DIVERGENCE == "skew_reverse_kl":
            losses += p * log_over_mixture(-log_ratio, beta)
        else:
            losses += tl.exp(log_q) * log_over_mixture(log_ratio, 1 - beta)
    record = mixture_pointer + (row * tl.num_programs(1) + split) * 2
    tl.store(record, tl.sum(scores, 0))
    tl.store(record + 1, tl.sum(losses, 0))


@triton.jit
def combine_kernel(
    student_pointer,
    teacher_pointer,
    student_stride,
    teacher_stride,
    vocab,
    partial_pointer,
    mixture_pointer,
    constants_pointer,
    weight_pointer,
    labels_pointer,
    old_logprobs_pointer,
    loss_pointer,
    student_entropy_pointer,
    teacher_entropy_pointer,
    student_logprob_pointer,
    teacher_logprob_pointer,
    beta,
    importance_clip,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a row: the token's values, its weight times its importance, and what the gradient needs.

    Writes the constants (student max, log Σ e, teacher max, log Σ f, teacher logit at the student's max, centre,
    factor): the gradient is factor · p · (g - centre), with g relative to its value at the peak.
    """
    row = tl.program_id(0).to(tl.int64)
    a, student_sum, b, teacher_sum, at_peak = merge_softmax(partial_pointer, row, SPLITS)
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * RECORD
    student_max = tl.load(record)
    teacher_max = tl.load(record + 3)
    student_shift = student_max - a
    teacher_shift = teacher_max - b
    student_dot = tl.sum(tl.exp(student_shift) * (tl.load(record + 2) + student_shift * tl.load(record + 1)), 0)
    teacher_dot = tl.sum(tl.exp(teacher_shift) * (tl.load(record + 5) + teacher_shift * tl.load(record + 4)), 0)
    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    tl.store(student_entropy_pointer + row, student_log_sum - student_dot / student_sum)
    tl.store(teacher_entropy_pointer + row, teacher_log_sum - teacher_dot / teacher_sum)

    cross = tl.load(record + 6)
    centre = 0.0
    if DIVERGENCE == "reverse_kl":
        peak_shift = tl.load(record + 7) - at_peak
        cross += (student_shift - peak_shift) * tl.load(record + 1)
        centre = tl.sum(tl.exp(student_shift) * cross, 0) / student_sum
        loss = centre - student_log_sum + ((b - at_peak) + teacher_log_sum)
    elif DIVERGENCE == "forward_kl":
        cross += (teacher_shift - student_shift) * tl.load(record + 4)
        loss = tl.sum(tl.exp(teacher_shift) * cross, 0) / teacher_sum - teacher_log_sum + student_log_sum
    else:
        sums = mixture_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * 2
        centre = tl.sum(tl.load(sums), 0)
        loss = tl.sum(tl.load(sums + 1), 0)
        if DIVERGENCE == "jsd":
            peak_ratio = log_ratio_at(-student_log_sum, (at_peak - b) - teacher_log_sum)
            loss = centre + mixture_score(peak_ratio, beta, DIVERGENCE) + beta * loss
    tl.store(loss_pointer + row, loss)

    weight = tl.load(weight_pointer + row)
    if labels_pointer is not None:
        label = tl.load(labels_pointer + row)
        s = tl.load(student_pointer + row * student_stride + label)
        t = tl.load(teacher_pointer + row * teacher_stride + label)
        s = transform(s, student_scale, student_softcap, temperature, STUDENT_CAPPED)
        t = transform(t, teacher_scale, teacher_softcap, temperature, TEACHER_CAPPED)
        student_logprob = (s - a) - student_log_sum
        teacher_logprob = (t - b) - teacher_log_sum
        tl.store(student_logprob_pointer + row, student_logprob)
        tl.store(teacher_logprob_pointer + row, teacher_logprob)
        if old_logprobs_pointer is not None:
            weight *= tl.minimum(tl.exp(student_logprob - tl.load(old_logprobs_pointer + row)), importance_clip)
            tl.store(weight_pointer + row, weight)
    constants = constants_pointer + row * RECORD
    tl.store(constants, a)
    tl.store(constants + 1, student_log_sum)
    tl.store(constants + 2, b)
    tl.store(constants + 3, teacher_log_sum)
    tl.store(constants + 4, at_peak)
    tl.store(constants + 5, centre)
    tl.store(constants + 6, weight * (student_scale / temperature))


@triton.jit
def gradient_kernel(
    student_pointer,
    teacher_pointer,
    student_stride,
    teacher_stride,
    vocab,
    gradient_pointer,
    gradient_stride,
    constants_pointer,
    beta,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    DIVERGENCE: tl.constexpr,
    STUDENT_CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last pass, over one block of a row: writes factor · p · (g - centre), and p - q for forward KL."""
    row = tl.program_id(0).to(tl.int64)
    constants = constants_pointer + row * RECORD
    a = tl.load(constants)
    student_log_sum = tl.load(constants + 1)
    b = tl.load(constants + 2)
    teacher_log_sum = tl.load(constants + 3)
    at_peak = tl.load(constants + 4)
    centre = tl.load(constants + 5)
    factor = tl.load(constants + 6)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = load_logits(
        student_pointer + row * student_stride,
        student_stride,
        columns,
        vocab,
        student_scale,
        student_softcap,
        temperature,
        STUDENT_CAPPED,
    )
    t = load_logits(
        teacher_pointer + row * teacher_stride,
        teacher_stride,
        columns,
        vocab,
        teacher_scale,
        teacher_softcap,
        temperature,
        TEACHER_CAPPED,
    )
    log_p = (s - a) - student_log_sum
    log_q = (t - b) - teacher_log_sum
    p = tl.exp(log_p)
    if DIVERGENCE == "reverse_kl":
        gradient = p * ((s - a) - (t - at_peak) - centre)
    elif DIVERGENCE == "forward_kl":
        gradient = p - tl.exp(log_q)
    else:
        peak_ratio = log_ratio_at(-student_log_sum, (at_peak - b) - teacher_log_sum)
        log_ratio = log_ratio_at(log_p, log_q)
        peak_score = mixture_score(peak_ratio, beta, DIVERGENCE)
        gradient = p * (mixture_score(log_ratio, beta, DIVERGENCE) - peak_score - centre)
    gradient *= factor
    if STUDENT_CAPPED:
        capped = s * (temperature / student_softcap)
        gradient *= 1 - capped * capped
    # Past the vocabulary p is 0, and so is what is written to the padding.
    gradient = tl.where(columns < vocab, gradient, 0.0)
    out = gradient_pointer + row * gradient_stride + columns
    tl.store(out, gradient.to(gradient_pointer.dtype.element_ty), mask=columns < gradient_stride)
