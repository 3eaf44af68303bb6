"""Device functions that the Triton kernels share: elementary functions that keep their digits near 0, how logits are
read, and the formulas of divergences.py that kernels apply to single logits."""

from __future__ import annotations

import triton
import triton.language as tl

from sdft_kernels.divergences import LARGEST_LOG_RATIO, LARGEST_ODDS, MASKED, LogitOptions

_LARGEST_LOG_RATIO = tl.constexpr(LARGEST_LOG_RATIO)
_LARGEST_ODDS = tl.constexpr(LARGEST_ODDS)
#: Stands for u beyond the vocabulary.
FAR_BELOW = tl.constexpr(MASKED)
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
def expm1(x):
    """By its series near 0, where the difference would lose digits."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """By the series of artanh near 0, where 1 + x would lose digits."""
    s = x / (2 + x)
    y = s * s
    series = 2 * s * (1 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7 + y * (1 / 9)))))
    return tl.where(tl.abs(x) < 0.4, series, tl.log(1 + x))


@triton.jit
def transform(y, inner, FORM: tl.constexpr):
    """u of products y, of which the logits are factor · u: see `LogitOptions`.

    Kernels take differences of u before they multiply: two numbers side by side lose nothing then, and what is the
    largest is exactly 0. A difference of products would be rounded as the largest of them is, or half of it where the
    compiler makes one instruction of a product and a sum: differently in each kernel.
    """
    if FORM == "capped":
        return tanh(y * inner)
    elif FORM == "negated":
        return -y
    else:
        return y


def form(options: LogitOptions) -> str:
    """Which of `transform`'s these are."""
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
    """The columns of one of a row's splits, [first, past): whole blocks, dealt out evenly, none without one."""
    blocks = tl.cdiv(vocab, BLOCK)
    return split * blocks // splits * BLOCK, tl.minimum((split + 1) * blocks // splits * BLOCK, vocab)


@triton.jit
def log_ratio_at(log_p, log_q):
    """r = log p - log q, bounded so that its exponentials are finite."""
    return tl.minimum(tl.maximum(log_p - log_q, -_LARGEST_LOG_RATIO), _LARGEST_LOG_RATIO)


@triton.jit
def log_over_mixture(other_over_one, share_of_other):
    """log(one / m) from log(other / one), where the mixture m holds `share_of_other` of the other."""
    return -log1p(share_of_other * expm1(other_over_one))


@triton.jit
def mixture_score(log_ratio, beta, DIVERGENCE: tl.constexpr):
    """g up to a constant, where dL/dz = p (g - Σ p g): see divergences.py."""
    if DIVERGENCE == "jsd":
        return (1 - beta) * log_over_mixture(-log_ratio, beta)
    elif DIVERGENCE == "skew_reverse_kl":
        x = tl.minimum(beta / (1 - beta) * tl.exp(-log_ratio), _LARGEST_ODDS)
        return 1 / (1 + 1 / x) - log1p(x)
    else:
        return (beta - 1) * tl.exp(log_over_mixture(log_ratio, 1 - beta))
