"""What a distillation loss costs on a GPU, counted from each package's own code, forward and backward.

Matrix products in units of 2·N·H·V operations, device memory moved, launches, waits of the host, and workspace.
Nothing is run on a GPU and nothing is timed: see recorder.py for how the calls are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch

from benchmarks.methods import METHODS, Inputs, Method, Shape
from benchmarks.recorder import Op, Record, Touch, Traffic, record
from sdft_kernels import autograd, fused_linear_divergence
from sdft_kernels.chunking import BLOCK_TOKENS, Held, plan_chunks

_TRL_STATISTICS = (
    *("s_max_ptr", "s_sum_ptr", "s_x_sum_ptr"),
    *("t_max_ptr", "t_sum_ptr", "t_weighted_gap_ptr", "s_weighted_gap_ptr"),
)

_BIASES = ("student_bias_pointer", "teacher_bias_pointer")

#: By module and kernel. Left out is the one logit a row that `partials_kernel` reads at a label, and the few of a row
#: that a teacher gives. What every row reads again, a bias, is taken to be in the L2 cache.
TRAFFIC = {
    "statistics.partials_kernel": Traffic(
        ("student_pointer", "teacher_pointer", *_BIASES, "labels_pointer", "hard_labels_pointer"),
        (
            "partial_pointer",
            "student_logprob_pointer",
            "teacher_logprob_pointer",
            "hard_loss_pointer",
            "hard_sums_pointer",
        ),
    ),
    "statistics.mixture_kernel": Traffic(
        ("student_pointer", "teacher_pointer", *_BIASES, "partial_pointer"), ("mixture_pointer",)
    ),
    "divergence.combine_kernel": Traffic(
        (
            "partial_pointer",
            "mixture_pointer",
            "hard_sums_pointer",
            "hard_weight_pointer",
            "hard_loss_pointer",
            "weight_pointer",
            "old_logprobs_pointer",
            "student_logprob_pointer",
            "teacher_logprob_pointer",
        ),
        (
            "constants_pointer",
            "loss_pointer",
            "student_entropy_pointer",
            "teacher_entropy_pointer",
            "student_logprob_pointer",
            "teacher_logprob_pointer",
            "logsumexp_pointer",
            "hard_loss_pointer",
        ),
    ),
    "divergence.gradient_kernel": Traffic(
        ("student_pointer", "teacher_pointer", *_BIASES, "constants_pointer", "hard_labels_pointer"),
        ("gradient_pointer",),
    ),
    "top.take_out_kernel": Traffic(("ids_pointer", "labels_pointer"), ("u_pointer", "label_u_pointer")),
    "top.compare_kernel": Traffic(
        (
            *("u_pointer", "logprobs_pointer", "tail_pointer", "rest_logsumexp_pointer", "rest_entropy_pointer"),
            *("label_u_pointer", "old_logprobs_pointer", "weight_pointer"),
        ),
        (
            *("u_pointer", "constants_pointer", "loss_pointer", "entropy_pointer", "logprob_pointer"),
            "student_tail_pointer",
        ),
    ),
    "top.put_back_kernel": Traffic(("ids_pointer", "values_pointer"), ()),
    # By an upstream gradient of 1, as `loss.backward()` has it: nothing else is read, and nothing written.
    "scaling.scale_kernel": Traffic(("factor_pointer",), ()),
    # What tiles of tokens and of the vocabulary read again is taken to be in the L2 cache.
    "linear.process_hidden_kernel": Traffic(
        (
            *("student_pointer", "student_weight_pointer", "teacher_pointer", "teacher_weight_pointer"),
            *(*_BIASES, "labels_pointer"),
        ),
        ("partial_pointer", "student_logprob_pointer", "teacher_logprob_pointer"),
        (("student_pointer", "student_weight_pointer"), ("teacher_pointer", "teacher_weight_pointer")),
    ),
    "chunked_divergence._stats_kernel": Traffic(("s_ptr", "t_ptr", *_TRL_STATISTICS), _TRL_STATISTICS),
    "chunked_divergence._jsd_kernel": Traffic(
        ("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "jsd_ptr", "kl_student_ptr"), ("jsd_ptr", "kl_student_ptr")
    ),
    "chunked_divergence._backward_kernel": Traffic(
        ("s_ptr", "t_ptr", "s_log_z_ptr", "t_log_z_ptr", "aux_ptr", "grad_ptr"), ("s_ptr",)
    ),
}

#: The custom operators' fake kernels would hide what they do.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    **autograd.IMPLEMENTATIONS,
    autograd.scale_op: autograd.scale,
}

#: Tokens that the peers work on at once, as their code has it (checked in tests/test_ledger.py).
PEER_CHUNK = {"Liger eager": 1024, "Liger compiled": 1024, "TRL": 4096}


OURS = "sdft-kernels"
#: Ours with a weight and a label for each token, and biases that do not train; and for a divergence from a mixture.
EVERY_OPTION, MIXTURE = "ours, options", "ours, jsd"
#: Ours where nothing takes a gradient; the heads are counted as if each were read.
NO_GRADIENT = "ours, no grad"
COMPARED = (OURS, "TRL", "Liger eager", "Liger compiled")
#: The lines of the printed ledger, by whether the head trains.
COUNTED = {True: (*COMPARED, EVERY_OPTION, MIXTURE), False: (*COMPARED, EVERY_OPTION, MIXTURE, NO_GRADIENT)}

#: Tokens at which the printed ledger is taken.
TOKENS = 8192


@dataclass(frozen=True)
class Ledger:
    """One method at one shape, forward and backward."""

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
    def launches(self) -> int:
        return sum(bool(op.writes) or not op.waits for op in self.ops)

    @property
    def waits(self) -> int:
        """Times the host waits for the device."""
        return sum(op.waits for op in self.ops)


def chunk_size(method: str, shape: Shape, *, trainable_head: bool) -> int:
    """Tokens whose logits a method has at once where there are many."""
    if method in PEER_CHUNK:
        return PEER_CHUNK[method]
    if method != NO_GRADIENT:
        return BLOCK_TOKENS
    return plan_chunks(1 << 17, shape.vocab, Held(0), torch.device("cuda"), trainable_head=trainable_head).chunk


def count(method: str, shape: Shape, *, trainable_head: bool, divergence: str = "reverse_kl") -> Ledger:
    """Follows one call and its backward pass in bfloat16. Liger compiled is Liger eager, fused without any loss."""
    followed = "Liger eager" if method == "Liger compiled" else method
    noted, returned = _follow(followed, shape, trainable_head, divergence)
    if method == "Liger compiled":
        noted = fused(noted)
    return Ledger(method, shape, trainable_head, tuple(noted.ops), max(0, noted.peak - returned))


@torch.no_grad()
def _without_gradient(inputs: Inputs, divergence: str) -> torch.Tensor:
    hidden, weight = inputs.student_hidden, inputs.student_weight
    return fused_linear_divergence(
        hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, divergence=divergence
    ).loss


def _with_every_option(inputs: Inputs, divergence: str) -> torch.Tensor:
    tokens, vocab = len(inputs.student_hidden), len(inputs.student_weight)
    loss = fused_linear_divergence(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        student_bias=inputs.student_hidden.new_empty(vocab),
        teacher_bias=inputs.student_hidden.new_empty(vocab),
        token_weight=inputs.student_hidden.new_empty(tokens, dtype=torch.float32),
        labels=inputs.labels,
        divergence=divergence,
    ).loss
    loss.backward()
    return loss


def _jsd(inputs: Inputs, divergence: str) -> torch.Tensor:
    return METHODS[OURS](inputs, "jsd")


FOLLOWED: dict[str, Method] = {
    **METHODS,
    EVERY_OPTION: _with_every_option,
    MIXTURE: _jsd,
    NO_GRADIENT: _without_gradient,
}


@lru_cache(maxsize=2)
def _follow(method: str, shape: Shape, trainable_head: bool, divergence: str) -> tuple[Record, int]:
    """The record of a call, and the bytes of the gradients that it returns."""
    inputs = meta_inputs(shape, trainable_head=trainable_head)
    noted = record(lambda: FOLLOWED[method](inputs, divergence), TRAFFIC, IMPLEMENTATIONS)
    gradients = [g for g in (inputs.student_hidden.grad, inputs.student_weight.grad) if g is not None]
    return noted, sum(gradient.numel() * gradient.element_size() for gradient in gradients)


def bytes_per_logit(method: str, shape: Shape, *, trainable_head: bool) -> float:
    """Device memory moved for logits, their gradients and whatever else is tokens by vocabulary (or by a tile of it).

    Counted with a hidden size that no other dimension has, so that neither weights nor hidden states pass for logits.
    """
    marked = replace(shape, hidden=96)
    ops = count(method, marked, trainable_head=trainable_head).ops
    touches = (touch for op in ops for touch in (*op.reads, *op.writes))
    moved = sum(t.nbytes for t in touches if 96 not in t.shape and sum(size >= 64 for size in t.shape) >= 2)
    return moved / (shape.tokens * shape.vocab)


def launches_per_chunk(method: str, shape: Shape, *, trainable_head: bool) -> int:
    """What one more chunk adds. A call of a single one may have less to do around it."""
    chunk = chunk_size(method, shape, trainable_head=trainable_head)
    two, three = (
        count(method, replace(shape, tokens=chunks * chunk), trainable_head=trainable_head).launches
        for chunks in (2, 3)
    )
    return three - two


def fused(noted: Record) -> Record:
    """The same as the best compiler would have it: what lies between two matrix products is one launch, which reads
    what comes from outside once and writes what is wanted outside once."""
    regions = [list(ops) for _, ops in groupby(noted.ops, key=lambda op: (op.flops > 0, op.waits))]
    last_read = {touch.storage: n for n, region in enumerate(regions) for op in region for touch in op.reads}
    ops: list[Op] = []
    for number, region in enumerate(regions):
        if region[0].flops or region[0].waits:
            ops += region
            continue
        made: set[int] = set()
        reads: list[Touch] = []
        for op in region:
            reads += [touch for touch in op.reads if touch.storage not in made]
            made |= {touch.storage for touch in op.writes}
        written = [touch for op in region for touch in op.writes]
        wanted = [t for t in written if last_read.get(t.storage, -1) > number or t.storage in noted.kept]
        ops.append(Op("fused", _largest(reads), _largest(wanted)))
    return Record(ops, noted.peak, noted.kept)


def _largest(touches: Iterable[Touch]) -> tuple[Touch, ...]:
    """One touch for each storage."""
    best: dict[int, Touch] = {}
    for touch in touches:
        if touch.storage not in best or touch.nbytes > best[touch.storage].nbytes:
            best[touch.storage] = touch
    return tuple(best.values())


def meta_inputs(shape: Shape, *, trainable_head: bool) -> Inputs:
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


@dataclass(frozen=True)
class Entry:
    """A line of the printed ledger."""

    method: str
    model: str
    head: str
    tokens: int
    units: float
    bytes_per_logit: float
    gigabytes: float  # everything moved
    chunk: int
    launches_per_chunk: int
    waits: int
    workspace: int


def entry(method: str, shape: Shape, *, trainable_head: bool) -> Entry:
    whole = count(method, shape, trainable_head=trainable_head)
    return Entry(
        method=method,
        model=shape.name,
        head="-" if method == NO_GRADIENT else "trainable" if trainable_head else "frozen",
        tokens=shape.tokens,
        units=whole.units,
        bytes_per_logit=bytes_per_logit(method, shape, trainable_head=trainable_head),
        gigabytes=sum(op.nbytes for op in whole.ops) / 1e9,
        chunk=chunk_size(method, shape, trainable_head=trainable_head),
        launches_per_chunk=launches_per_chunk(method, shape, trainable_head=trainable_head),
        waits=whole.waits,
        workspace=whole.workspace,
    )


def broken_bars(entries: list[Entry]) -> list[str]:
    """Ours, with every option too: the dense floor of products, 30 bytes a logit, 8 launches a chunk, no waits."""
    broken = []
    for line in entries:
        bars = {
            "units": (line.units, 4 if line.head == "trainable" else 3),
            "bytes a logit": (line.bytes_per_logit, 30),
            "launches a chunk": (line.launches_per_chunk, 8),
            "waits": (line.waits, 0),
        }
        for name, (found, most) in bars.items():
            if line.method in (OURS, EVERY_OPTION) and found > most:
                broken.append(f"{line.method}: {found:g} {name}, {line.head} head of {line.model}, at most {most}")
    return broken


def table(entries: list[Entry]) -> str:
    lines = [
        f"bfloat16 inputs, reverse KL, {entries[0].tokens} tokens. Workspace: above inputs and returned gradients.",
        "ours, options: with a weight and a label for each token and biases; ours, jsd: that divergence instead.",
        "Liger compiled: each chunk's element-wise work in as few launches and bytes as could be; workspace as eager.",
        f"{'model':14} {'head':9} {'method':15} {'units':>5} {'bytes/logit':>11} {'GB moved':>8} {'chunk':>5} "
        f"{'launches/chunk':>14} {'waits':>5} {'workspace MiB':>13}",
    ]
    lines += [
        f"{line.model:14} {line.head:9} {line.method:15} {line.units:5.2f} {line.bytes_per_logit:11.2f} "
        f"{line.gigabytes:8.1f} {line.chunk:5} {line.launches_per_chunk:14} {line.waits:5} "
        f"{line.workspace / 2**20:13.0f}"
        for line in entries
    ]
    return "\n".join(lines)
