"""The kernels that read logits once and leave sums: each model's softmax, the divergence's own sum, a mixture's."""

from __future__ import annotations

import triton
import triton.language as tl

from sdft_kernels.backends.gpu.math import (
    bounded,
    exp,
    load_logit,
    load_logits,
    log_over_mixture,
    mixture_peak,
    mixture_score,
    mixture_shares,
    split_columns,
)
from sdft_kernels.backends.gpu.sums import RECORD, fold, fold_pair, merge_softmax, store_pair


@triton.jit
def partials_kernel(
    student_pointer,
    teacher_pointer,
    student_bias_pointer,
    teacher_bias_pointer,
    student_stride,
    teacher_stride,
    vocab,
    partial_pointer,
    labels_pointer,
    student_logprob_pointer,
    teacher_logprob_pointer,
    hard_labels_pointer,
    hard_loss_pointer,
    hard_sums_pointer,
    hard_ratio,
    student_inner,
    teacher_inner,
    student_factor,
    teacher_factor,
    DIVERGENCE: tl.constexpr,
    STUDENT_FORM: tl.constexpr,
    TEACHER_FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a split of a row of both models' logits: writes the split's record (see `fold_pair`), and a row's
    first split u at its labels, where `combine_kernel` expects them. Without a teacher, the record has the sum of all u
    where a divergence's own sum would be. A hard term that is apart has a sum of exponentials beside the record."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    student_pointer += row * student_stride
    if DIVERGENCE != "cross_entropy":
        teacher_pointer += row * teacher_stride
    if labels_pointer is not None:
        label = tl.load(labels_pointer + row)
        student_label = load_logit(
            student_pointer,
            student_bias_pointer,
            label,
            vocab,
            student_inner,
            STUDENT_FORM,
        )
        tl.store(student_logprob_pointer + row, student_label, mask=split == 0)
        if DIVERGENCE != "cross_entropy":
            teacher_label = load_logit(
                teacher_pointer,
                teacher_bias_pointer,
                label,
                vocab,
                teacher_inner,
                TEACHER_FORM,
            )
            tl.store(teacher_logprob_pointer + row, teacher_label, mask=split == 0)
    if hard_loss_pointer is not None:
        hard_label = load_logit(
            student_pointer,
            student_bias_pointer,
            tl.load(hard_labels_pointer + row),
            vocab,
            student_inner,
            STUDENT_FORM,
        )
        tl.store(hard_loss_pointer + row, hard_label, mask=split == 0)
    a = tl.full([1, 1], float("-inf"), tl.float32)
    b = tl.full([1, 1], float("-inf"), tl.float32)
    at_peak = tl.zeros([1, 1], tl.float32)
    student_sum = tl.zeros([1, BLOCK], tl.float32)
    student_dot = tl.zeros([1, BLOCK], tl.float32)
    teacher_sum = tl.zeros([1, BLOCK], tl.float32)
    teacher_dot = tl.zeros([1, BLOCK], tl.float32)
    cross = tl.zeros([1, BLOCK], tl.float32)
    hard_sum = tl.zeros([1, BLOCK], tl.float32)
    first_column, past_column = split_columns(split, tl.num_programs(1), vocab, BLOCK)
    for start in range(first_column, past_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        s = load_logits(
            student_pointer,
            student_bias_pointer,
            student_stride,
            columns,
            vocab,
            student_inner,
            STUDENT_FORM,
        )
        last = a
        if DIVERGENCE == "cross_entropy":
            a, student_sum, student_dot, _, _, _ = fold(s, a, student_sum, student_dot, student_factor)
            cross += tl.where(columns < vocab, s, 0.0)
        else:
            t = load_logits(
                teacher_pointer,
                teacher_bias_pointer,
                teacher_stride,
                columns,
                vocab,
                teacher_inner,
                TEACHER_FORM,
            )
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
        if hard_sums_pointer is not None:
            hard_factor = student_factor * hard_ratio
            shift = tl.where(last == float("-inf"), 0.0, (last - a) * hard_factor)
            hard_sum = exp(shift) * hard_sum + exp((s - a) * hard_factor)
    record = partial_pointer + (row * tl.num_programs(1) + split + tl.arange(0, 1)[:, None]) * RECORD
    store_pair(record, None, a, student_sum, student_dot, b, teacher_sum, teacher_dot, cross, at_peak)
    if hard_sums_pointer is not None:
        tl.store(hard_sums_pointer + row * tl.num_programs(1) + split, tl.sum(hard_sum))


@triton.jit
def mixture_kernel(
    student_pointer,
    teacher_pointer,
    student_bias_pointer,
    teacher_bias_pointer,
    student_stride,
    teacher_stride,
    vocab,
    partial_pointer,
    mixture_pointer,
    beta,
    rest_of_beta,
    student_inner,
    teacher_inner,
    student_factor,
    teacher_factor,
    DIVERGENCE: tl.constexpr,
    STUDENT_FORM: tl.constexpr,
    TEACHER_FORM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second pass of a mixture, over a split of a row: writes Σ p (g - g at the peak), and the loss's own sum,
    Σ p log(p/m) for the skewed reverse KL and Σ q log(q/m) for the other two."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    a, student_sum, b, teacher_sum, at_peak = merge_softmax(
        partial_pointer, row, student_factor, teacher_factor, SPLITS
    )
    student_log_sum = tl.log(student_sum)
    teacher_log_sum = tl.log(teacher_sum)
    at_peak = mixture_peak(at_peak, b, teacher_factor)
    peak_ratio = ((b - at_peak) * teacher_factor + teacher_log_sum) - student_log_sum
    share, rest, log_share = mixture_shares(peak_ratio, beta, rest_of_beta)
    student_pointer += row * student_stride
    teacher_pointer += row * teacher_stride
    scores = tl.zeros([BLOCK], tl.float32)
    losses = tl.zeros([BLOCK], tl.float32)
    first_column, past_column = split_columns(split, tl.num_programs(1), vocab, BLOCK)
    for start in range(first_column, past_column, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = load_logits(
            student_pointer,
            student_bias_pointer,
            student_stride,
            columns,
            vocab,
            student_inner,
            STUDENT_FORM,
        )
        t = load_logits(
            teacher_pointer,
            teacher_bias_pointer,
            teacher_stride,
            columns,
            vocab,
            teacher_inner,
            TEACHER_FORM,
        )
        z = (s - a) * student_factor
        p = tl.exp(z - student_log_sum)
        ratio = z - (t - at_peak) * teacher_factor
        log_ratio = bounded(ratio + peak_ratio)
        if DIVERGENCE == "skew_reverse_kl":
            losses += p * log_over_mixture(-log_ratio, beta, rest_of_beta)
        else:
            q = tl.exp((t - b) * teacher_factor - teacher_log_sum)
            losses += q * log_over_mixture(log_ratio, rest_of_beta, beta)
        scores += p * mixture_score(-ratio, share, rest, log_share, beta, rest_of_beta, DIVERGENCE)
    record = mixture_pointer + (row * tl.num_programs(1) + split) * 2
    tl.store(record, tl.sum(scores, 0))
    tl.store(record + 1, tl.sum(losses, 0))
