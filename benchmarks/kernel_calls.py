"""Calls of the row operations and of the kernels that multiply, ours and the peers', one for each way in which Triton
compiles them apart. Nothing is computed: what they launch is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks._compat import liger_jsd
from benchmarks.ledger import meta_inputs
from benchmarks.methods import METHODS, PEER_BETA, Shape
from benchmarks.recorder import passing_for_cuda
from sdft_kernels.backends.gpu import divergence as triton_divergence
from sdft_kernels.backends.gpu import linear as triton_linear
from sdft_kernels.backends.gpu import scaling as triton_scaling
from sdft_kernels.backends.gpu import scoring as triton_scoring
from sdft_kernels.backends.gpu import top as triton_top
from sdft_kernels.backends.gpu.backend import empty_logits
from sdft_kernels.backends.interface import HeadOperands
from sdft_kernels.coarse import TAILS
from sdft_kernels.divergences import CROSS_ENTROPY, DIVERGENCES, Coarse, HardTerm, LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores, TopTokens

#: multiple of 16, which lets it assume more.
VOCABULARIES = (50_257, 151_936)


#: Kernels that reach a row's entries one by one.
OF_ENTRIES = ("take_out_kernel", "compare_kernel", "put_back_kernel")


@dataclass(frozen=True)
class Variant:
    """One way of calling the row operations; kernels are specialised for every field."""

    divergence: str
    student_capped: bool = False
    teacher_capped: bool = False
    labels: bool = False
    importance: bool = False
    bias: bool = False
    gradient: str | None = "float32"
    tokens: int = 2048  # few tokens: rows split over several programs
    vocab: int = VOCABULARIES[0]
    hard: bool = False  # a hard term at a temperature of its own


def call(variant: Variant) -> None:
    """The call whose launches are compiled. Nothing is computed, so the buffers hold nothing."""
    like = torch.empty(0)

    of_labels = variant.divergence == CROSS_ENTROPY
    student, teacher = (empty_logits(like, variant.tokens, variant.vocab, torch.float32) for _ in range(2))
    gradient = None
    if variant.gradient is not None:
        dtype = getattr(torch, variant.gradient)
        separate = empty_logits(like, 4, variant.vocab, dtype)
        gradient = student if dtype == torch.float32 else separate
    bias = torch.empty(variant.vocab) if variant.bias else None
    given, written = torch.empty(variant.tokens), torch.empty(variant.tokens)
    rows = TokenRows(
        weight=given,
        labels=torch.empty(variant.tokens, dtype=torch.int64) if variant.labels or of_labels else None,
        old_logprobs=given if variant.importance else None,
        loss=written,
        student_entropy=written,
        teacher_entropy=None if of_labels else written,
        student_logprob=written if variant.labels or of_labels else None,
        teacher_logprob=written if variant.labels and not of_labels else None,
        logsumexp=written if of_labels else None,
        hard_labels=torch.empty(variant.tokens, dtype=torch.int64) if variant.hard or of_labels else None,
        hard_weight=given if variant.hard else None,
        hard_loss=written if variant.hard else None,
    )
    hard = HardTerm(temperature=0.5) if variant.hard else None
    objective = Objective(
        variant.divergence,
        student=LogitOptions(softcap=30.0 if variant.student_capped else None),
        teacher=LogitOptions(softcap=30.0 if variant.teacher_capped else None),
        importance_clip=2.0 if variant.importance else None,
        hard=HardTerm(label_smoothing=0.1, z_loss=1e-4, entropy_weight=0.1) if of_labels else hard,
    )
    if of_labels:
        triton_divergence.process_rows(student, None, rows, objective, gradient, bias)
    else:
        triton_divergence.process_rows(student, teacher, rows, objective, gradient, bias, bias)


@dataclass(frozen=True)
class ScoringVariant:
    """One way of scoring a single model's tokens."""

    capped: bool
    labels: bool
    bias: bool
    tokens: int = 2048
    vocab: int = VOCABULARIES[0]
    divergence: str = "(scoring)"


