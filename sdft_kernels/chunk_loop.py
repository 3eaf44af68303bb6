"""The loop over chunks of tokens: hidden states and heads in, per-token values and gradients out.

Per chunk: two products make logits, a backend turns them into per-token values and the gradient of the student's
logits, and up to two products carry that gradient to the hidden states and the head. Nothing of size N×V exists, and
where a backend folds logits into sums as it makes them, nothing of size C×V.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_kernels._compat import assert_on_device
from sdft_kernels.backends.cpu import pages
from sdft_kernels.backends.interface import ROW_ALIGNMENT, ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.select import select
from sdft_kernels.chunking import plan_chunks
from sdft_kernels.divergences import MASKED, LogitOptions, Objective, is_mixture
from sdft_kernels.options import CrossEntropyOptions, LossOptions, TopkOptions
from sdft_kernels.tokens import LiveTokens, TokenRows, reads_are_free


@dataclass(frozen=True)
class Side:
    """One model at the loss: hidden states (N, H), head (V, H) and bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Wanted:
    """Which gradients of the student are to be computed."""

    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def any(self) -> bool:
        return self.wants_hidden or self.wants_weight or self.wants_bias


@dataclass
class Gradients:
    """The gradients of Σ w·L: (N, H) in the hidden states' dtype, (V, H) and (V,) in the accumulation dtype.

    A gradient that is not wanted is empty. Where there is a single chunk, and so nothing to add up, the head's gradient
    may have the dtype that it is returned in.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def run_chunks(
    student: Side,
    teacher: Side | None,
    live: LiveTokens,
    rows: TokenRows,
    options: LossOptions | CrossEntropyOptions | TopkOptions,
    vocab: int,
    dtypes: Dtypes,
    wanted: Wanted,
) -> Gradients:
    """Fills `rows`, one for each live token, from the heads' first `vocab` entries; returns the wanted gradients."""
    objective, device = options.objective, student.hidden.device
    work = select(options.backend, device, dtypes.operands)
    student_head = head_operands(student.weight, student.bias, vocab, dtypes, objective.student)
    teacher_head = None
    if teacher is not None and not student.weight.is_meta and student.weight.is_set_to(teacher.weight):
        # The same memory: one copy in the products' dtype serves both, and a backend may make one product of two.
        bias = _finite_bias(teacher.bias, vocab, dtypes.wide, objective.teacher)
        teacher_head = HeadOperands(student_head.weight, bias)
    elif teacher is not None:
        teacher_head = head_operands(teacher.weight, teacher.bias, vocab, dtypes, objective.teacher)
    widened = wanted.wants_weight and dtypes.head_gradient != dtypes.wide
    plan = plan_chunks(
        live.count,
        vocab,
        work.held(dtypes, objective, with_gradient=wanted.any),
        device,
        options.max_chunk_bytes,
        trainable_head=wanted.wants_weight,
        added_up=dtypes.wide.itemsize * student.weight.shape[1] if widened else 0,
    )
    gradients = _allocate(student, wanted, dtypes, plan.chunks, live, vocab)
    workspace = work.loss_workspace(student.hidden, plan.chunk, vocab, dtypes, objective, with_gradient=wanted.any)
    weight_gradient = gradients.weight[:vocab] if wanted.wants_weight else None
    bias_gradient = gradients.bias[:vocab] if wanted.wants_bias else None

    def teacher_hidden(chunk: slice) -> Tensor | None:
        if teacher is None:
            return None
        return live.take(teacher.hidden, chunk, cleaned=not work.TEACHER_MAY_BE_ANYTHING).to(dtypes.operands)

    for chunk in plan.slices(live.count):
        with live.rows_of(gradients.hidden, chunk) if wanted.wants_hidden else nullcontext() as hidden:
            work.process_chunk(
                live.take(student.hidden, chunk).to(dtypes.operands),
                teacher_hidden(chunk),
                student_head,
                teacher_head,
                rows[chunk],
                objective,
                ChunkGradients(hidden, weight_gradient, bias_gradient, first=chunk.start == 0),
                workspace,
            )
    return gradients


def head_operands(
    weight: Tensor, bias: Tensor | None, vocab: int, dtypes: Dtypes, options: LogitOptions
) -> HeadOperands:
    """The first `vocab` entries of a head, as products and kernels take them."""
    return HeadOperands(weight[:vocab].to(dtypes.operands), _finite_bias(bias, vocab, dtypes.wide, options))


