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
from sdft_kernels.backends import products
from sdft_kernels.backends.cpu import pages
from sdft_kernels.backends.interface import ROW_ALIGNMENT, ChunkGradients, Head
from sdft_kernels.backends.select import select
from sdft_kernels.chunking import plan_chunks
from sdft_kernels.divergences import MASKED, LogitOptions, Objective
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

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


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
    teacher: Side,
    live: LiveTokens,
    rows: TokenRows,
    objective: Objective,
    wanted: Wanted,
    *,
    vocab: int,
    compute_dtype: torch.dtype,
    max_chunk_bytes: int | None,
    backend: str,
) -> Gradients:
    """Fills `rows`, one for each live token, and returns the wanted gradients.

    Products take their operands in `compute_dtype`; the first `vocab` entries of both heads are compared.
    """
    wide, device = products.accumulation_dtype(compute_dtype), student.hidden.device
    work = select(backend, device, wide)
    student_head = make_head(student.weight, student.bias, vocab, compute_dtype, objective.student)
    if not student.weight.is_meta and student.weight.is_set_to(teacher.weight):
        # The same memory: one copy in the products' dtype serves both, and a backend may make one product of two.
        teacher_head = Head(student_head.weight, _head_bias(teacher.bias, vocab, wide, objective.teacher))
    else:
        teacher_head = make_head(teacher.weight, teacher.bias, vocab, compute_dtype, objective.teacher)
    returned = products.head_gradient_dtype(student.weight.dtype, compute_dtype, device)
    plan = plan_chunks(
        live.count,
        vocab,
        work.held(compute_dtype, device, objective, with_gradient=wanted.any),
        device,
        max_chunk_bytes,
        trainable_head=wanted.weight,
        added_up=wide.itemsize * student.weight.shape[1] if wanted.weight and returned != wide else 0,
    )
    gradients = _allocate(student, wanted, wide, returned if plan.chunks == 1 else wide, live, vocab)
    workspace = work.loss_workspace(
        student.hidden, plan.chunk, vocab, compute_dtype, objective, with_gradient=wanted.any
    )
    weight = gradients.weight[:vocab] if wanted.weight else None
    bias = gradients.bias[:vocab] if wanted.bias else None
    for chunk in plan.slices(live.count):
        with live.rows_of(gradients.hidden, chunk) if wanted.hidden else nullcontext() as hidden:
            work.process_chunk(
                live.take(student.hidden, chunk).to(compute_dtype),
                live.take(teacher.hidden, chunk, cleaned=not work.TEACHER_MAY_BE_ANYTHING).to(compute_dtype),
                student_head,
                teacher_head,
                rows[chunk],
                objective,
                ChunkGradients(hidden, weight, bias, first=chunk.start == 0),
                workspace,
            )
    return gradients


def make_head(
    weight: Tensor, bias: Tensor | None, vocab: int, compute_dtype: torch.dtype, options: LogitOptions
) -> Head:
    """The first `vocab` entries, in the dtypes that products take them in."""
    wide = products.accumulation_dtype(compute_dtype)
    return Head(weight[:vocab].to(compute_dtype), _head_bias(bias, vocab, wide, options))


def _head_bias(bias: Tensor | None, vocab: int, wide: torch.dtype, options: LogitOptions) -> Tensor | None:
    """The bias's first `vocab` entries as kernels read them: contiguous and finite.

    An entry of -inf masks its token under a negative scale too.
    """
    if bias is None:
        return None
    bias = bias[:vocab].to(wide).clamp(min=MASKED)
    if options.scale < 0:
        bias = bias.where(bias > MASKED, -MASKED)
    return torch.nn.functional.pad(bias, (0, -vocab % ROW_ALIGNMENT))[:vocab]


def _allocate(
    student: Side, wanted: Wanted, wide: torch.dtype, head_dtype: torch.dtype, live: LiveTokens, vocab: int
) -> Gradients:
    """Allocates the gradients, and zeros only what no chunk will overwrite.

    That is the rows of tokens that are left out, the head's padding, and everything where there are no tokens.
    """
    hidden, weight = student.hidden, student.weight
    shape = weight.shape if wanted.weight else (0,)
    gradients = Gradients(
        hidden=hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight=(
            pages.huge(shape, head_dtype) if hidden.device.type == "cpu" else hidden.new_empty(shape, dtype=head_dtype)
        ),
        bias=hidden.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=wide),
    )
    if live.some_left_out:
        gradients.hidden.zero_()
    gradients.weight[vocab if live.count else 0 :].zero_()
    return gradients


#: The largest weight of a token in float16. That type has all its digits down to 6e-5, and an even distribution over a
#: vocabulary of 256k gives each entry a gradient of 4e-6, which this lifts to 2.5e-4; while a log-ratio of hundreds of
#: nats times this stays under the type's largest number, 65,504.
FLOAT16_WEIGHT = 64.0


def token_weights(
    live: LiveTokens, token_weight: Tensor | None, like: Tensor, reduction: str, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factor of each live token's gradient, and a factor that every gradient still lacks.

    A mean divides by the sum of the weights. In float16 that, or small weights, would push the logits' gradients out of
    range; so there the largest weight is made `FLOAT16_WEIGHT`, and what that and the mean divide by is left for the
    backward pass, where it meets the upstream gradient. Otherwise the second factor is 1.
    """
    wide = products.accumulation_dtype(compute_dtype)
    one = like.new_ones((), dtype=wide)
    if token_weight is None:
        weight, total = like.new_ones(live.count, dtype=wide), one * max(1, live.count)
    else:
        weight = live.take(token_weight).double()  # whose sum float32 may not hold
        total = weight.sum()
        total = torch.where(total == 0, 1, total)
    if reduction != "mean":
        total = one
    if compute_dtype != torch.float16:
        return weight.div(total).to(wide), one
    largest = weight.abs().amax() if live.count else one
    largest = torch.where(largest == 0, 1, largest)
    unit = largest / FLOAT16_WEIGHT
    return weight.div(unit).to(wide), (unit / total).to(wide)


def check_labels(labels: Tensor, vocab: int) -> None:
    """Checks that labels of live tokens lie in the compared vocabulary: at once on the CPU, else by the device."""
    inside = ((labels >= 0) & (labels < vocab)).all()
    if not reads_are_free(labels):
        assert_on_device(inside, f"labels must lie in [0, {vocab})")
    elif not inside:
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(f"labels run from {low} to {high}, but must lie in [0, {vocab})")
