"""The running softmax sums of a row, as Triton device functions: how a block of logits is folded into them, and how
the sums of a row's splits become the row's.

A block is (M, N) of M rows' u, of which the logits are factor · u; a row's running values are (M, 1). Its sums are
(M, 1) too, or (M, N) where a kernel of few rows would rather add up the columns once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdft_kernels.backends.gpu.math import exp
from sdft_kernels.backends.records import Field

#: Floats of a split's record for two models, 32 bytes, and the places in it: `backends.records.Field`. The sum of a
#: hard term, which few calls have, is in an array of its own.
RECORD = tl.constexpr(int(Field.HARD_SUM))
PEAK = tl.constexpr(int(Field.PEAK))
SUM = tl.constexpr(int(Field.SUM))
DOT = tl.constexpr(int(Field.DOT))
TEACHER_PEAK = tl.constexpr(int(Field.TEACHER_PEAK))
TEACHER_SUM = tl.constexpr(int(Field.TEACHER_SUM))
TEACHER_DOT = tl.constexpr(int(Field.TEACHER_DOT))
CROSS = tl.constexpr(int(Field.CROSS))
TEACHER_AT_PEAK = tl.constexpr(int(Field.TEACHER_AT_PEAK))


@triton.jit
def rebased(total, moment, shift, offset):
    """Σ e g after the maximum that e is relative to, and the origin of g, have changed: each e is multiplied by
    exp(shift), and each g grows by `offset`; `total` is Σ e and `moment` Σ e g before."""
    return exp(shift) * (moment + offset * total)


@triton.jit
def add(total, values):
    """total + values, the values of a row first summed where `total` holds one number for it."""
    if total.shape[1] == 1:
        return total + tl.sum(values, 1, keep_dims=True)
    else:
        return total + values


@triton.jit
def fold(u, a, total, dot, factor):
    """Folds u into its running maximum a, Σ e and Σ e z, where z = factor (u - a) and e = exp(z).

    Returns these three; then how far the old largest logit lay above the new one, z, and e.
    """
    new_a = tl.maximum(a, tl.max(u, 1, keep_dims=True))
    # Before the first block there are no sums, and the shift is 0.
    shift = tl.where(a == float("-inf"), 0.0, (a - new_a) * factor)
    z = (u - new_a) * factor
    e = exp(z)
    dot = add(rebased(total, dot, shift, shift), e * z)
    total = add(exp(shift) * total, e)
    return new_a, total, dot, shift, z, e


@triton.jit
def fold_pair(
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
    DIVERGENCE: tl.constexpr,
):
    """Folds both models' u, s and t, into (student max a, Σ e, Σ e z, teacher max b, Σ f, Σ f y, D, t at the student's
    max c), with z = student_factor (s - a), y = teacher_factor (t - b), e = exp(z) and f = exp(y).

    For reverse KL, D = Σ e (z - teacher_factor (t - c)); for forward KL, D = Σ f (y - z).
    """
    new_a, new_student_sum, new_student_dot, student_shift, below, e = fold(
        s, a, student_sum, student_dot, student_factor
    )
    new_b, new_teacher_sum, new_teacher_dot, teacher_shift, t_below_b, f = fold(
        t, b, teacher_sum, teacher_dot, teacher_factor
    )
    if DIVERGENCE == "forward_kl":
        cross = rebased(teacher_sum, cross, teacher_shift, teacher_shift - student_shift)
        cross = add(cross, f * (t_below_b - below))
    else:
        block_at_peak = tl.max(tl.where(s == new_a, t, float("-inf")), 1, keep_dims=True)
        new_at_peak = tl.where(new_a > a, block_at_peak, at_peak)
        if DIVERGENCE == "reverse_kl":
            cross = rebased(student_sum, cross, student_shift, student_shift - (at_peak - new_at_peak) * teacher_factor)
            cross = add(cross, e * (below - (t - new_at_peak) * teacher_factor))
        at_peak = new_at_peak
    return (
        new_a,
        new_student_sum,
        new_student_dot,
        new_b,
        new_teacher_sum,
        new_teacher_dot,
        cross,
        at_peak,
    )


@triton.jit
def store_pair(record, mask, a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak):
    """Writes what `fold_pair` returned last to the records of M rows, (M, 1) pointers."""
    tl.store(record + PEAK, a, mask)
    tl.store(record + SUM, tl.sum(student_sum, 1, keep_dims=True), mask)
    tl.store(record + DOT, tl.sum(student_dot, 1, keep_dims=True), mask)
    tl.store(record + TEACHER_PEAK, b, mask)
    tl.store(record + TEACHER_SUM, tl.sum(teacher_sum, 1, keep_dims=True), mask)
    tl.store(record + TEACHER_DOT, tl.sum(teacher_dot, 1, keep_dims=True), mask)
    tl.store(record + CROSS, tl.sum(cross, 1, keep_dims=True), mask)
    tl.store(record + TEACHER_AT_PEAK, at_peak, mask)


@triton.jit
def merge(largest, total, dot, factor):
    """A row's maximum a, Σ e and Σ e z from its splits'; then how far each split's largest logit lies above all."""
    a = tl.max(largest, 0)
    shift = (largest - a) * factor
    return a, tl.sum(exp(shift) * total, 0), tl.sum(rebased(total, dot, shift, shift), 0), shift


@triton.jit
def merge_softmax(partial_pointer, row, student_factor, teacher_factor, SPLITS: tl.constexpr):
    """A row's (student max, Σ e), (teacher max, Σ f) and the teacher's u at the student's max, from its splits."""
    record = partial_pointer + (row * SPLITS + tl.arange(0, SPLITS)) * RECORD
    student_max = tl.load(record + PEAK)
    a, student_sum, _, _ = merge(student_max, tl.load(record + SUM), tl.load(record + DOT), student_factor)
    b, teacher_sum, _, _ = merge(
        tl.load(record + TEACHER_PEAK), tl.load(record + TEACHER_SUM), tl.load(record + TEACHER_DOT), teacher_factor
    )
    return a, student_sum, b, teacher_sum, teacher_at_peak(record, student_max, a)


@triton.jit
def teacher_at_peak(record, student_max, a):
    """The teacher's u at the student's maximum a, from the splits' records and maxima."""
    return tl.max(tl.where(student_max == a, tl.load(record + TEACHER_AT_PEAK), float("-inf")), 0)
