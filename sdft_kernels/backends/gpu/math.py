"""Device functions that the Triton kernels share: elementary functions that keep their digits near 0, how logits are
read, and the formulas of divergences.py that kernels apply to single logits."""

from __future__ import annotations

import triton
import triton.language as tl

from sdft_kernels.divergences import LARGEST_LOG_RATIO, LARGEST_PEAK_RATIO, MASKED, LogitOptions

_LARGEST_LOG_RATIO = tl.constexpr(LARGEST_LOG_RATIO)
_LARGEST_PEAK_RATIO = tl.constexpr(LARGEST_PEAK_RATIO)
#: Stands for u beyond the vocabulary, and is that of a masked entry, which has no soft cap.
FAR_BELOW = tl.constexpr(MASKED)
#: The hyperbolic tangent is 1 from here on, to float32's last digit.
_END_OF_TANH = tl.constexpr(20.0)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """As `tl.exp`, but 0 below 1e-38: what would be left there costs NVIDIA three instructions more."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def tanh(x):
    """By its series near 0, where the quotient would lose digits."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    size = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -size, size))


@triton.jit
def log_near_1(y, total):
    """log(1 + y) by the series of artanh near 0, where `total`, 1 + y, would lose digits."""
    s = y / (2 + y)
    t = s * s
    series = 2 * s * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9)))))
    return tl.where(tl.abs(y) < 0.4, series, tl.log(total))


@triton.jit
def share_of_expm1(x, share, power):
    """share (exp(x) - 1), by its series near 0, where the difference would lose digits; `power` is share exp(x)."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.3, share * series, power - share)


@triton.jit
def transform(y, inner, FORM: tl.constexpr):
    """u of products y, of which the logits are factor · u: see `LogitOptions`.

    Kernels take differences of u before they multiply: two numbers side by side lose nothing then, and what is the
    largest is exactly 0. A difference of products would be rounded as the largest of them is, or half of it where the
    compiler makes one instruction of a product and a sum: differently in each kernel.

    A soft cap lets nothing lie below its end, so an entry that was taken out is -inf before it.
    """
    if FORM == "capped":
        x = y * inner
        return tl.where(x == float("-inf"), FAR_BELOW, tanh(tl.maximum(x, -_END_OF_TANH)))
    elif FORM == "negated":
        return -y
    else:
        return y


def form(options: LogitOptions) -> str:
    """The form of `transform` that these options need."""
    if options.softcap is not None:
        return "capped"
    return "negated" if options.inner < 0 else "plain"


@triton.jit
def add_bias(y, bias_pointer, columns, past):
    """Products with the head's bias at `columns` added, if it has one and they lie before `past`."""
    if bias_pointer is not None:
        y += tl.load(bias_pointer + columns, mask=columns < past, other=0.0)
    return y


@triton.jit
def load_logits(pointer, bias_pointer, stride, columns, vocab, inner, FORM: tl.constexpr):
    """u at `columns` of a row; far below all others past the vocabulary.

    The bias is read as far as the row goes, padding and all, so that its loads are as wide.
    """
    y = tl.load(pointer + columns, mask=columns < stride, other=0.0)
    y = add_bias(y, bias_pointer, columns, stride)
    return tl.where(columns < vocab, transform(y, inner, FORM), FAR_BELOW)


@triton.jit
def load_logit(pointer, bias_pointer, label, vocab, inner, FORM: tl.constexpr):
    """u at one label of a row."""
    y = add_bias(tl.load(pointer + label), bias_pointer, label, vocab)
    return transform(y, inner, FORM)


@triton.jit
def split_columns(split, splits, vocab, BLOCK: tl.constexpr):
    """The columns of one split of a row, [first, past). Each split has at least one whole block, and all nearly the
    same number."""
    blocks = tl.cdiv(vocab, BLOCK)
    return split * blocks // splits * BLOCK, tl.minimum((split + 1) * blocks // splits * BLOCK, vocab)


@triton.jit
def bounded(log_ratio):
    """Bounds a log-ratio so that its exponentials are finite."""
    return tl.minimum(tl.maximum(log_ratio, -_LARGEST_LOG_RATIO), _LARGEST_LOG_RATIO)


@triton.jit
def log_over_mixture(other_over_one, share, rest):
    """log(one / m) from log(other / one), where the mixture m holds `share` of the other and `rest` of the one."""
    power = share * tl.exp(other_over_one)
    return -log_near_1(share_of_expm1(other_over_one, share, power), rest + power)


@triton.jit
def mixture_peak(at_peak, b, teacher_factor):
    """The teacher's u at the student's largest, or as far below the teacher's largest as a mixture's scores need."""
    return tl.maximum(at_peak, b - _LARGEST_PEAK_RATIO / teacher_factor)


@triton.jit
def mixture_shares(log_ratio, beta, rest_of_beta):
    """The teacher's share of the mixture where log p - log q is this, the student's, and the logarithm of the first."""
    odds = beta / rest_of_beta * tl.exp(-log_ratio)
    rest = 1 / (1 + odds)
    return odds * rest, rest, (tl.log(beta / rest_of_beta) - log_ratio) + tl.log(rest)


@triton.jit
def mixture_score(change, share, rest, log_share, beta, rest_of_beta, DIVERGENCE: tl.constexpr):
    """g less its value at the peak, where dL/dz = p (g - Σ p g), from log q - log p less that at the peak: see
    divergences.py."""
    power = tl.exp(tl.minimum(log_share + change, _LARGEST_LOG_RATIO))
    y = share_of_expm1(change, share, power)
    total = rest + power
    if DIVERGENCE == "jsd":
        return -rest_of_beta * log_near_1(y, total)
    elif DIVERGENCE == "skew_forward_kl":
        return -(rest * rest_of_beta / beta) * (y / total)
    else:
        s = y / (2 + y)
        t = s * s
        tail = 2 * s * t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9))))
        part = y / total
        series = -2 * t / (1 + s) - tail - share * part
        return tl.where(tl.abs(y) < 0.4, series, rest * part - tl.log(total))