def score(variant: ScoringVariant) -> None:
    """As `call`, for the kernel of `linear_token_stats`."""
    written = torch.empty(variant.tokens)
    scores = TokenScores(
        labels=torch.empty(variant.tokens, dtype=torch.int64) if variant.labels else None,
        logprob=written if variant.labels else None,
        top1=torch.empty(variant.tokens, dtype=torch.bool) if variant.labels else None,
        entropy=written,
        logsumexp=written,
    )
    logits = empty_logits(written, variant.tokens, variant.vocab, torch.float32)
    bias = torch.empty(variant.vocab) if variant.bias else None
    triton_scoring.score_rows(logits, bias, scores, LogitOptions(softcap=30.0 if variant.capped else None))


@dataclass(frozen=True)
class TopVariant:
    """One way of comparing with a teacher who gives some entries of each token."""

    divergence: str
    tail: str
    entries: int
    every_option: bool  # a soft cap, a bias, labels and importance weights
    gradient: str = "bfloat16"
    tokens: int = 61
    vocab: int = VOCABULARIES[0]


def top_variants(quick: bool) -> Iterator[TopVariant]:
    """Of few entries, of more than a program handles at once, and of one: Triton compiles a 1 apart."""
    if quick:
        yield from (TopVariant(divergence, "bucket", 100, True) for divergence in DIVERGENCES)
        yield TopVariant("jsd", "dropped", 3000, False)
        yield TopVariant("reverse_kl", "dropped", 1, False)
        return
    for divergence, tail, entries, every_option in product(DIVERGENCES, TAILS, (100, 3000, 1), (False, True)):
        yield TopVariant(divergence, tail, entries, every_option)


def compare_top(variant: TopVariant) -> None:
    """As `call`, for the kernels of `fused_linear_topk_divergence`."""
    tokens, entries = variant.tokens, variant.entries
    student = empty_logits(torch.empty(0), tokens, variant.vocab, torch.float32)
    gradient = empty_logits(student, tokens, variant.vocab, getattr(torch, variant.gradient))
    written, bias, labels, of_labels = torch.empty(tokens), None, None, None
    if variant.every_option:
        bias, labels, of_labels = torch.empty(variant.vocab), torch.empty(tokens, dtype=torch.int64), written
    top = TopTokens(
        ids=torch.empty(tokens, entries, dtype=torch.int64),
        logprobs=torch.empty(tokens, entries),
        tail=torch.empty(tokens, dtype=torch.float64),
        student_tail=written,
    )
    rows = TokenRows(written, labels, of_labels, written, written, None, of_labels, None, top=top)
    objective = Objective(
        CROSS_ENTROPY,
        student=LogitOptions(softcap=30.0 if variant.every_option else None),
        hard=HardTerm(),
        coarse=Coarse(variant.divergence, tail=variant.tail),
    )
    with mock.patch.object(triton_top, "process_rows", _compare_rows_alone):
        triton_top.process_top_rows(student, top, rows, objective, gradient, bias)


def _compare_rows_alone(student: Any, *_: Any, before_gradient: Callable[[Any], None]) -> None:
    """In the place of the kernels of a cross-entropy, which are compiled elsewhere."""
    before_gradient(torch.empty(len(student), triton_divergence.ROW.value))


@dataclass(frozen=True)
class ScalingVariant:
    """One way of multiplying a gradient by the upstream one."""

    dtype: str
    vocab: int = VOCABULARIES[0]
    size: int = 1600  # of hidden states
    divergence: str = "(scaling)"


def scale(variant: ScalingVariant) -> None:
    """As `call`, for the kernel of the backward pass."""
    gradient = torch.empty(variant.vocab, variant.size, dtype=getattr(torch, variant.dtype), device="meta")
    triton_scaling.scale(gradient, torch.empty(1))


