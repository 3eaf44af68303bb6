"""What a distillation loss costs on a GPU, counted from each package's own code, forward and backward.

Matrix products in units of 2·N·H·V operations, device memory moved, launches, waits of the host, and workspace.
Nothing is run on a GPU and nothing is timed: see recorder.py for how the calls are followed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from benchmarks.methods import METHODS, Inputs, Shape
from benchmarks.recorder import Op, Record, Touch, Traffic, record
from sdft_kernels.chunking import plan_chunks
from sdft_kernels.operator import _forward, fused_linear_divergence_op

#: By module and kernel. Left out is the one logit a row that `combine_kernel` reads at a label.
TRAFFIC = {
    "triton_divergence.partials_kernel": Traffic(("student_pointer", "teacher_pointer"), ("partial_pointer",)),
    "triton_divergence.mixture_kernel": Traffic(
        ("student_pointer", "teacher_pointer", "partial_pointer"), ("mixture_pointer",)
    ),
    "triton_divergence.combine_kernel": Traffic(
        ("partial_pointer", "mixture_pointer", "weight_pointer", "labels_pointer", "old_logprobs_pointer"),
        (
            "constants_pointer",
            "loss_pointer",
            "student_entropy_pointer",
            "teacher_entropy_pointer",
            "student_logprob_pointer",
            "teacher_logprob_pointer",
        ),
    ),
    "triton_divergence.gradient_kernel": Traffic(
        ("student_pointer", "teacher_pointer", "constants_pointer"), ("gradient_pointer",)
    ),
    "chunked_divergence._stats_kernel": Traffic(
        ("s_ptr", "t_ptr", "s_max_ptr", "s_sum_ptr", "s_x_sum_ptr", "t_max_ptr", "t_sum_ptr")
        + ("t_weighted_gap_ptr", "s_weighted_gap_ptr"),
        ("s_max_ptr", "s_sum_ptr", "s_x_sum_ptr", "t_max_ptr", "t_sum_ptr", "t_weighted_gap_ptr", "s_weighted_gap_ptr"),
    ),
    "chunked_divergence._jsd_kernel": Traffic(
        ("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "jsd_ptr", "kl_student_ptr"), ("jsd_ptr", "kl_student_ptr")
    ),
    "chunked_divergence._backward_kernel": Traffic(
        ("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "aux_ptr", "grad_ptr"), ("s_ptr",)
    ),
}

#: The custom operator's fake kernel would hide what it does.
IMPLEMENTATIONS = {fused_linear_divergence_op._opoverload: _forward}

#: Tokens that the peers work on at once, as their code has it (checked in tests/test_ledger.py).
PEER_CHUNK = {"Liger eager": 1024, "Liger compiled": 1024, "TRL": 4096}


@dataclass(frozen=True)
class Ledger:
    """One method at one shape. Rates are per chunk or per logit, N·V of them; bytes are what has to move."""

    method: str
    shape: Shape
    trainable_head: bool
    ops: tuple[Op, ...]
    workspace: int  # bytes above inputs and returned gradients

    @property
    def units(self) -> float:
        """Matrix products, in units of 2·N·H·V operations."""
        return sum(op.flops for op in self.ops) / (2 * self.shape.tokens * self.shape.hidden * self.shape.vocab)

    @property
    def bytes_per_logit(self) -> float:
        """Device memory moved for logits, their gradients and what else has their shape."""
        touches = (touch for op in self.ops for touch in (*op.reads, *op.writes))
        return sum(t.nbytes for t in touches if self._is_logits(t)) / (self.shape.tokens * self.shape.vocab)

    @property
    def launches(self) -> int:
        return sum(bool(op.writes) for op in self.ops)

    @property
    def waits(self) -> int:
        """Times the host waits for the device."""
        return sum(op.waits for op in self.ops)

    def _is_logits(self, touch: Touch) -> bool:
        """Tokens by (a tile of) the vocabulary, either way round."""
        return sum(size >= 64 for size in touch.shape) >= 2 and self.shape.hidden not in touch.shape


def chunk_size(method: str, shape: Shape, *, trainable_head: bool) -> int:
    """Tokens that a method works on at once where there are many."""
    if method != "sdft-kernels":
        return PEER_CHUNK[method]
    cuda = torch.device("cuda")
    return plan_chunks(1 << 17, shape.vocab, 4, 2, cuda, trainable_head=trainable_head).chunk


def count(method: str, shape: Shape, *, trainable_head: bool, divergence: str = "reverse_kl") -> Ledger:
    """Follows one call and its backward pass in bfloat16. Liger compiled is Liger eager, fused without any loss."""
    inputs = _inputs(shape, trainable_head=trainable_head)
    followed = "Liger eager" if method == "Liger compiled" else method
    noted = record(lambda: METHODS[followed](inputs, divergence), TRAFFIC, IMPLEMENTATIONS)
    if method == "Liger compiled":
        noted = fused(noted)
    gradients = [g for g in (inputs.student_hidden.grad, inputs.student_weight.grad) if g is not None]
    returned = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    return Ledger(method, shape, trainable_head, tuple(noted.ops), max(0, noted.peak - returned))


def launches_per_chunk(method: str, shape: Shape, *, trainable_head: bool) -> int:
    """What one more chunk adds."""
    chunk = chunk_size(method, shape, trainable_head=trainable_head)
    one, two = (
        count(method, replace(shape, tokens=chunks * chunk), trainable_head=trainable_head).launches
        for chunks in (1, 2)
    )
    return two - one


def fused(noted: Record) -> Record:
    """The same as the best compiler would have it: what lies between two matrix products is one launch, which reads
    what comes from outside once and writes what is wanted outside once."""
    regions = [list(ops) for _, ops in groupby(noted.ops, key=lambda op: (op.flops > 0, op.waits))]
    ops: list[Op] = []
    for number, region in enumerate(regions):
        if region[0].flops or region[0].waits:
            ops += region
            continue
        later = {touch.storage for after in regions[number + 1 :] for op in after for touch in op.reads}
        made: set[int] = set()
        reads: list[Touch] = []
        for op in region:
            reads += [touch for touch in op.reads if touch.storage not in made]
            made |= {touch.storage for touch in op.writes}
        writes = [t for op in region for t in op.writes if t.storage in later or t.storage in noted.kept]
        ops.append(Op("fused", _largest(reads), _largest(writes)))
    return Record(ops, noted.peak, noted.kept)


def _largest(touches: Iterable[Touch]) -> tuple[Touch, ...]:
    """One touch for each storage."""
    best: dict[int, Touch] = {}
    for touch in touches:
        if touch.storage not in best or touch.nbytes > best[touch.storage].nbytes:
            best[touch.storage] = touch
    return tuple(best.values())


def _inputs(shape: Shape, *, trainable_head: bool) -> Inputs:
    """Tensors without values, student and teacher sharing a head."""

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weight = empty(shape.vocab, shape.hidden)
    return Inputs(
        student_hidden=empty(shape.tokens, shape.hidden).requires_grad_(),
        student_weight=weight.requires_grad_(trainable_head),
        teacher_hidden=empty(shape.tokens, shape.hidden),
        teacher_weight=weight.detach(),
        labels=empty(shape.tokens, dtype=torch.int64),
    )
