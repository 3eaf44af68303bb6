"""The coarse divergence of a block of logits, by the kernels of a cross-entropy and three of its own.

Before the others read the logits, `take_out` keeps the entries that the teacher gives and masks them, so that the
softmax is the rest's. Between their last two, `compare` takes a row's few outcomes, as coarse.py has them, in float64,
and replaces the constants of the gradient. Into that, `put_back` writes the entries' own at the end.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdft_kernels.backends.gpu.divergence import ROW, ROW_CENTRE, ROW_FACTOR, process_rows
from sdft_kernels.backends.gpu.math import FAR_BELOW, add_bias, form, load_logit, transform
from sdft_kernels.coarse import LEAST_TAIL
from sdft_kernels.divergences import MASKED, Objective
from sdft_kernels.tokens import TokenRows, TopTokens

#: The most entries of a row that a program, which is one warp, handles at once.
LARGEST_BLOCK = 128

_LOG_OF_LEAST_TAIL = tl.constexpr(math.log(LEAST_TAIL))


def process_top_rows(
    student: Tensor,
    top: TopTokens,
    rows: TokenRows,
    objective: Objective,
    gradient: Tensor | None,
    bias: Tensor | None = None,
) -> None:
    """Fills `rows` and `gradient` as `process_rows` does, from (R, V) float32 products, which are overwritten."""
    (tokens, vocab), entries = student.shape, top.ids.shape[1]
    if tokens == 0:
        return
    assert objective.coarse is not None
    options, coarse, grid = objective.student, objective.coarse, (tokens,)
    launch = {"BLOCK": min(LARGEST_BLOCK, triton.next_power_of_2(entries)), "num_warps": 1}
    u = student.new_empty((tokens, entries))
    label_u = None if rows.labels is None else student.new_empty(tokens)
    take_out_kernel[grid](
        *(student, bias, student.stride(0), vocab, top.ids, entries, rows.labels, u, label_u, options.inner),
        math.copysign(math.inf if options.softcap is not None else -MASKED, -options.inner),
        FORM=form(options),
        **launch,
    )
    unused, entropy = (torch.empty_like(rows.loss) for _ in range(2))
    logsumexp = torch.empty_like(rows.loss, dtype=torch.float64)
    rest = TokenRows(rows.weight, None, None, unused, entropy, None, unused, None, logsumexp)

    def compare_rows(constants: Tensor | None) -> None:
        compare_kernel[grid](
            *(u, entries, vocab, top.logprobs, top.tail, logsumexp, entropy, label_u, rows.old_logprobs),
            *(rows.weight, rows.loss, rows.student_entropy, rows.student_logprob, top.student_tail, constants),
            *in_two(coarse.beta),
            math.inf if objective.importance_clip is None else objective.importance_clip,
            options.factor,
            options.scale / options.temperature,
            MASKED / 2 * options.factor,
            DIVERGENCE=coarse.divergence,
            BUCKET=coarse.tail == "bucket",
            CAPPED=options.softcap is not None,
            **launch,
        )

    process_rows(student, None, rest, objective, gradient, bias, before_gradient=compare_rows)
    if gradient is not None:
        put_back_kernel[grid](gradient, gradient.stride(0), vocab, top.ids, entries, u, **launch)


def in_two(value: float) -> tuple[float, float]:
    """A number as the sum of two: Triton gives each of a kernel's numbers the digits of float32."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


