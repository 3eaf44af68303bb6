"""The mathematics of a teacher who gives K entries of each token's distribution, and not the rest's.

With S the K entries, p = softmax(z) the student's probabilities and q the teacher's, the compared distributions have
K + 1 outcomes: each entry of S, and the rest as one, of P = Σ p and Q = Σ q over the other entries. Or they have K
outcomes, and p and q are divided by their sums over S. With P_i, Q_i the outcomes' probabilities, L a divergence of
divergences.py between the two, and g_i = dL/dP_i up to a constant:

    dL/dz_v = P_v (g_v - Σ P_i g_i)                   for v in S
    dL/dz_v = p_v / P · P (g_rest - Σ P_i g_i)        elsewhere, and 0 where the rest is no outcome

So the rest's gradient is that of a softmax over the rest alone times one number of the token. Back-ends take the
entries of S out of the logits before they sum, which makes their softmax the rest's: P has all its digits where S holds
nearly everything, as 1 - Σ p would not. Where the entries were taken out, the gradient's last pass leaves 0, to which
that of S is then added.

Joining outcomes makes no divergence larger: L is at most the divergence of the whole vocabulary, and is that where the
two models' probabilities in the rest are proportional.

Everything here is (C, K) or (C,), in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_kernels.divergences import MASKED, Coarse, is_mixture

#: What is done with the entries that the teacher does not give: one outcome of its own, or none.
TAILS = ("bucket", "dropped")

#: The mass that a teacher's entries leave is known to the rounding of their log-probabilities. It is taken to be at
#: least this, as in TRL.
LEAST_TAIL = 1e-7


@dataclass(frozen=True)
class Compared:
    """Values of C tokens, and the gradient of their loss.

    `of_entries`, (C, K), is dL/dz at the given entries. `of_rest`, (C,), is what the rest's softmax is multiplied with.
    """

    loss: Tensor
    entropy: Tensor
    logsumexp: Tensor
    tail_logprob: Tensor
    of_entries: Tensor
    of_rest: Tensor


def compare(
    coarse: Coarse,
    z: Tensor,
    rest_logsumexp: Tensor,
    rest_entropy: Tensor,
    teacher_logprobs: Tensor,
    teacher_tail: Tensor,
    *,
    masked: float,
    vocab: int,
) -> Compared:
    """Student and teacher, from the student's z at the given entries, (C, K), and its softmax over the rest.

    An entry whose teacher's log-probability is -inf is none. Where the rest's log-sum-exp is at most `masked`, the
    student's head masks all of the rest.
    """
    given = teacher_logprobs > -torch.inf
    z = z.where(given, -torch.inf)
    logsumexp = torch.logaddexp(z.logsumexp(-1), rest_logsumexp)
    log_p = (z - logsumexp.unsqueeze(-1)).where(given, MASKED)
    tail_logprob = rest_logsumexp - logsumexp
    tail_p = tail_logprob.exp()
    entropy = tail_p * (rest_entropy - tail_logprob) - (log_p.exp() * log_p).sum(-1)

    # A rest of no entries is no outcome, and neither is one that the student cannot have and the teacher hardly has.
    none_left = given.sum(-1) == vocab
    nothing = none_left | ((rest_logsumexp <= masked) & (teacher_tail <= math.log(LEAST_TAIL)))
    has_tail = ~nothing if coarse.tail == "bucket" else torch.zeros_like(nothing)
    outcomes = torch.cat((given, has_tail.unsqueeze(-1)), -1)
    log_p = _normalised(torch.cat((log_p, tail_logprob.unsqueeze(-1)), -1), outcomes)
    log_q = _normalised(torch.cat((teacher_logprobs, teacher_tail.unsqueeze(-1).clamp(min=MASKED)), -1), outcomes)
    loss, gradient = divergence_and_gradient(log_p, log_q, coarse.divergence, coarse.beta)
    tail_logprob = tail_logprob.masked_fill(none_left, -torch.inf)
    of_rest = gradient[..., -1].masked_fill(rest_logsumexp <= masked, 0)  # masked entries have no gradient
    return Compared(loss, entropy, logsumexp, tail_logprob, gradient[..., :-1], of_rest)


def _normalised(logprobs: Tensor, outcomes: Tensor) -> Tensor:
    """Log-probabilities of the outcomes alone; of the others they are as if masked."""
    return logprobs.where(outcomes, -torch.inf).log_softmax(-1).where(outcomes, MASKED)


def divergence_and_gradient(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of each row of log-probabilities, (C,), and P (g - Σ P g) of each outcome."""
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    if divergence == "forward_kl":
        return -(q * ratio).sum(-1), p - q
    if not is_mixture(divergence):
        loss = (p * ratio).sum(-1)
        return loss, p * (ratio - loss.unsqueeze(-1))
    log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    of_p, of_q = (p * (log_p - log_m)).sum(-1), (q * (log_q - log_m)).sum(-1)
    if divergence == "jsd":
        loss, g = (1 - beta) * of_p + beta * of_q, (1 - beta) * (log_p - log_m)
    elif divergence == "skew_reverse_kl":
        loss, g = of_p, log_p - log_m - (1 - beta) * (log_p - log_m).exp()
    else:
        loss, g = of_q, -(1 - beta) * (log_q - log_m).exp()
    return loss, p * (g - (p * g).sum(-1, keepdim=True))


def tail_of(teacher_logprobs: Tensor) -> Tensor:
    """log(1 - Σ q), (N,), of the teacher's log-probabilities of K entries, (N, K), and at least `LEAST_TAIL`'s."""
    mass = teacher_logprobs.logsumexp(-1).clamp(max=math.log1p(-LEAST_TAIL))
    # Either form keeps its digits where the other loses them: expm1 near mass 1, log1p near 0.
    return torch.where(mass > -math.log(2), (-torch.expm1(mass)).log(), torch.log1p(-mass.exp()))
