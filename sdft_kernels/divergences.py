"""The mathematics: each divergence between student p and teacher q, and its gradient in the student's logits.

With z the student's logits, p = softmax(z), q = softmax(teacher logits), m = (1 - β) p + β q:

    divergence          L                                dL/dz
    reverse_kl          Σ p (log p - log q)              p (log p - log q - L)
    forward_kl          Σ q (log q - log p)              p - q
    jsd                 (1-β) KL(p‖m) + β KL(q‖m)        (1-β) p (log(p/m) - KL(p‖m))
    skew_reverse_kl     KL(p‖m)                          p (g - Σ p g),  g = log(p/m) - (1-β) p/m
    skew_forward_kl     KL(q‖m)                          p (g - Σ p g),  g = -(1-β) q/m

For a mixture, the value of g at one place, the student's likeliest token, is subtracted from g. Let w = β q / m at that
place, let d be log q - log p less its value at that place, and let y = w expm1(d) and u = 1 + y = (1 - w) + w exp(d):

    jsd                 g = -(1-β) log u
    skew_reverse_kl     g = (1-w) y / u - log u
    skew_forward_kl     g = -(1-w) (1-β) / β · y / u

A constant that all vocabulary entries share is so left out before anything is rounded. Then g keeps its digits where p
is far above q and all g are nearly the same, and also where p and q are nearly the same.

Cross-entropy is the objective without a teacher, and the hard term that a divergence may have beside it. With t = 1 at
the label and 0 elsewhere, label smoothing s, V entries, E the log-sum-exp of z, H the entropy of p, and the weights λ
of the z-loss and η of the entropy:

    L = -Σ ((1-s) t + s/V) log p + λ E² - η H
    dL/dz = p (1 + 2λ E + η (log p + H)) - (1-s) t - s/V

Sources: reverse KL is what the SDFT paper writes and forward KL what its authors' published runs used
(arXiv 2601.19897); the generalised JSD is GKD's (arXiv 2306.13649); the skewed divergences are DistiLLM's
(arXiv 2402.03898). Label smoothing is arXiv 1512.00567's; the z-loss is PaLM's (arXiv 2204.02311), as in liger-kernel.

The functions here work in place on a tile, which is a slab of the vocabulary for a chunk of tokens. They take
exponentials that are relative to each token's maximum in the tile and not yet divided by their sum: a constant that all
of a token's entries in a tile share stays outside the passes over them, in float64. So does the unit: logits come in
bits, since torch's exp2 takes half the time of its exp on a CPU. For every divergence, the functions leave two arrays A
and B where p and q were. The gradient is w · (x A + y B), where w, x and y are numbers for each token and tile that are
known once all tiles have been seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Nats in a bit: z in bits is z / NATS, and 2 to the power of that is exp(z).
NATS = math.log(2)

#: A bias below this, such as the -inf that excludes a vocabulary entry, is replaced by it: the entry's probability is 0
#: at every temperature all the same, and the difference of two such logits is a number. It is a power of two, some
#: 1e30, so that factors multiply it exactly, and the difference of two products is 0.
MASKED = -(2.0**100)

#: Log-ratios of p and q are bounded by this, near the end of float32's exponents: one of the two is then under
#: 1e-34 of the other, and adds nothing.
LARGEST_LOG_RATIO = 80.0

#: The odds β q / ((1-β) p) are bounded by this.
LARGEST_ODDS = 1e38

#: The log-ratio at the place that a mixture's scores are relative to is bounded by this. Where log p - log q is larger
#: at the student's likeliest token, scores are relative to an imagined place.
LARGEST_PEAK_RATIO = 100.0


@dataclass(frozen=True)
class LogitOptions:
    """How a model's logits z come from products: y = scale · (h Wᵀ + b), c = softcap · tanh(y / softcap) (or y),
    z = c / temperature. In other words z = factor · u, where u = inner · (h Wᵀ + b), or tanh of that under a soft cap.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """Positive, so that the largest u is the largest z."""
        return (self.softcap or abs(self.scale)) / self.temperature

    @property
    def inner(self) -> float:
        """Only a sign, except under a soft cap."""
        return self.scale / self.softcap if self.softcap else math.copysign(1.0, self.scale)


@dataclass(frozen=True)
class HardTerm:
    """Cross-entropy on labels: the temperature of its logits, and what it adds."""

    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_weight: float = 0.0


@dataclass(frozen=True)
class Coarse:
    """A divergence from a teacher who gives some entries' probabilities; see coarse.py, and its `TAILS`."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    tail: str = "bucket"


#: The objective that has no teacher: its hard term alone.
CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class Objective:
    """What is computed for each token: a divergence or `CROSS_ENTROPY`, and its options.

    A divergence has a hard term beside it where `hard` is given; cross-entropy always is one. With `coarse` the passes
    over logits are those of a cross-entropy, and the loss is the coarse divergence.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    student: LogitOptions = LogitOptions()
    teacher: LogitOptions = LogitOptions()
    importance_clip: float | None = None
    hard: HardTerm | None = None
    coarse: Coarse | None = None

    @property
    def has_teacher(self) -> bool:
        return self.divergence != CROSS_ENTROPY

    @property
    def hard_logits(self) -> LogitOptions:
        """The student's logits as the hard term has them."""
        return self.student if self.hard is None else replace(self.student, temperature=self.hard.temperature)

    @property
    def hard_ratio(self) -> float:
        """The hard term's logits over the student's."""
        return self.student.temperature / self.hard_logits.temperature

    @property
    def hard_apart(self) -> bool:
        """Whether the hard term needs a softmax of its own: that of another temperature."""
        return self.hard_ratio != 1


