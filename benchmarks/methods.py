"""The ways of computing one distillation loss and its gradients that are compared, each as its package offers it.

Every method takes the same inputs and leaves gradients in `student_hidden.grad` and, with a trainable head, in
`student_weight.grad`. The floor computes nothing but the matrix products that any exact method needs.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import fused_linear_cross_entropy, fused_linear_divergence, fused_linear_topk_divergence
from sdft_kernels.backends import products
from sdft_kernels.chunking import BLOCK_TOKENS, plan_chunks
from sdft_kernels.divergences import CROSS_ENTROPY, Objective
from sdft_kernels.reference import divergence_per_token


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size and vocabulary of a head."""

    name: str
    tokens: int
    hidden: int
    vocab: int


SHAPES = (
    Shape("SmolLM2-135M", 1024, 576, 49_152),
    Shape("Qwen2.5-0.5B", 512, 896, 151_936),
    Shape("Gemma-3-270M", 512, 640, 262_144),
)


@dataclass
class Inputs:
    """Student and teacher at one head, as under self-distillation: the same weights, different hidden states."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    @property
    def trainable_head(self) -> bool:
        return self.student_weight.requires_grad

    def clear(self) -> None:
        """Drops the gradients."""
        self.student_hidden.grad = self.student_weight.grad = None


def make_inputs(
    shape: Shape, *, trainable_head: bool, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Random inputs whose logits have a language model's spread, teacher and student close to each other."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    hidden = normal(shape.tokens, shape.hidden)
    teacher = hidden + 0.3 * normal(shape.tokens, shape.hidden)
    weight = (normal(shape.vocab, shape.hidden) * 2 / shape.hidden**0.5).to(dtype)
    return Inputs(
        student_hidden=hidden.to(dtype).requires_grad_(),
        student_weight=weight.requires_grad_(trainable_head),
        teacher_hidden=teacher.to(dtype),
        teacher_weight=weight.detach(),
        labels=torch.randint(0, shape.vocab, (shape.tokens,), generator=generator, device=device),
    )


#: What is computed beside the divergences: cross-entropy with labels, and a divergence with that as a hard term. There
#: the divergence has another temperature, so that the hard term needs a softmax of its own.
WITH_HARD = "reverse_kl_hard"
OF_LABELS = (CROSS_ENTROPY, WITH_HARD)
SOFT_TEMPERATURE, HARD_WEIGHT = 2.0, 0.5

#: Computes the loss and its gradients; None where the package does not offer this divergence.
Method = Callable[[Inputs, str], Tensor]

#: β of TRL and Liger for each divergence they offer.
PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def ours(inputs: Inputs, divergence: str, **options: Any) -> Tensor:
    if divergence == CROSS_ENTROPY:
        loss = fused_linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.labels, **options).loss
        loss.backward()
        return loss
    if divergence == WITH_HARD:
        divergence = "reverse_kl"
        hard = {"hard_labels": inputs.labels, "hard_weight": HARD_WEIGHT, "temperature": SOFT_TEMPERATURE}
        options = hard | options
    loss = fused_linear_divergence(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        divergence=divergence,
        **options,
    ).loss
    loss.backward()
    return loss


def ours_half_hard(inputs: Inputs, divergence: str) -> Tensor:
    """As much of the labels' cross-entropy as of the divergence."""
    return ours(inputs, divergence, hard_labels=inputs.labels, hard_weight=1.0)


#: Entries of each token that a top-k teacher gives.
TOP_ENTRIES = 100


