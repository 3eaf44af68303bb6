"""The loss of a block of logits and its gradient as Triton kernels.

Three launches a block, four for the divergences from a mixture: `partials` reads both models' logits once and
keeps running softmax sums; `mixture` reads them again where log(p/m) needs the finished sums; `combine` turns the
sums into per-token values and row constants; `gradient` reads the logits a last time and writes the gradient.
A row is split over several programs, so that few tokens still fill the device. Rows are 16-byte aligned and
padded, so that loads and stores are 16 bytes wide even where the vocabulary's size is odd: what lies in the
padding is read, replaced and never used.

Logits are factor · u, and u is read relative to a peak, the student's largest and the teacher's at the same token:
there both differences are exactly 0, and where p is nearly one-hot the sums keep their digits.

Cross-entropy has no teacher: whatever is of one is None, and is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.backends.gpu.math import (
    FAR_BELOW,
    exp,
    form,
    load_logits,
    log_over_mixture,
    mixture_peak,
    mixture_score,
    mixture_shares,
)
from sdft_kernels.backends.gpu.statistics import mixture_kernel, partials_kernel
from sdft_kernels.backends.gpu.sums import (
    CROSS,
    DOT,
    PEAK,
    RECORD,
    SUM,
    TEACHER_AT_PEAK,
    TEACHER_DOT,
    TEACHER_PEAK,
    TEACHER_SUM,
    merge,
    rebased,
    teacher_at_peak,
)
from sdft_kernels.divergences import HardTerm, Objective, is_mixture
from sdft_kernels.tokens import TokenRows

#: The vocabulary entries that a program handles at once: each of its threads loads 16 bytes four times.
BLOCK = 2048
#: The same for a mixture's elementary functions and for biases, which need more registers for each entry.
NARROW_BLOCK = 1024
WARPS = 4

#: So many programs keep a large device busy: it has 132 multiprocessors, which run several programs each.
ENOUGH_PROGRAMS = 1056
MOST_SPLITS = 16


#: The gradient's constants of a row are 8 floats, 32 bytes, at these places.
ROW = tl.constexpr(8)
ROW_PEAK = tl.constexpr(0)
ROW_LOG_SUM = tl.constexpr(1)
ROW_TEACHER_PEAK = tl.constexpr(2)
ROW_TEACHER_LOG_SUM = tl.constexpr(3)
ROW_TEACHER_AT_PEAK = tl.constexpr(4)
ROW_CENTRE = tl.constexpr(5)
ROW_FACTOR = tl.constexpr(6)
ROW_TARGET = tl.constexpr(7)


def process_rows(
    student: Tensor,
    teacher: Tensor | None,
    rows: TokenRows,
    objective: Objective,
    gradient: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    before_gradient: Callable[[Tensor | None], None] = lambda constants: None,
) -> None:
    """Fills `rows` from (R, V) float32 products of hidden states and heads, which may be overwritten, and biases, (V,).

    `gradient`, where wanted, receives rows.weight · dL/dlogits, and 0 where that weight is 0, whatever the logits; it
    may be `student` itself. Biases and the rows of all three start 16-byte aligned, padded to a multiple of 16 entries.
    """
    tokens, vocab = student.shape
    if tokens == 0:
        return
    splits, mixes, hard = split_rows(tokens, vocab), is_mixture(objective.divergence), objective.hard or HardTerm()
    block = BLOCK if student_bias is None and teacher_bias is None else NARROW_BLOCK
    partial = student.new_empty((tokens, splits, RECORD.value))
    mixture = student.new_empty((tokens, splits, 2)) if mixes else None
    constants = None if gradient is None else student.new_empty((tokens, ROW.value))
    teacher_stride = 0 if teacher is None else teacher.stride(0)
    logits = (student, teacher, student_bias, teacher_bias, student.stride(0), teacher_stride, vocab)
    settings = kernel_settings(objective)
    grid = (tokens, splits)
    label_logits = (rows.labels, rows.student_logprob, rows.teacher_logprob, rows.hard_labels, rows.hard_loss)
    apart = objective.has_teacher and objective.hard_apart
    hard_sums = student.new_empty((tokens, splits)) if apart else None
    partials_kernel[grid](
        *logits,
        partial,
        *label_logits,
        hard_sums,
        objective.hard_ratio,
        **settings,
        BLOCK=block,
        num_warps=WARPS,
    )
    if mixes:
        mixture_kernel[grid](
            *logits,
            partial,
            mixture,
            objective.beta,
            1 - objective.beta,
            **settings,
            SPLITS=splits,
            BLOCK=NARROW_BLOCK,
            num_warps=WARPS,
        )
    combine(partial, mixture, hard_sums, constants, rows, objective, vocab)
    before_gradient(constants)
    if gradient is not None:
        block = NARROW_BLOCK if mixes else block
        gradient_kernel[(tokens, triton.cdiv(vocab, block))](
            *logits,
            gradient,
            gradient.stride(0),
            constants,
            rows.hard_labels,
            hard_sums,
            splits,
            objective.beta,
            1 - objective.beta,
            objective.hard_ratio,
            *(hard.label_smoothing / vocab, hard.entropy_weight),
            **settings,
            BLOCK=block,
            num_warps=WARPS,
        )


def combine(
    partial: Tensor,
    mixture: Tensor | None,
    hard_sums: Tensor | None,
    constants: Tensor | None,
    rows: TokenRows,
    objective: Objective,
    vocab: int,
) -> None:
    """Fills `rows` from the records of their splits, (R, splits, 8), those of a mixture, (R, splits, 2), and the sums
    of a hard term that is apart, (R, splits), the first of which becomes the logarithm of the row's.

    Where labels are given, both models' u at them lie in `rows.student_logprob` and `rows.teacher_logprob`, and the
    student's at hard labels in `rows.hard_loss`. `constants`, (R, 8), receives what the gradient needs.
    """
    tokens, splits, _ = partial.shape
    hard = objective.hard or HardTerm()
    combine_kernel[(tokens,)](
        partial,
        mixture,
        hard_sums,
        constants,
        *(rows.weight, rows.old_logprobs, rows.loss, rows.student_entropy, rows.teacher_entropy),
        *(rows.student_logprob, rows.teacher_logprob, rows.logsumexp, rows.hard_weight, rows.hard_loss),
        objective.beta,
        1 - objective.beta,
        float("inf") if objective.importance_clip is None else objective.importance_clip,
        objective.student.scale / objective.student.temperature,
        objective.student.factor,
        objective.teacher.factor,
        *(hard.label_smoothing, hard.label_smoothing / vocab, hard.entropy_weight, hard.z_loss, objective.hard_ratio),
        DIVERGENCE=objective.divergence,
        SPLITS=splits,
        num_warps=1,
    )


def split_rows(tokens: int, vocab: int) -> int:
    """How many programs share a row: a power of two that fills the device, and no more than the row has blocks."""
    splits = 1
    while splits < MOST_SPLITS and tokens * splits < ENOUGH_PROGRAMS and 2 * splits * BLOCK <= vocab:
        splits *= 2
    return splits


def kernel_settings(objective: Objective) -> dict[str, Any]:
    """The arguments that every kernel on logits takes from the objective."""
    student, teacher = objective.student, objective.teacher
    return {
        "student_inner": student.inner,
        "teacher_inner": teacher.inner,
        "student_factor": student.factor,
        "teacher_factor": teacher.factor,
        "DIVERGENCE": objective.divergence,
        "STUDENT_FORM": form(student),
        "TEACHER_FORM": form(teacher),
    }


@triton.jit
def combine_kernel(
    partial_pointer,
    mixture_pointer,
    hard_sums_pointer,
    constants_pointer,
    weight_pointer,
    old_logprobs_pointer,
    loss_pointer,
    student_entropy_pointer,
    teacher_entropy_pointer,
    student_logprob_pointer,
    teacher_logprob_pointer,
    logsumexp_pointer,
    hard_weight_pointer,
    hard_loss_pointer,
    beta,
    rest_of_beta,
    importance_clip,
    slope,
    student_factor,
    teacher_factor,
    smoothing,
    of_entries,
    entropy_weight,
    z_loss,
    hard_ratio,
    DIVERGENCE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a row. It writes the token's values, its weight times its importance, and the gradient's constants.

    Log-probabilities are written over the labels' u. Writes the constants (student max, log Σ e, teacher max,
    log Σ f, teacher's u at the student's max, centre, factor, target): the gradient is factor · p · (g - centre), with
    g relative to its value at the peak, and at a hard label the target less.
    """
    row = tl.program_id(0).to(tl.int64)
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * RECORD
    student_max = tl.load(record + PEAK)
    student_sums = tl.load(record + SUM)
    a, student_sum, student_dot, student_shift = merge(student_max, student_sums, tl.load(record + DOT), student_factor)
    student_log_sum = tl.log(student_sum)
    student_entropy = student_log_sum - student_dot / student_sum
    tl.store(student_entropy_pointer + row, student_entropy)
    b, teacher_log_sum, at_peak = 0.0, 0.0, 0.0
    if DIVERGENCE != "cross_entropy":
        teacher_sums = tl.load(record + TEACHER_SUM)
        b, teacher_sum, teacher_dot, teacher_shift = merge(
            tl.load(record + TEACHER_PEAK), teacher_sums, tl.load(record + TEACHER_DOT), teacher_factor
        )
        at_peak = teacher_at_peak(record, student_max, a)
        teacher_log_sum = tl.log(teacher_sum)
        tl.store(teacher_entropy_pointer + row, teacher_log_sum - teacher_dot / teacher_sum)

    cross = tl.load(record + CROSS)
    centre = 0.0
    if DIVERGENCE == "cross_entropy":
        logsumexp = a * student_factor + student_log_sum
        # A top-k teacher's is in float64: what is compared with it may differ by little.
        wide = a.to(tl.float64) * student_factor + tl.log(student_sum.to(tl.float64))
        tl.store(logsumexp_pointer + row, wide.to(logsumexp_pointer.dtype.element_ty))
        logprob = (tl.load(student_logprob_pointer + row) - a) * student_factor - student_log_sum
        mean_logprob = tl.sum(cross, 0) * (student_factor * of_entries) - smoothing * logsumexp
        loss = z_loss * logsumexp * logsumexp - (1 - smoothing) * logprob - mean_logprob
        loss -= entropy_weight * student_entropy
        centre = -1 - 2 * z_loss * logsumexp - entropy_weight * (student_entropy - student_log_sum)
    elif DIVERGENCE == "reverse_kl":
        offset = student_shift - (tl.load(record + TEACHER_AT_PEAK) - at_peak) * teacher_factor
        centre = tl.sum(rebased(student_sums, cross, student_shift, offset), 0) / student_sum
        loss = centre - student_log_sum + ((b - at_peak) * teacher_factor + teacher_log_sum)
    elif DIVERGENCE == "forward_kl":
        offset = teacher_shift - student_shift
        mean = tl.sum(rebased(teacher_sums, cross, teacher_shift, offset), 0) / teacher_sum
        loss = mean - teacher_log_sum + student_log_sum
    else:
        sums = mixture_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * 2
        centre = tl.sum(tl.load(sums), 0)
        loss = tl.sum(tl.load(sums + 1), 0)
        if DIVERGENCE == "jsd":
            at_peak = mixture_peak(at_peak, b, teacher_factor)
            peak_ratio = ((b - at_peak) * teacher_factor + teacher_log_sum) - student_log_sum
            loss = centre + rest_of_beta * log_over_mixture(-peak_ratio, beta, rest_of_beta) + beta * loss
    tl.store(loss_pointer + row, loss)

    target = 1 - smoothing
    if hard_loss_pointer is not None:
        hard_log_sum = student_log_sum
        if hard_sums_pointer is not None:
            sums = tl.load(hard_sums_pointer + row * SPLITS + tl.arange(0, SPLITS))
            hard_log_sum = tl.log(tl.sum(exp(student_shift * hard_ratio) * sums, 0))
            tl.store(hard_sums_pointer + row * SPLITS, hard_log_sum)
        label_z = (tl.load(hard_loss_pointer + row) - a) * student_factor * hard_ratio
        tl.store(hard_loss_pointer + row, hard_log_sum - label_z)
        target = tl.load(hard_weight_pointer + row) * hard_ratio

    weight = tl.load(weight_pointer + row)
    if student_logprob_pointer is not None:
        student_logprob = (tl.load(student_logprob_pointer + row) - a) * student_factor - student_log_sum
        tl.store(student_logprob_pointer + row, student_logprob)
        if teacher_logprob_pointer is not None:
            teacher_logprob = (tl.load(teacher_logprob_pointer + row) - b) * teacher_factor - teacher_log_sum
            tl.store(teacher_logprob_pointer + row, teacher_logprob)
        if old_logprobs_pointer is not None:
            weight *= tl.minimum(tl.exp(student_logprob - tl.load(old_logprobs_pointer + row)), importance_clip)
            tl.store(weight_pointer + row, weight)
    if constants_pointer is not None:
        constants = constants_pointer + row * ROW
        tl.store(constants + ROW_PEAK, a)
        tl.store(constants + ROW_LOG_SUM, student_log_sum)
        tl.store(constants + ROW_TEACHER_PEAK, b)
        tl.store(constants + ROW_TEACHER_LOG_SUM, teacher_log_sum)
        tl.store(constants + ROW_TEACHER_AT_PEAK, at_peak)
        tl.store(constants + ROW_CENTRE, centre)
        tl.store(constants + ROW_FACTOR, weight * slope)
        if hard_loss_pointer is not None or DIVERGENCE == "cross_entropy":
            tl.store(constants + ROW_TARGET, target)


