"""The mathematics: each divergence between student p and teacher q, and its gradient in the student's logits.

With z the student's logits, p = softmax(z), q = softmax(teacher logits), m = (1 - β) p + β q:

    divergence          L                                dL/dz
    reverse_kl          Σ p (log p - log q)              p (log p - log q - L)
    forward_kl          Σ q (log q - log p)              p - q
    jsd                 (1-β) KL(p‖m) + β KL(q‖m)        (1-β) p (log(p/m) - KL(p‖m))
    skew_reverse_kl     KL(p‖m)                          p (g - Σ p g),  g = log(p/m) - (1-β) p/m
    skew_forward_kl     KL(q‖m)                          p (g - Σ p g),  g = -(1-β) q/m

Sources: reverse KL is what the SDFT paper writes and forward KL what its authors' published runs used
(arXiv 2601.19897); the generalised JSD is GKD's (arXiv 2306.13649); the skewed divergences are DistiLLM's
(arXiv 2402.03898).

The functions here work on a tile of rows, in place: no logit-sized tensor is allocated. They take the
exponentials as they come, relative to each row's maximum and not yet divided by their sum, and keep the
row constants outside the passes over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Log-ratios of p and q are bounded by this, near the end of float32's exponents: one of the two is then under
#: 1e-34 of the other, and adds nothing.
LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class LogitOptions:
    """How a model's logits z come from products: y = scale · (h Wᵀ + b), c = softcap · tanh(y / softcap) (or y),
    z = c / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Objective:
    """What is computed for each token."""

    divergence: str = "reverse_kl"
    beta: float = 0.5
    student: LogitOptions = LogitOptions()
    teacher: LogitOptions = LogitOptions()
    importance_clip: float | None = None