def top_teacher(inputs: Inputs, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of a top-k teacher: entries at even distances, which hold about nine tenths."""
    tokens, vocab, device = len(inputs.student_hidden), len(inputs.student_weight), inputs.labels.device
    generator = torch.Generator(device).manual_seed(seed)
    first = torch.randint(0, vocab, (tokens, 1), generator=generator, device=device)
    entries = min(TOP_ENTRIES, vocab - 1)
    ids = (first + vocab // entries * torch.arange(entries, device=device)) % vocab
    logits = torch.randn((tokens, entries + 1), generator=generator, device=device)
    logits[:, -1] += math.log(entries) - 2  # what the entries leave
    return ids, logits.log_softmax(-1)[:, :-1].contiguous()


def ours_top(inputs: Inputs, divergence: str, teacher: tuple[Tensor, Tensor]) -> Tensor:
    loss = fused_linear_topk_divergence(
        inputs.student_hidden, inputs.student_weight, *teacher, divergence=divergence
    ).loss
    loss.backward()
    return loss


def every_option(inputs: Inputs, seed: int = 0) -> dict[str, Any]:
    """All that our loss takes beside hidden states and heads; the biases do not train."""
    (tokens, _), (vocab, _), device = inputs.student_hidden.shape, inputs.student_weight.shape, inputs.labels.device
    generator = torch.Generator(device).manual_seed(seed)
    bias = 0.1 * torch.randn((2, vocab), generator=generator, device=device).to(inputs.student_weight.dtype)
    uniform = torch.rand((2, tokens), generator=generator, device=device)
    return {
        "student_bias": bias[0],
        "teacher_bias": bias[1],
        "temperature": 1.3,
        "student_logit_scale": 1.2,
        "teacher_logit_scale": 0.8,
        "student_softcap": 30.0,
        "teacher_softcap": 30.0,
        "token_weight": uniform[0] + 0.1,
        "labels": inputs.labels,
        "old_logprobs": -8 * uniform[1],
        "importance_clip": 3.0,
    }


def _liger(inputs: Inputs, divergence: str, *, compiled: bool, hard: float = 0.0) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=PEER_BETA[divergence], compiled=compiled
    )
    loss = module(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        inputs.labels,
    )
    loss.backward()
    return loss


def liger_eager(inputs: Inputs, divergence: str) -> Tensor:
    return _liger(inputs, divergence, compiled=False)


def liger_compiled(inputs: Inputs, divergence: str) -> Tensor:
    return _liger(inputs, divergence, compiled=True)


def liger_half_hard(inputs: Inputs, divergence: str) -> Tensor:
    """Half of it the labels' cross-entropy, as in the numbers that Liger publishes."""
    return _liger(inputs, divergence, compiled=False, hard=0.5)


def liger_half_hard_compiled(inputs: Inputs, divergence: str) -> Tensor:
    return _liger(inputs, divergence, compiled=True, hard=0.5)


def _liger_fused(inputs: Inputs, divergence: str, implementation: str) -> Tensor:
    """What `LigerFusedLinearJSD` of liger_kernel.transformers calls, which leaves the implementation to Liger: its CuTe
    kernel where that can be had. At its β of 1 the loss is Σ p (log p - log q) with p the student's."""
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    no_labels, ignored, temperature, accumulation = None, -100, 1.0, None
    loss = LigerFusedLinearJSDFunction.apply(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        no_labels,
        PEER_BETA[divergence],
        ignored,
        temperature,
        accumulation,
        implementation,
        None,
    )
    loss.backward()
    return loss


def liger_cross_entropy(inputs: Inputs) -> Tensor:
    """Its implementation is left to Liger."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(inputs.student_hidden, inputs.student_weight, inputs.labels)
    loss.backward()
    return loss


def liger_triton(inputs: Inputs, divergence: str) -> Tensor:
    if divergence == CROSS_ENTROPY:
        return liger_cross_entropy(inputs)
    return _liger_fused(inputs, divergence, "nvidia-triton")


def liger_cute(inputs: Inputs, divergence: str) -> Tensor:
    if importlib.util.find_spec("cutlass") is None:
        raise ModuleNotFoundError("nvidia-cutlass-dsl is not installed")
    return _liger_fused(inputs, divergence, "nvidia-cutedsl")


def trl(inputs: Inputs, divergence: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        inputs.student_hidden,
        inputs.student_weight,
        None,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        None,
        PEER_BETA[divergence],
    )
    loss = per_token.mean()
    loss.backward()
    return loss


def plain_torch(inputs: Inputs, divergence: str) -> Tensor:
    """Full logits, float32 softmax, autograd: what one writes first."""
    if divergence == CROSS_ENTROPY:
        logits = (inputs.student_hidden @ inputs.student_weight.T).float()
        loss = torch.nn.functional.cross_entropy(logits, inputs.labels)
        loss.backward()
        return loss
    student = (inputs.student_hidden @ inputs.student_weight.T).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_weight.T).float().log_softmax(-1)
    loss = divergence_per_token(student, teacher, divergence).mean()
    loss.backward()
    return loss


class Floor:
    """The bare matrix products, into buffers that are already there: four, or three with a frozen head; one less for
    cross-entropy, which has no teacher."""

    def __init__(self, inputs: Inputs) -> None:
        tokens, hidden = inputs.student_hidden.shape
        vocab = inputs.student_weight.shape[0]
        like = inputs.student_hidden.detach()
        self.student, self.teacher = like.new_zeros(tokens, vocab), like.new_zeros(tokens, vocab)
        self.grad_hidden = like.new_zeros(tokens, hidden)
        self.grad_weight = like.new_zeros(vocab, hidden) if inputs.trainable_head else None

    @torch.no_grad()
    def __call__(self, inputs: Inputs, divergence: str) -> Tensor:
        torch.mm(inputs.student_hidden, inputs.student_weight.T, out=self.student)
        if divergence != CROSS_ENTROPY:
            torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=self.teacher)
        torch.mm(self.student, inputs.student_weight, out=self.grad_hidden)
        if self.grad_weight is not None:
            torch.mm(self.student.T, inputs.student_hidden, out=self.grad_weight)
        return self.grad_hidden


class OurFloor:
    """The bare products in our dtypes, float32 logits and a head's gradient added up in float32; `whole` or in chunks
    as ours has them; without a teacher's for cross-entropy. Its operands are random numbers: what they hold decides the
    clock of a GPU at its power limit."""

    def __init__(self, inputs: Inputs, *, whole: bool) -> None:
        from sdft_kernels.backends.gpu import backend as triton_backend

        (tokens, _), vocab = inputs.student_hidden.shape, len(inputs.student_weight)
        dtype, device, trainable = inputs.student_hidden.dtype, inputs.student_hidden.device, inputs.trainable_head
        dtypes = products.Dtypes.of(dtype, inputs.student_weight.dtype, device)
        returned, wide = dtypes.head_gradient, dtypes.wide
        plan = plan_chunks(
            tokens,
            vocab,
            triton_backend.held(dtypes, Objective(), with_gradient=True),
            device,
            trainable_head=trainable,
            added_up=wide.itemsize * inputs.student_weight.shape[1] if trainable and returned != wide else 0,
        )
        self.chunks = [slice(0, tokens)] if whole else list(plan.slices(tokens))
        rows = max(chunk.stop - chunk.start for chunk in self.chunks)
        self.block = rows if whole else min(rows, BLOCK_TOKENS)
        like = inputs.student_hidden.detach()
        self.logits = triton_backend.empty_logits(like, self.block, vocab, wide)
        self.gradient = triton_backend.empty_logits(like, rows, vocab, dtypes.gradient)
        self.gradient.normal_()
        self.grad_hidden = torch.empty_like(like)
        self.grad_weight: Tensor | None = None
        if trainable:
            added_up = returned if len(self.chunks) == 1 else wide
            self.grad_weight = like.new_zeros(inputs.student_weight.shape, dtype=added_up)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, divergence: str) -> Tensor:
        weight = inputs.student_weight
        for chunk in self.chunks:
            hidden, teacher = inputs.student_hidden[chunk], inputs.teacher_hidden[chunk]
            gradient = self.gradient[: len(hidden)]
            for student_block, teacher_block in zip(hidden.split(self.block), teacher.split(self.block), strict=True):
                logits = self.logits[: len(student_block)]
                products.logits(student_block, weight, logits)
                if divergence != CROSS_ENTROPY:
                    products.logits(teacher_block, inputs.teacher_weight, logits)
            products.hidden_gradient(gradient, weight, self.grad_hidden[chunk])
            if self.grad_weight is not None:
                products.add_weight_gradient(gradient, hidden, self.grad_weight, first=chunk.start == 0)
        return self.grad_hidden


METHODS: dict[str, Method] = {
    "sdft-kernels": ours,
    "Liger compiled": liger_compiled,
    "Liger eager": liger_eager,
    "TRL": trl,
    "plain torch": plain_torch,
}

LIGER_HALF_HARD, LIGER_HALF_HARD_COMPILED = "Liger eager, half hard", "Liger compiled, half hard"
OURS_HALF_HARD, OURS_TOP = "ours, half hard", f"ours, top {TOP_ENTRIES}"

#: With those that need a GPU: Liger's fused loss by its kernels, and losses with half a hard one.
DEVICE_METHODS: dict[str, Method] = {
    **METHODS,
    "Liger Triton": liger_triton,
    "Liger CuTe": liger_cute,
    OURS_HALF_HARD: ours_half_hard,
    LIGER_HALF_HARD: liger_half_hard,
    LIGER_HALF_HARD_COMPILED: liger_half_hard_compiled,
}


def offers(method: str, divergence: str) -> bool:
    """Whether the package computes this on a CPU at all: Liger's fused cross-entropy is in Triton."""
    if divergence == WITH_HARD:
        return method == "sdft-kernels"
    return method in ("sdft-kernels", "plain torch") or divergence in PEER_BETA
