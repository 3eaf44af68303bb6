"""The loop over chunks of tokens: hidden states and heads in, per-token values and gradients out.

Per chunk: two products make logits, a backend turns them into per-token values and the gradient of the student's
logits, and up to two products carry that gradient to the hidden states and the head. Nothing of size N×V exists.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from sdft_kernels import products, torch_backend
from sdft_kernels.chunking import plan_chunks
from sdft_kernels.divergences import Objective, is_mixture
from sdft_kernels.tokens import LiveTokens, TokenRows, reads_are_free

#: Rows of logits start at multiples of this many elements, so that kernels load and store 16 bytes at a time.
ROW_ALIGNMENT = 16


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
    """Of Σ w·L: (N, H) in the hidden states' dtype, (V, H) and (V,) in the accumulation dtype; else empty."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def backend_module(name: str, device: torch.device, wide: torch.dtype) -> ModuleType:
    """The row operations: Triton's for float32 logits on CUDA, where it is installed, unless named otherwise."""
    has_triton = importlib.util.find_spec("triton") is not None
    if name == "triton" or (name == "auto" and device.type == "cuda" and wide == torch.float32 and has_triton):
        from sdft_kernels import triton_backend

        return triton_backend
    return torch_backend


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
    wide = products.accumulation_dtype(compute_dtype)
    work = backend_module(backend, student.hidden.device, wide)
    run = _run_in_tiles if work is torch_backend else _run_in_rows
    student_head = torch_backend.Head(*_head(student, vocab, compute_dtype, wide))
    teacher_head = torch_backend.Head(*_head(teacher, vocab, compute_dtype, wide))
    heads = (student_head, teacher_head)
    gradients = _allocate(student, wanted, wide, live, vocab)
    run(student, teacher, heads, live, rows, objective, wanted, gradients, wide, max_chunk_bytes)
    return gradients


def _run_in_tiles(
    student: Side,
    teacher: Side,
    heads: tuple[torch_backend.Head, torch_backend.Head],
    live: LiveTokens,
    rows: TokenRows,
    objective: Objective,
    wanted: Wanted,
    gradients: Gradients,
    wide: torch.dtype,
    max_chunk_bytes: int | None,
) -> None:
    """By the torch backend, a slab of the vocabulary at a time."""
    vocab, device, dtype = len(heads[0].weight), student.hidden.device, heads[0].weight.dtype
    plan = plan_chunks(live.count, vocab, 2 * wide.itemsize, device, max_chunk_bytes, trainable_head=wanted.weight)
    keep = wanted.any or is_mixture(objective.divergence)
    workspace = torch_backend.Workspace(student.hidden, plan.chunk, vocab, wide, keep=keep)
    for chunk in plan.slices(live.count):
        with live.rows_of(gradients.hidden, chunk) if wanted.hidden else nullcontext() as out:
            torch_backend.process_chunk(
                live.take(student.hidden, chunk).to(dtype),
                live.take(teacher.hidden, chunk).to(dtype),
                *heads,
                rows[chunk],
                objective,
                torch_backend.ChunkGradients(
                    out,
                    gradients.weight[:vocab] if wanted.weight else None,
                    gradients.bias[:vocab] if wanted.bias else None,
                    first=chunk.start == 0,
                ),
                workspace,
            )