@dataclass
class Tile:
    """A slab of v vocabulary entries for C tokens: (v, C) each.

    `student` and `teacher` are logits in bits minus each token's maximum in the tile; functions use their memory as
    scratch. `p` and `q` are two to the power of these, and A and B are left there. `p_sum`, (C,), is Σ p.
    """

    student: Tensor
    teacher: Tensor
    p: Tensor
    q: Tensor
    p_sum: Tensor


@dataclass
class Sums:
    """Sums over a tile for each of a chunk's tokens: (C,) for one tile, (tiles, C) in float64 for all of them.

    With `p` and `q` as in the tile: `loss` is the divergence's own sum over the tile, under q or p as the formula
    says; `mean` + `remainder` is the mean of the score g under p. Sums are in bits, those of a mixture in nats.
    """

    loss: Tensor | None = None
    mean: Tensor | None = None
    remainder: Tensor | None = None


@dataclass
class Shares:
    """Factors for each tile and token, (tiles, C) in float64, that turn a tile's `p` and `q` into probabilities.

    `p_mass` and `q_mass` are the probabilities of the whole tile. log p - log q = student - teacher + `log_ratio`, in
    nats. `peak_ratio`, (C,), is log p - log q where the student's logit is largest, bounded; only mixtures have it.
    """

    p: Tensor
    q: Tensor
    p_mass: Tensor
    q_mass: Tensor
    log_ratio: Tensor
    peak_ratio: Tensor | None = None