def _finite_bias(bias: Tensor | None, vocab: int, wide: torch.dtype, options: LogitOptions) -> Tensor | None:
    """The bias's first `vocab` entries as kernels read them: contiguous and finite.

    An entry of -inf masks its token under a negative scale too.
    """
    if bias is None:
        return None
    bias = bias[:vocab].to(wide).clamp(min=MASKED)
    if options.scale < 0:
        bias = bias.where(bias > MASKED, -MASKED)
    return torch.nn.functional.pad(bias, (0, -vocab % ROW_ALIGNMENT))[:vocab]


def _allocate(student: Side, wanted: Wanted, dtypes: Dtypes, chunks: int, live: LiveTokens, vocab: int) -> Gradients:
    """Allocates the gradients, and zeros only what no chunk will overwrite.

    That is the rows of tokens that are left out, the head's padding, and everything where there are no tokens.
    """
    hidden, weight = student.hidden, student.weight
    shape = weight.shape if wanted.wants_weight else (0,)
    dtype = dtypes.head_gradient if chunks == 1 else dtypes.wide
    gradients = Gradients(
        hidden=hidden.new_empty(hidden.shape if wanted.wants_hidden else (0,)),
        weight=(pages.huge(shape, dtype) if hidden.device.type == "cpu" else hidden.new_empty(shape, dtype=dtype)),
        bias=hidden.new_zeros(weight.shape[0] if wanted.wants_bias else 0, dtype=dtypes.wide),
    )
    if live.some_left_out:
        gradients.hidden.zero_()
    gradients.weight[vocab if live.count else 0 :].zero_()
    return gradients


#: The largest weight of a token in float16. That type has all its digits down to 6e-5, and an even distribution over a
#: vocabulary of 256k gives each entry a gradient of 4e-6, which this lifts to 2.5e-4; while a log-ratio of hundreds of
#: nats times this stays under the type's largest number, 65,504.
FLOAT16_WEIGHT = 64.0
#: The same where gradients stay near 1 and all may be small: of the divergences from a mixture, and from the entries
#: that a teacher gives. With 64 the head's gradient had errors up to 1.6e-3 of it (a skewed divergence, a vocabulary of
#: 262,144), and the hidden states' up to 5e-3 (100 entries of 151,936).
FLOAT16_BOUNDED_WEIGHT = 1024.0


def token_weights(
    live: LiveTokens,
    token_weight: Tensor | None,
    like: Tensor,
    reduction: str,
    dtypes: Dtypes,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """The factor of each live token's gradient, and a factor that every gradient still lacks.

    A mean divides by the sum of the weights. In float16 that, or small weights, would push the logits' gradients out of
    range; so there the largest weight is made `FLOAT16_WEIGHT`, or the bounded one's, and what that and the mean
    divide by is left for the backward pass, where it meets the upstream gradient. Otherwise the second factor is 1.
    """
    wide = dtypes.wide
    one = like.new_ones((), dtype=wide)
    if token_weight is None:
        weight, total = like.new_ones(live.count, dtype=wide), one * max(1, live.count)
    else:
        weight = live.take(token_weight).double()  # whose sum float32 may not hold
        total = weight.sum()
        total = torch.where(total == 0, 1, total)
    if reduction != "mean":
        total = one
    if dtypes.operands != torch.float16:
        return weight.div(total).to(wide), one
    largest = weight.abs().amax() if live.count else one
    largest = torch.where(largest == 0, 1, largest)
    bounded = objective.coarse is not None or is_mixture(objective.divergence)
    unit = largest / (FLOAT16_BOUNDED_WEIGHT if bounded else FLOAT16_WEIGHT)
    return weight.div(unit).to(wide), (unit / total).to(wide)


def check_labels(labels: Tensor, vocab: int, name: str = "labels") -> None:
    """Checks that labels of live tokens lie in the compared vocabulary: at once on the CPU, else by the device."""
    inside = ((labels >= 0) & (labels < vocab)).all()
    if not reads_are_free(labels):
        assert_on_device(inside, f"{name} must lie in [0, {vocab})")
    elif not inside:
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(f"{name} run from {low} to {high}, but must lie in [0, {vocab})")