@dataclass(frozen=True)
class LinearVariant:
    """One way of starting from hidden states and heads instead of logits."""

    divergence: str
    shared_head: bool
    capped: bool = False
    bias: bool = False
    labels: bool = False
    dtype: str = "bfloat16"
    tokens: int = 2048
    vocab: int = VOCABULARIES[0]
    size: int = 1600  # of hidden states


def linear_variants(quick: bool) -> Iterator[LinearVariant]:
    """Every combination; or each kernel with every option, without a bias, and the two models' with separate heads."""
    if quick:
        yield LinearVariant("(scoring)", True, True, True, True)
        yield LinearVariant("(scoring)", True, labels=True)
        yield LinearVariant("reverse_kl", True, True, True, True)
        yield LinearVariant("reverse_kl", False, tokens=1024, vocab=VOCABULARIES[1], size=3584)
        yield LinearVariant("forward_kl", False, dtype="float16", tokens=61, size=577)
        return
    for divergence, shared_head in (("(scoring)", True), *product(("reverse_kl", "forward_kl"), (True, False))):
        for capped, bias, labels in product((False, True), repeat=3):
            variant = LinearVariant(divergence, shared_head, capped, bias, labels)
            yield variant
            yield replace(variant, vocab=VOCABULARIES[1], size=3584)
            yield replace(variant, dtype="float16", tokens=61, size=577)


def multiply(variant: LinearVariant) -> None:
    """As `call`, for the kernels that do the products themselves."""
    dtype, labels, logprob, top1 = getattr(torch, variant.dtype), None, None, None
    hidden = torch.empty(variant.tokens, variant.size, dtype=dtype)
    weight = torch.empty(variant.vocab, variant.size, dtype=dtype)
    bias = torch.empty(variant.vocab) if variant.bias else None
    written = torch.empty(variant.tokens)
    if variant.labels:
        labels, logprob = torch.empty(variant.tokens, dtype=torch.int64), written
        top1 = torch.empty(variant.tokens, dtype=torch.bool)
    options = LogitOptions(softcap=30.0 if variant.capped else None)
    student = HeadOperands(weight, bias)
    if variant.divergence == "(scoring)":
        triton_linear.score_hidden(hidden, student, TokenScores(labels, logprob, top1, written, written), options)
        return
    teacher = HeadOperands(weight if variant.shared_head else torch.empty_like(weight), bias)
    rows = TokenRows(written, labels, None, written, written, written, logprob, logprob)
    objective = Objective(variant.divergence, student=options, teacher=options)
    triton_linear.process_hidden(hidden, hidden, student, teacher, rows, objective)


@dataclass(frozen=True)
class PeerVariant:
    """One way of calling a peer."""

    package: str
    divergence: str
    vocab: int = 151_936


def _trl(variant: PeerVariant) -> None:
    """TRL's chunked divergence: its own loop, on tensors that pass for CUDA ones."""
    with passing_for_cuda():
        METHODS["TRL"](meta_inputs(Shape("", 4, 64, variant.vocab), trainable_head=True), variant.divergence)


def _trl_logprob_entropy(variant: PeerVariant) -> None:
    """TRL's kernels on whole logits, which have no divergence."""
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logits = torch.zeros(4, variant.vocab, dtype=torch.bfloat16, requires_grad=True)
    logprobs, entropy = selective_log_softmax_and_entropy(logits, torch.zeros(4, dtype=torch.int64))
    (logprobs.sum() + entropy.sum()).backward()


def _liger(variant: PeerVariant) -> None:
    """Liger's JSD kernel, which takes finished log-probabilities. Its chunked loss is plain torch."""
    logits = torch.zeros(4, variant.vocab)
    liger_jsd()(logits, logits, None, PEER_BETA[variant.divergence], -100, 4.0)


PEERS: dict[str, Callable[[PeerVariant], None]] = {
    "TRL": _trl,
    "TRL, whole logits": _trl_logprob_entropy,
    "Liger": _liger,
}


AnyVariant = Variant | ScoringVariant | TopVariant | ScalingVariant | LinearVariant | PeerVariant