@triton.jit
def gradient_kernel(
    student_pointer,
    teacher_pointer,
    student_bias_pointer,
    teacher_bias_pointer,
    student_stride,
    teacher_stride,
    vocab,
    gradient_pointer,
    gradient_stride,
    constants_pointer,
    hard_labels_pointer,
    hard_sums_pointer,
    splits,
    beta,
    rest_of_beta,
    hard_ratio,
    of_entries,
    entropy_weight,
    student_inner,
    teacher_inner,
    student_factor,
    teacher_factor,
    DIVERGENCE: tl.constexpr,
    STUDENT_FORM: tl.constexpr,
    TEACHER_FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last pass, over one block of a row: writes factor · p · (g - centre), and p - q for forward KL.

    Where the factor is 0 so is the gradient, also of a token whose logits are no numbers; and a masked entry's is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    constants = constants_pointer + row * ROW
    a = tl.load(constants + ROW_PEAK)
    student_log_sum = tl.load(constants + ROW_LOG_SUM)
    b = tl.load(constants + ROW_TEACHER_PEAK)
    teacher_log_sum = tl.load(constants + ROW_TEACHER_LOG_SUM)
    at_peak = tl.load(constants + ROW_TEACHER_AT_PEAK)
    centre = tl.load(constants + ROW_CENTRE)
    factor = tl.load(constants + ROW_FACTOR)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = load_logits(
        student_pointer + row * student_stride,
        student_bias_pointer,
        student_stride,
        columns,
        vocab,
        student_inner,
        STUDENT_FORM,
    )
    t = s
    if DIVERGENCE != "cross_entropy":
        t = load_logits(
            teacher_pointer + row * teacher_stride,
            teacher_bias_pointer,
            teacher_stride,
            columns,
            vocab,
            teacher_inner,
            TEACHER_FORM,
        )
    z = (s - a) * student_factor
    p = tl.exp(z - student_log_sum)
    if DIVERGENCE == "cross_entropy":
        gradient = p * (z * entropy_weight - centre) - of_entries
    elif DIVERGENCE == "reverse_kl":
        gradient = p * (z - (t - at_peak) * teacher_factor - centre)
    elif DIVERGENCE == "forward_kl":
        gradient = p - tl.exp((t - b) * teacher_factor - teacher_log_sum)
    else:
        at_peak = mixture_peak(at_peak, b, teacher_factor)
        peak_ratio = ((b - at_peak) * teacher_factor + teacher_log_sum) - student_log_sum
        share, rest, log_share = mixture_shares(peak_ratio, beta, rest_of_beta)
        change = (t - at_peak) * teacher_factor - z
        gradient = p * (mixture_score(change, share, rest, log_share, beta, rest_of_beta, DIVERGENCE) - centre)
    if hard_labels_pointer is not None:
        target = tl.load(constants + ROW_TARGET)
        if hard_sums_pointer is not None:
            gradient += target * tl.exp(z * hard_ratio - tl.load(hard_sums_pointer + row * splits))
        elif DIVERGENCE != "cross_entropy":
            gradient += target * p
        gradient -= tl.where(columns == tl.load(hard_labels_pointer + row), target, 0.0)
    if student_bias_pointer is not None and (DIVERGENCE == "forward_kl" or hard_labels_pointer is not None):
        gradient = tl.where(s > FAR_BELOW, gradient, 0.0)  # elsewhere p is 0 there
    gradient *= factor
    if STUDENT_FORM == "capped":
        capped = tl.maximum(s, -1.0)  # it lies far below where an entry was taken out
        gradient *= 1 - capped * capped
    # Past the vocabulary p is 0, and so is what is written to the padding.
    gradient = tl.where(columns < tl.where(factor == 0, 0, vocab), gradient, 0.0)
    out = gradient_pointer + row * gradient_stride + columns
    tl.store(out, gradient.to(gradient_pointer.dtype.element_ty), mask=columns < gradient_stride)