@triton.jit
def take_out_kernel(
    student_pointer,
    bias_pointer,
    stride,
    vocab,
    ids_pointer,
    entries,
    labels_pointer,
    u_pointer,
    label_u_pointer,
    inner,
    masked,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Writes u at its entries, and at its label where there are labels; masks the entries."""
    row = tl.program_id(0).to(tl.int64)
    student_pointer += row * stride
    if labels_pointer is not None:
        label = tl.load(labels_pointer + row)
        tl.store(label_u_pointer + row, load_logit(student_pointer, bias_pointer, label, vocab, inner, FORM))
        tl.debug_barrier()  # the label may be one of the entries
    for start in range(0, entries, BLOCK):
        places = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_pointer + row * entries + places, mask=places < entries, other=vocab)
        given = ids < vocab
        y = add_bias(tl.load(student_pointer + ids, mask=given, other=0.0), bias_pointer, ids, vocab)
        tl.store(u_pointer + row * entries + places, transform(y, inner, FORM), mask=places < entries)
        tl.store(student_pointer + ids, masked, mask=given)


@triton.jit
def log_add(a, b):
    """log(exp(a) + exp(b))."""
    largest = tl.maximum(a, b)
    return largest + tl.log(1 + tl.exp(tl.minimum(a, b) - largest))


@triton.jit
def load_outcomes(u_pointer, logprobs_pointer, start, entries, factor, BLOCK: tl.constexpr):
    """Of some entries of a row u, z, the teacher's log-probability, whether there is one, and their places."""
    places = start + tl.arange(0, BLOCK)
    log_q = tl.load(logprobs_pointer + places, mask=places < entries, other=-float("inf")).to(tl.float64)
    u = tl.load(u_pointer + places, mask=places < entries, other=0.0)
    given = log_q > -float("inf")
    return u, tl.where(given, u.to(tl.float64) * factor, -float("inf")), log_q, given, places


@triton.jit
def normalised(z, log_q, given, student_peak, student_log_sum, teacher_total):
    """Both models' log-probabilities of outcomes, from the logarithms of their sums; of no outcome as if masked."""
    log_p = tl.where(given, z - student_peak - student_log_sum, FAR_BELOW)
    return log_p, tl.where(given, log_q - teacher_total, FAR_BELOW)


@triton.jit
def loss_and_score(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """An outcome's term of the divergence, and g, where dL/dz = p (g - Σ p g). Forward KL has no g, but p - q."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if DIVERGENCE == "reverse_kl":
        return p * (log_p - log_q), log_p - log_q
    elif DIVERGENCE == "forward_kl":
        return q * (log_q - log_p), 0 * q
    else:
        log_m = log_add(log_p + tl.log(1 - beta), log_q + tl.log(beta))
        over_p, over_q = log_p - log_m, log_q - log_m
        if DIVERGENCE == "jsd":
            return (1 - beta) * p * over_p + beta * q * over_q, (1 - beta) * over_p
        elif DIVERGENCE == "skew_reverse_kl":
            return p * over_p, over_p - (1 - beta) * tl.exp(over_p)
        else:
            return q * over_q, -(1 - beta) * tl.exp(over_q)


@triton.jit
def of_logit(log_p, log_q, g, mean_g, DIVERGENCE: tl.constexpr):
    """An outcome's dL/dz."""
    if DIVERGENCE == "forward_kl":
        return tl.exp(log_p) - tl.exp(log_q)
    else:
        return tl.exp(log_p) * (g - mean_g)


@triton.jit
def compare_kernel(
    u_pointer,
    entries,
    vocab,
    logprobs_pointer,
    tail_pointer,
    rest_logsumexp_pointer,
    rest_entropy_pointer,
    label_u_pointer,
    old_logprobs_pointer,
    weight_pointer,
    loss_pointer,
    entropy_pointer,
    logprob_pointer,
    student_tail_pointer,
    constants_pointer,
    beta_high,
    beta_low,
    importance_clip,
    factor,
    slope,
    masked,
    DIVERGENCE: tl.constexpr,
    BUCKET: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, in float64: `compare` of coarse.py. Writes the token's values, its weight times its
    importance, the gradient's constants for the rest, and over the entries' u their logits' gradients."""
    row = tl.program_id(0).to(tl.int64)
    u_pointer += row * entries
    logprobs_pointer += row * entries
    largest = tl.full((), -float("inf"), tl.float64)
    teacher_largest = largest
    count = tl.full((), 0, tl.int32)
    beta = tl.full((), beta_high, tl.float64) + beta_low
    for start in range(0, entries, BLOCK):
        _, z, log_q, given, _ = load_outcomes(u_pointer, logprobs_pointer, start, entries, factor, BLOCK)
        largest = tl.maximum(largest, tl.max(z, 0))
        teacher_largest = tl.maximum(teacher_largest, tl.max(log_q, 0))
        count += tl.sum(given.to(tl.int32), 0)
    total = tl.full((), 0.0, tl.float64)
    teacher_total = total
    for start in range(0, entries, BLOCK):
        _, z, log_q, _, _ = load_outcomes(u_pointer, logprobs_pointer, start, entries, factor, BLOCK)
        total += tl.sum(tl.exp(z - largest), 0)
        teacher_total += tl.sum(tl.exp(log_q - teacher_largest), 0)

    rest = tl.load(rest_logsumexp_pointer + row)
    tail_log_q = tl.load(tail_pointer + row)
    # Masked entries all lie so far below that a sum of logarithms would not tell how many they are.
    peak = tl.maximum(largest, rest)
    log_sum = tl.log(tl.exp(largest - peak) * total + tl.exp(rest - peak))
    logsumexp = peak + log_sum
    tail_logprob = rest - logsumexp
    none_left = count == vocab
    nothing = none_left | ((rest <= masked) & (tail_log_q <= _LOG_OF_LEAST_TAIL))
    student_peak = largest
    student_log_sum = tl.log(total)
    teacher_total = teacher_largest + tl.log(teacher_total)
    tail_log_p = tl.full((), FAR_BELOW, tl.float64)
    if BUCKET:
        tail_log_q = tl.maximum(tail_log_q, FAR_BELOW)
        student_peak = tl.where(nothing, largest, peak)
        student_log_sum = tl.where(nothing, student_log_sum, log_sum)
        teacher_total = tl.where(nothing, teacher_total, log_add(teacher_total, tail_log_q))
        tail_log_p = tl.where(nothing, FAR_BELOW, rest - student_peak - student_log_sum)
        tail_log_q = tl.where(nothing, FAR_BELOW, tail_log_q - teacher_total)
    else:
        tail_log_q = tail_log_p

    loss, tail_g = loss_and_score(tail_log_p, tail_log_q, beta, DIVERGENCE)
    mean_g = tl.exp(tail_log_p) * tail_g
    rest_entropy = tl.load(rest_entropy_pointer + row).to(tl.float64)
    entropy = tl.exp(tail_logprob) * (rest_entropy - tail_logprob)
    for start in range(0, entries, BLOCK):
        _, z, log_q, given, _ = load_outcomes(u_pointer, logprobs_pointer, start, entries, factor, BLOCK)
        log_p, log_q = normalised(z, log_q, given, student_peak, student_log_sum, teacher_total)
        term, g = loss_and_score(log_p, log_q, beta, DIVERGENCE)
        loss += tl.sum(term, 0)
        mean_g += tl.sum(tl.exp(log_p) * g, 0)
        logprob = tl.where(given, z - logsumexp, FAR_BELOW)
        entropy -= tl.sum(tl.exp(logprob) * logprob, 0)
    tl.store(loss_pointer + row, loss.to(tl.float32))
    tl.store(entropy_pointer + row, entropy.to(tl.float32))
    tl.store(student_tail_pointer + row, tl.where(none_left, -float("inf"), tail_logprob).to(tl.float32))

    weight = tl.load(weight_pointer + row)
    if label_u_pointer is not None:
        label_z = tl.load(label_u_pointer + row).to(tl.float64) * factor
        label_logprob = (label_z - logsumexp).to(tl.float32)
        tl.store(logprob_pointer + row, label_logprob)
        if old_logprobs_pointer is not None:
            weight *= tl.minimum(tl.exp(label_logprob - tl.load(old_logprobs_pointer + row)), importance_clip)
            tl.store(weight_pointer + row, weight)
    if constants_pointer is not None:
        of_rest = of_logit(tail_log_p, tail_log_q, tail_g, mean_g, DIVERGENCE)
        of_rest = tl.where(rest <= masked, 0.0, of_rest)
        tl.store(constants_pointer + row * ROW + ROW_CENTRE, -of_rest.to(tl.float32))
        tl.store(constants_pointer + row * ROW + ROW_FACTOR, weight * slope)
        for start in range(0, entries, BLOCK):
            u, z, log_q, given, places = load_outcomes(u_pointer, logprobs_pointer, start, entries, factor, BLOCK)
            log_p, log_q = normalised(z, log_q, given, student_peak, student_log_sum, teacher_total)
            _, g = loss_and_score(log_p, log_q, beta, DIVERGENCE)
            gradient = of_logit(log_p, log_q, g, mean_g, DIVERGENCE).to(tl.float32) * (weight * slope)
            if CAPPED:
                capped = tl.maximum(u, -1.0)
                gradient *= 1 - capped * capped
            else:
                gradient = tl.where(u > FAR_BELOW, gradient, 0.0)
            tl.store(u_pointer + places, tl.where(weight == 0, 0.0, gradient), mask=places < entries)


@triton.jit
def put_back_kernel(gradient_pointer, stride, vocab, ids_pointer, entries, values_pointer, BLOCK: tl.constexpr):
    """One program a row: the gradient at its entries."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, entries, BLOCK):
        places = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_pointer + row * entries + places, mask=places < entries, other=vocab)
        values = tl.load(values_pointer + row * entries + places, mask=places < entries)
        out = gradient_pointer + row * stride + ids
        tl.store(out, values.to(gradient_pointer.dtype.element_ty), mask=ids < vocab)