def _run_in_rows(
    student: Side,
    teacher: Side,
    heads: tuple[torch_backend.Head, torch_backend.Head],
    live: LiveTokens,
    rows: TokenRows,
    objective: Objective,
    wanted: Wanted,
    gradients: Gradients,
    wide: torch.dtype,
    max_chunk_bytes: int | None,
) -> None:
    """By the Triton backend, whole rows of logits at a time."""
    from sdft_kernels import triton_backend

    vocab, device, dtype = len(heads[0].weight), student.hidden.device, heads[0].weight.dtype
    narrow = products.gradient_dtype(dtype, device)
    separate = wanted.any and narrow != wide  # the gradient does not fit in place of the logits
    per_logit = 2 * wide.itemsize + (narrow.itemsize if separate else 0)
    plan = plan_chunks(live.count, vocab, per_logit, device, max_chunk_bytes, trainable_head=wanted.weight)
    student_logits, teacher_logits = (make_workspace(student.hidden, plan.chunk, vocab, wide) for _ in range(2))
    gradient = make_workspace(student.hidden, plan.chunk, vocab, narrow) if separate else student_logits
    student_head, teacher_head = heads
    for chunk in plan.slices(live.count):
        size = chunk.stop - chunk.start
        hidden = live.take(student.hidden, chunk).to(dtype)
        products.logits(hidden, student_head.weight, student_head.bias, student_logits[:size])
        teacher_hidden = live.take(teacher.hidden, chunk).to(dtype)
        products.logits(teacher_hidden, teacher_head.weight, teacher_head.bias, teacher_logits[:size])
        chunk_gradient = gradient[:size] if wanted.any else None
        triton_backend.process_rows(
            student_logits[:size], teacher_logits[:size], rows[chunk], objective, chunk_gradient
        )
        if wanted.hidden:
            with live.rows_of(gradients.hidden, chunk) as out:
                products.hidden_gradient(gradient[:size], student_head.weight, out)
        if wanted.weight:
            total = gradients.weight[:vocab]
            products.add_weight_gradient(gradient[:size], hidden, total, first=chunk.start == 0)
        if wanted.bias:
            gradients.bias[:vocab] += gradient[:size].sum(0, dtype=wide)


def _head(side: Side, vocab: int, compute_dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = None if side.bias is None else side.bias[:vocab].to(wide)
    return side.weight[:vocab].to(compute_dtype), bias


def _allocate(student: Side, wanted: Wanted, wide: torch.dtype, live: LiveTokens, vocab: int) -> Gradients:
    """Zero only what no chunk will overwrite: other tokens' rows, the head's padding, and all where there are none."""
    hidden, weight = student.hidden, student.weight
    gradients = Gradients(
        hidden=hidden.new_empty(hidden.shape if wanted.hidden else (0,)),
        weight=hidden.new_empty(weight.shape if wanted.weight else (0,), dtype=wide),
        bias=hidden.new_zeros(weight.shape[0] if wanted.bias else 0, dtype=wide),
    )
    if live.some_left_out:
        gradients.hidden.zero_()
    gradients.weight[vocab if live.count else 0 :].zero_()
    return gradients


def make_workspace(like: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """(tokens, vocab) uninitialised, its rows padded to the alignment."""
    padded = -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return like.new_empty((tokens, padded), dtype=dtype)[:, :vocab]


def token_weights(
    live: LiveTokens, token_weight: Tensor | None, like: Tensor, reduction: str, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factor of each live token's gradient, and a factor that every gradient still lacks.

    A mean divides by the sum of the weights. In float16 that would push the logits' gradients out of range, so
    there it is left for the backward pass, where it meets the upstream gradient; otherwise the second factor is 1.
    """
    wide = products.accumulation_dtype(compute_dtype)
    one = like.new_ones((), dtype=wide)
    if token_weight is None:
        weight, total = like.new_ones(live.count, dtype=wide), one * max(1, live.count)
    else:
        weight = live.take(token_weight).to(wide, copy=True)
        total = weight.sum()
        total = torch.where(total == 0, 1, total)
    if reduction != "mean":
        return weight, one
    if compute_dtype == torch.float16:
        return weight, 1 / total
    return weight.div_(total), one


def check_labels(labels: Tensor, vocab: int) -> None:
    """Labels of live tokens lie in the compared vocabulary: told at once on the CPU, asserted on a device."""
    inside = ((labels >= 0) & (labels < vocab)).all()
    if not reads_are_free(labels):
        torch._assert_async(inside, f"labels must lie in [0, {vocab})")
    elif not inside:
        low, high = labels.min().item(), labels.max().item()
        raise ValueError(f"labels run from {low} to {high}, but must lie in [0, {vocab})")