@dataclass
class Tile:
    """A few rows of both models' logits, and what is known of them.

    `student` and `teacher` are (R, V) logits less their row's maximum; `p` and `q` are their exponentials,
    with row sums `p_sum` and `q_sum`, (R, 1). All four are scratch: a divergence may overwrite any of them.
    """

    student: Tensor
    teacher: Tensor
    p: Tensor
    q: Tensor
    p_sum: Tensor
    q_sum: Tensor

    @property
    def log_sum_ratio(self) -> Tensor:
        """(R, 1): student - teacher exceeds log p - log q by this."""
        return self.p_sum.log() - self.q_sum.log()


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b over the vocabulary, (R, V) · (R, V) → (R, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(1)


def centre_under_p(tile: Tile, g: Tensor) -> Tensor:
    """g - Σ p g in place; returns Σ p g, (R, 1).

    Where p is nearly one-hot, g at its peak and Σ p g are nearly the same number, and one float32 sum leaves a
    difference without digits. The second sum, over what the first has left, gives them back.
    """
    mean = row_dot(tile.p, g) / tile.p_sum
    remainder = row_dot(tile.p, g.sub_(mean)) / tile.p_sum
    g.sub_(remainder)
    return mean + remainder


def reverse_kl(tile: Tile, beta: float, row_weight: Tensor | None) -> Tensor:
    """L = Σ p (log p - log q);  dL/dz = p (log p - log q - L)."""
    log_ratio = torch.sub(tile.student, tile.teacher, out=tile.teacher)
    mean = row_dot(tile.p, log_ratio) / tile.p_sum
    # As in centre_under_p, but what is summed for the remainder is the gradient itself, short of that remainder.
    gradient = torch.mul(tile.p, log_ratio.sub_(mean), out=tile.student)
    remainder = gradient.sum(1, keepdim=True) / tile.p_sum
    if row_weight is not None:
        gradient.sub_(tile.p.mul_(remainder)).mul_(row_weight / tile.p_sum)
    return mean + remainder - tile.log_sum_ratio


def forward_kl(tile: Tile, beta: float, row_weight: Tensor | None) -> Tensor:
    """L = Σ q (log q - log p);  dL/dz = p - q."""
    log_ratio = torch.sub(tile.student, tile.teacher, out=tile.teacher)
    loss = tile.log_sum_ratio - row_dot(tile.q, log_ratio) / tile.q_sum
    if row_weight is not None:
        tile.q.mul_(row_weight / tile.q_sum)
        torch.mul(tile.p, row_weight / tile.p_sum, out=tile.student).sub_(tile.q)
    return loss


def jsd(tile: Tile, beta: float, row_weight: Tensor | None) -> Tensor:
    """L = (1-β) KL(p‖m) + β KL(q‖m);  dL/dz = (1-β) p (log(p/m) - KL(p‖m))."""
    log_ratio = _log_ratio(tile)
    log_p_over_m = _log_over_mixture(torch.neg(log_ratio, out=tile.student), beta)
    log_q_over_m = _log_over_mixture(log_ratio, 1 - beta)
    kl_q = row_dot(tile.q, log_q_over_m) / tile.q_sum
    kl_p = centre_under_p(tile, log_p_over_m)
    if row_weight is not None:
        log_p_over_m.mul_(tile.p).mul_(row_weight * (1 - beta) / tile.p_sum)
    return (1 - beta) * kl_p + beta * kl_q


def skew_reverse_kl(tile: Tile, beta: float, row_weight: Tensor | None) -> Tensor:
    """L = KL(p‖m);  dL/dz = p (g - Σ p g),  g = log(p/m) - (1-β) p/m.

    Up to a constant, which the centring drops, g = x / (1 + x) - log1p(x) with x = β q / ((1-β) p): where p is far
    above q, g is flat, and this form does not lose its small differences in two numbers near 1.
    """
    log_ratio = _log_ratio(tile)
    log_p_over_m = _log_over_mixture(torch.neg(log_ratio, out=tile.student), beta)
    loss = row_dot(tile.p, log_p_over_m) / tile.p_sum
    if row_weight is not None:
        x = log_ratio.neg_().exp_().mul_(beta / (1 - beta))
        log1p_x = torch.log1p(x, out=tile.student)
        g = torch.sub(x.reciprocal_().add_(1).reciprocal_(), log1p_x, out=tile.student)
        centre_under_p(tile, g)
        g.mul_(tile.p).mul_(row_weight / tile.p_sum)
    return loss


def skew_forward_kl(tile: Tile, beta: float, row_weight: Tensor | None) -> Tensor:
    """L = KL(q‖m);  dL/dz = p (g - Σ p g),  g = -(1-β) q/m."""
    log_q_over_m = _log_over_mixture(_log_ratio(tile), 1 - beta)
    loss = row_dot(tile.q, log_q_over_m) / tile.q_sum
    if row_weight is not None:
        q_over_m = torch.exp(log_q_over_m, out=tile.student)
        centre_under_p(tile, q_over_m)
        q_over_m.mul_(tile.p).mul_(row_weight * (beta - 1) / tile.p_sum)
    return loss


def _log_ratio(tile: Tile) -> Tensor:
    """r = log p - log q, bounded so that its exponentials are finite, in the teacher's buffer."""
    log_ratio = torch.sub(tile.student, tile.teacher, out=tile.teacher)
    return log_ratio.sub_(tile.log_sum_ratio).clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _log_over_mixture(other_over_one: Tensor, share_of_other: float) -> Tensor:
    """log(one / m) in place from log(other / one), where the mixture m holds `share_of_other` of the other.

    -log1p(share · expm1(·)) keeps its digits where the models agree and the log-ratio is small.
    """
    return other_over_one.expm1_().mul_(share_of_other).log1p_().neg_()


#: Each takes a tile, β and the rows' weights, (R, 1), or None where no gradient is wanted; returns the
#: divergence of each row, (R, 1), and leaves row_weight · dL/dz in `tile.student`.
DIVERGENCES: dict[str, Callable[[Tile, float, Tensor | None], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_reverse_kl": skew_reverse_kl,
    "skew_forward_kl": skew_forward_kl,
}


def is_mixture(divergence: str) -> bool:
    """Whether β matters: only to the divergences from a mixture of student and teacher."""
    return divergence in ("jsd", "skew_reverse_kl", "skew_forward_kl")
