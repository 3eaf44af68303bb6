"""The ways of computing one distillation loss and its gradients that are compared, each as its package offers it.

Every method takes the same inputs and leaves gradients in `student_hidden.grad` and, with a trainable head, in
`student_weight.grad`. The floor computes nothing but the matrix products that any exact method needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_kernels import fused_linear_divergence
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


#: Computes the loss and its gradients; None where the package does not offer this divergence.
Method = Callable[[Inputs, str], Tensor]

#: β of TRL and Liger for each divergence they offer.
PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def ours(inputs: Inputs, divergence: str) -> Tensor:
    loss = fused_linear_divergence(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        divergence=divergence,
    ).loss
    loss.backward()
    return loss


def _liger(inputs: Inputs, divergence: str, *, compiled: bool) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=PEER_BETA[divergence], compiled=compiled
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
    student = (inputs.student_hidden @ inputs.student_weight.T).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (inputs.teacher_hidden @ inputs.teacher_weight.T).float().log_softmax(-1)
    loss = divergence_per_token(student, teacher, divergence).mean()
    loss.backward()
    return loss


class Floor:
    """The bare matrix products, into buffers that are already there: four, or three with a frozen head."""

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
        torch.mm(inputs.teacher_hidden, inputs.teacher_weight.T, out=self.teacher)
        torch.mm(self.student, inputs.student_weight, out=self.grad_hidden)
        if self.grad_weight is not None:
            torch.mm(self.student.T, inputs.student_hidden, out=self.grad_weight)
        return self.grad_hidden


METHODS: dict[str, Method] = {
    "sdft-kernels": ours,
    "Liger compiled": liger_compiled,
    "Liger eager": liger_eager,
    "TRL": trl,
    "plain torch": plain_torch,
}


def offers(method: str, divergence: str) -> bool:
    """Whether the package computes this divergence at all."""
    return method in ("sdft-kernels", "plain torch") or divergence in PEER_BETA
