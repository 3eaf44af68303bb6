"""From models and a micro-batch to the loss, without logits: hidden states of completion positions, then the head.

A causal language model is a backbone and an output head, z = scale * (h W^T + b), soft-capped where the model says
so. `find_head` reads that description from the model's configuration and `check_head` compares it with the model's
own logits before anything is trained on it. The divergence itself is `sdft_kernels.fused_linear_divergence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sdft.config import SDFTConfig
from sdft.errors import TrainingError
from sdft.layout import Batch
from sdft_kernels import DivergenceOutput, fused_linear_divergence

#: What configurations call the soft-cap of the logits: Gemma and most others, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap(scale * (hidden @ weight.T + bias)), with softcap(y) = c tanh(y / c)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits themselves; for the self-check, and for cross-entropy on a few positions at a time."""
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, dtype: torch.dtype | None) -> Head:
        """The same head in another type (None: as it is); gradients flow back to the original."""
        dtype = dtype or self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.scale, self.softcap)


def find_head(model: PreTrainedModel) -> Head:
    """The head that the model's configuration describes."""
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TrainingError(f"{type(model).__name__} has no linear output head, and the loss needs one")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # so does Falcon H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(weight, getattr(layer, "bias", None), scale, softcap)


def backbone(model: PreTrainedModel) -> nn.Module:
    """What is below the head; Llama 4's text model does not say so under the usual name."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The hidden states (N, H) that the head would be given at the flat `positions` of a right-padded batch."""
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, positions)


@torch.no_grad()
def check_head(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Refuse a model whose own logits on a few tokens are not those of the head that `find_head` describes.

    One is refused, too, in which a token sees those after it: padding on the right, without a mask, would change it.
    """
    if backbone(model) is model:
        raise TrainingError(f"{type(model).__name__} has no backbone apart from its head, and the loss needs one")
    training = model.training
    model.eval()
    input_ids = torch.tensor([list(tokens)], device=model.device)
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    own = torch.arange(len(tokens), device=model.device)
    hidden = hidden_states(model, input_ids, own)
    followed = [hidden_states(model, nn.functional.pad(input_ids, (0, 8), value=v), own).float() for v in (0, 1)]
    model.train(training)
    head = find_head(model)
    tolerance = max(1e-4, 4 * torch.finfo(head.weight.dtype).eps)
    moved = ((followed[0] - followed[1]).abs().max() / followed[0].abs().max().clamp_min(1e-6)).item()
    if moved > tolerance:
        raise TrainingError(
            f"{type(model).__name__} lets a token see those after it: its hidden states move by {moved:.2g} of the "
            "largest when these change, and the loss needs a causal model"
        )
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise TrainingError(
            f"{type(model).__name__} has hidden states of size {hidden.shape[-1]} and a head for size "
            f"{head.weight.shape[-1]}, with something between them that the loss cannot reproduce"
        )
    measured = head.to(torch.float32).logits(hidden.float())
    if expected.shape != measured.shape:
        raise TrainingError(
            f"{type(model).__name__} has logits of shape {tuple(expected.shape)} where its head gives "
            f"{tuple(measured.shape)}, so that the loss cannot be computed from its hidden states"
        )
    difference = ((measured - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    if not difference <= tolerance:  # a NaN is refused too
        raise TrainingError(
            f"{type(model).__name__} has logits that its head (scale {head.scale:g}, soft-cap {head.softcap}, bias "
            f"{'yes' if head.bias is not None else 'no'}) does not reproduce: they differ by {difference:.2g} of the "
            f"largest logit, where {tolerance:.2g} is rounding; the loss would not be this model's"
        )


def divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> DivergenceOutput:
    """The divergence between two models at each completion token of the batch, without a graph through the teacher.

    `autocast` is the type of mixed-precision products (None: the weights' own type); the softmax arithmetic is float32
    either way. `options` go to `fused_linear_divergence`.
    """
    head, teacher_head = find_head(student), find_head(teacher)
    with torch.no_grad(), _autocast(student.device, autocast):
        teacher_hidden = hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_positions"])
    with _autocast(student.device, autocast):
        student_hidden = hidden_states(student, batch["input_ids"], batch["positions"])
        if autocast is None:
            student_hidden, teacher_hidden = student_hidden.to(head.weight.dtype), teacher_hidden.to(head.weight.dtype)
        return fused_linear_divergence(
            student_hidden,
            head.weight,
            teacher_hidden,
            teacher_head.weight,
            student_bias=head.bias,
            teacher_bias=teacher_head.bias,
            student_logit_scale=head.scale,
            teacher_logit_scale=teacher_head.scale,
            student_softcap=head.softcap,
            teacher_softcap=teacher_head.softcap,
            **options,
        )


@dataclass(frozen=True)
class StepLoss:
    """The loss summed over a micro-batch's tokens, and sums over the same tokens that are worth logging."""

    total: Tensor
    sums: dict[str, Tensor]


def distillation_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, config: SDFTConfig, autocast: torch.dtype | None
) -> StepLoss:
    """Self-distillation: the summed divergence between the student and the teacher who sees the demonstration."""
    out = divergence(
        student,
        teacher,
        batch,
        autocast=autocast,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.loss_temperature,
        reduction="sum",
        max_chunk_bytes=config.max_chunk_bytes,
    )
    entropies = {"student_entropy": out.student_entropy.sum(), "teacher_entropy": out.teacher_entropy.sum()}
    return StepLoss(out.loss, entropies)


def demonstration_loss(
    student: PreTrainedModel, batch: Batch, config: SDFTConfig, autocast: torch.dtype | None
) -> StepLoss:
    """The summed cross-entropy of the demonstration's tokens: the baseline, supervised fine-tuning.

    The logits of a chunk are made again in the backward pass, so that no more than a chunk of them is ever there.
    """
    with _autocast(student.device, autocast):
        hidden = hidden_states(student, batch["input_ids"], batch["positions"])
    head = find_head(student).to(autocast)
    hidden = hidden.to(head.weight.dtype)
    budget = config.max_chunk_bytes or 256 * 2**20
    chunk = max(1, budget // (4 * head.weight.shape[0]))
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, labels in zip(hidden.split(chunk), batch["labels"].split(chunk), strict=True):
        total = total + checkpoint(_cross_entropy, head, states, labels, use_reentrant=False)
    return StepLoss(total, {})


def _cross_entropy(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head.logits(hidden).float(), labels, reduction="sum")


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
