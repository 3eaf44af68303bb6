"""What records of running sums come to: a model's softmax, and with it cross-entropy and the hard term."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft_kernels.backends.cpu.library import Constant
from sdft_kernels.backends.records import FIELDS, Field
from sdft_kernels.divergences import LogitOptions, Objective, cross_entropy, gradient_of_p
from sdft_kernels.tokens import TokenRows

#: The places in a record that hold each model's softmax.
STUDENT, TEACHER = slice(Field.PEAK, Field.DOT + 1), slice(Field.TEACHER_PEAK, Field.TEACHER_DOT + 1)


def new_records(like: Tensor, width: int) -> Tensor:
    """Records as they are before any logits, (threads, FIELDS, width) in float64."""
    records = like.new_zeros((torch.get_num_threads(), FIELDS, width), dtype=torch.float64)
    records[:, [Field.PEAK, Field.TEACHER_PEAK]] = -torch.inf
    return records


class MergedSoftmax:
    """One model's softmax from the peak, sum and dot of each thread's records, (threads, 3, width)."""

    def __init__(self, records: Tensor, options: LogitOptions) -> None:
        peaks, self._sums, dots = records.unbind(1)
        self._factor = options.factor
        self.peak = peaks.amax(0)
        #: A thread's largest logit minus the chunk's largest. It is 0, as the sums are, for a thread that had no rows.
        self.shift = torch.where(peaks == -torch.inf, 0, self._factor * (peaks - self.peak))
        self.total = (self.shift.exp() * self._sums).sum(0)
        self.log_sum = self.total.log()
        self.logsumexp = self._factor * self.peak + self.log_sum
        self.entropy = self.log_sum - self.mean_of(dots, self.shift)

    def mean_of(self, moments: Tensor, offset: Tensor) -> Tensor:
        """The mean of a score g under this softmax, from each thread's Σ e g and the offset to add to its g."""
        return (self.shift.exp() * (moments + offset * self._sums)).sum(0) / self.total

    def logprob(self, labelled: Tensor) -> Tensor:
        """The log-probabilities of labels, (width,), from their u."""
        return self._factor * (labelled.double() - self.peak) - self.log_sum


def constants_of(p: MergedSoftmax, centre: Tensor) -> Tensor:
    """What a gradient p (z · slope - centre) needs, of tokens of weight 1 and slope 0, (constants, width)."""
    constants = centre.new_zeros(len(Constant), len(centre))
    constants[Constant.A], constants[Constant.P_FACTOR], constants[Constant.CENTRE] = p.peak, 1 / p.total, centre
    return constants


def combine_labels(
    p: MergedSoftmax, total: Tensor, logprob: Tensor, objective: Objective, vocab: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, (width,), and what its gradient needs, of tokens of weight 1, (constants, width).

    From the softmax, the sum of all u, and the labels' log-probabilities.
    """
    hard = objective.hard
    assert hard is not None
    loss = cross_entropy(hard, logprob, objective.student.factor * total / vocab - p.logsumexp, p.logsumexp, p.entropy)
    constants = constants_of(p, -gradient_of_p(hard, p.logsumexp, p.entropy, -p.log_sum))
    constants[Constant.SLOPE], constants[Constant.UNIFORM] = hard.entropy_weight, hard.label_smoothing / vocab
    return loss, constants


def add_hard_term(
    rows: TokenRows, p: MergedSoftmax, sums: Tensor, u: Tensor, objective: Objective, constants: Tensor
) -> Tensor | None:
    """Fills the rows' hard loss and adds the hard term to a divergence's constants, from each thread's sum of its
    exponentials, (threads, width), if they are apart, and the labels' u. Returns what the labels' gradients lack."""
    if rows.hard_weight is None or rows.hard_loss is None:
        return None
    ratio, factor = objective.hard_ratio, objective.hard_logits.factor
    total = ((ratio * p.shift).exp() * sums).sum(0) if objective.hard_apart else p.total
    rows.hard_loss.copy_((total.log() - factor * (u.double() - p.peak))[: len(rows.hard_loss)])
    weight = ratio * torch.nn.functional.pad(rows.hard_weight.double(), (0, len(u) - len(rows.hard_weight)))
    if objective.hard_apart:
        constants[Constant.HARD_FACTOR] = weight / total
    elif objective.divergence == "forward_kl":
        constants[Constant.P_FACTOR] *= 1 + weight
    else:
        constants[Constant.CENTRE] -= weight
    return weight