def column_dot(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """Σ a b over the vocabulary, (v, C) · (v, C) → (C,)."""
    return torch.mul(a, b, out=scratch).sum(0)


def centre_under_p(tile: Tile, g: Tensor, loss: Tensor | None = None) -> Sums:
    """Leaves A = p and B = p (g - mean) in the tile; `g` is one of its arrays, but not `p` or `q`.

    Where p is nearly one-hot, g at its peak and its mean are nearly the same number, and one float32 sum leaves a
    difference without digits. The second sum, over what the first has left, gives them back.
    """
    mean = column_dot(tile.p, g, tile.q) / tile.p_sum
    centred = torch.mul(tile.p, g.sub_(mean), out=tile.q)
    return Sums(loss, mean, centred.sum(0) / tile.p_sum)


def reverse_kl(tile: Tile) -> Sums:
    """g = log p - log q, up to a constant of the tile."""
    return centre_under_p(tile, torch.sub(tile.student, tile.teacher, out=tile.teacher))


def forward_kl(tile: Tile) -> Sums:
    """Leaves A = p and B = q; the loss is Σ q (log q - log p), up to a constant of the tile."""
    return Sums(column_dot(tile.q, tile.teacher.sub_(tile.student), tile.student))


def jsd(tile: Tile, log_ratio: Tensor, peak_ratio: Tensor, beta: float) -> Sums:
    """g = (1-β) log(p/m); the loss is Σ q log(q/m)."""
    g = Change(tile, log_ratio, peak_ratio, beta).log_u().mul_(beta - 1)
    return centre_under_p(tile, g, column_dot(tile.q, log_over_mixture(log_ratio, 1 - beta), tile.q))


def skew_reverse_kl(tile: Tile, log_ratio: Tensor, peak_ratio: Tensor, beta: float) -> Sums:
    """g = log(p/m) - (1-β) p/m; the loss is Σ p log(p/m).

    Where p is far above q, both terms are nearly y, and g nearly y²/2: in float64, which has digits for that.
    """
    change = Change(tile, log_ratio, peak_ratio, beta)
    change.y = change.y.double()
    g = change.of_share() - change.log_u()
    loss = column_dot(tile.p, log_over_mixture(log_ratio.neg_(), beta), tile.q)
    return centre_under_p(tile, tile.student.copy_(g), loss)


def skew_forward_kl(tile: Tile, log_ratio: Tensor, peak_ratio: Tensor, beta: float) -> Sums:
    """g = -(1-β) q/m; the loss is Σ q log(q/m)."""
    g = Change(tile, log_ratio, peak_ratio, beta).of_share().mul_((beta - 1) / beta)
    return centre_under_p(tile, g, column_dot(tile.q, log_over_mixture(log_ratio, 1 - beta), tile.q))


class Change:
    """How a mixture differs from itself at the student's likeliest token: of w and w̄ = 1 - w there, the smaller v.

    `y` is w expm1(d) where that is w, which lies in place of the tile's student; else w̄ expm1(-d), whose logarithm is
    that of u exp(-d). So 1 + y has all its digits.
    """

    def __init__(self, tile: Tile, log_ratio: Tensor, peak_ratio: Tensor, beta: float) -> None:
        share, rest, _ = mixture_shares(peak_ratio, beta)
        self._below = share > rest
        self._smaller = torch.minimum(share, rest).to(log_ratio.dtype)
        self._sign = torch.where(self._below, -1, 1).to(log_ratio.dtype)
        self._change = peak_ratio.to(log_ratio.dtype) - log_ratio
        # expm1(d) as e (e + 2), in whose halves nothing overflows that comes to little in the end.
        e = torch.mul(self._change, self._sign / 2, out=tile.student).expm1_()
        more = e + 2
        self.y = e.mul_(self._smaller).mul_(more).clamp_(max=LARGEST_ODDS)

    def log_u(self) -> Tensor:
        """log u."""
        return torch.log1p(self.y).add_(self._change.mul_(self._below))

    def of_share(self) -> Tensor:
        """(1-w) y / u: by how much the teacher's share differs."""
        return (self.y / (self.y + 1)).mul_(self._sign * (1 - self._smaller))


def log_ratio_of(student: Tensor, teacher: Tensor, constant: Tensor, out: Tensor) -> Tensor:
    """log p - log q in nats from logits in bits, bounded so that its exponentials are finite."""
    log_ratio = torch.add(constant, torch.sub(student, teacher, out=out), alpha=NATS, out=out)
    return bounded(log_ratio)


def bounded(log_ratio: Tensor) -> Tensor:
    """Bounds log-ratios in place, so that their exponentials are finite."""
    return log_ratio.clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def log_over_mixture(other_over_one: Tensor, share_of_other: float) -> Tensor:
    """log(one / m) in place from log(other / one), where the mixture m holds `share_of_other` of the other.

    -log1p(share · expm1(·)) keeps its digits where the models agree and the log-ratio is small.
    """
    return other_over_one.expm1_().mul_(share_of_other).log1p_().neg_()


def mixture_shares(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's share β q / m of a mixture, the student's, and the logarithm of the first; float64."""
    log_odds = math.log(beta / (1 - beta)) - log_ratio
    return log_odds.sigmoid(), (-log_odds).sigmoid(), torch.nn.functional.logsigmoid(log_odds)


#: The first pass over a tile; the divergences from a mixture need every tile's sums before they can start.
PLAIN: dict[str, Callable[[Tile], Sums]] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}

#: The second pass. It takes the tile, its log p - log q (in the memory of the teacher's logits), log p - log q at the
#: student's likeliest token, and β.
MIXTURES: dict[str, Callable[[Tile, Tensor, Tensor, float], Sums]] = {
    "jsd": jsd,
    "skew_reverse_kl": skew_reverse_kl,
    "skew_forward_kl": skew_forward_kl,
}

DIVERGENCES = (*PLAIN, *MIXTURES)


def finish(divergence: str, beta: float, sums: Sums, shares: Shares) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence, (C,), and the gradient's x and y, (tiles, C), from all tiles' sums."""
    unit = 1.0 if is_mixture(divergence) else NATS
    if divergence == "forward_kl":
        assert sums.loss is not None
        return (shares.q * unit * sums.loss - shares.q_mass * shares.log_ratio).sum(0), shares.p, -shares.q
    assert sums.mean is not None and sums.remainder is not None
    mean = unit * sums.mean
    if divergence == "reverse_kl":
        mean += shares.log_ratio
    centre = (shares.p_mass * (mean + unit * sums.remainder)).sum(0)
    loss = centre
    if sums.loss is not None:
        under_p = divergence == "skew_reverse_kl"
        own = ((shares.p if under_p else shares.q) * sums.loss).sum(0)
        loss = own
        if divergence == "jsd":
            assert shares.peak_ratio is not None
            loss = centre + (1 - beta) * log_over_mixture(-shares.peak_ratio, beta) + beta * own
    return loss, shares.p * (mean - centre), shares.p * unit


def cross_entropy(hard: HardTerm, logprob: Tensor, mean_logprob: Tensor, logsumexp: Tensor, entropy: Tensor) -> Tensor:
    """The loss of the hard term, from the label's log-probability, and the mean of all entries'."""
    smoothing = hard.label_smoothing
    likelihood = (1 - smoothing) * logprob
    if smoothing:  # the mean may be infinite
        likelihood = likelihood + smoothing * mean_logprob
    return hard.z_loss * logsumexp.square() - likelihood - hard.entropy_weight * entropy


def gradient_of_p(hard: HardTerm, logsumexp: Tensor, entropy: Tensor, log_p: Tensor) -> Tensor:
    """What p is multiplied with in the gradient of the hard term, where its logarithm is `log_p`; elsewhere
    `entropy_weight` times the difference of the logarithms is to be added."""
    return 1 + 2 * hard.z_loss * logsumexp + hard.entropy_weight * (entropy + log_p)


def is_mixture(divergence: str) -> bool:
    """Whether β matters: only to the divergences from a mixture of student and teacher."""
    return divergence in MIXTURES
