"""A model's output head: found in its configuration, and checked against the model's own logits.

A causal language model is a backbone and an output head, z = scale * (h W^T + b), soft-capped where the model says so.
`find_head` reads that description from the model's configuration, and `check_head` compares it with the model's own
logits before anything is trained on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.errors import TrainingError, UsageError
from sdft.forward import Result, as_forward_of, autocasting, evaluating
from sdft.launch import is_noise
from sdft.models.adapters import is_adapted
from sdft_kernels.integrations.models import logit_settings


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap(scale * (hidden @ weight.T + bias)), with softcap(y) = c tanh(y / c)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits themselves, for the self-check and for a few positions at a time."""
        return self.shaped(nn.functional.linear(hidden, self.weight, self.bias))

    def shaped(self, product: Tensor) -> Tensor:
        """Logits of what hidden states, weight and bias make: scaled and soft-capped."""
        logits = self.scale * product
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def find_head(model: PreTrainedModel) -> Head:
    """The head that the model's configuration describes."""
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if is_adapted(layer) and not hasattr(layer, "modules_to_save"):
        raise UsageError(
            f"{type(model).__name__} has an adapter in its output head, whose weight is not one matrix then; leave out "
            "of the adapter (target_modules, trainable_token_indices) the head, and embeddings that it is tied to, or "
            "name them in modules_to_save"
        )
    if not isinstance(weight, Tensor):
        raise TrainingError(f"{type(model).__name__} has no linear output head, and the loss needs one")
    return Head(weight, getattr(layer, "bias", None), *logit_settings(model.config.get_text_config()))


def backbone(model: PreTrainedModel) -> nn.Module:
    """What is below the head; Llama 4's text model does not say so under the usual name."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def at_head(model: PreTrainedModel, function: Callable[[Head], Result]) -> Result:
    """What `function` makes of the head, run as the head's forward pass: a sharded head is whole only there."""
    layer = cast(nn.Module, model.get_output_embeddings())
    return as_forward_of(layer, layer, lambda: function(find_head(model)))


def hidden_states(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Tensor:
    """The hidden states (N, H) that the head would be given at the flat `positions` of a right-padded batch."""
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, positions)


@torch.no_grad()
def check_head(model: PreTrainedModel, tokens: Sequence[int], autocast: torch.dtype | None = None) -> None:
    """Refuse a model whose own logits on a few tokens are not those of the head that `find_head` describes.

    One is refused, too, in which a token sees those after it: padding on the right, without a mask, would change it.
    `autocast` is the type of mixed-precision products.
    """
    if backbone(model) is model:
        raise TrainingError(f"{type(model).__name__} has no backbone apart from its head, and the loss needs one")
    input_ids = torch.tensor([list(tokens)], device=model.device)
    own = torch.arange(len(tokens), device=model.device)
    with evaluating(model), autocasting(model.device, autocast):
        expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
        hidden = hidden_states(model, input_ids, own)
        followed = [hidden_states(model, nn.functional.pad(input_ids, (0, 8), value=v), own) for v in (0, 1)]
    head = find_head(model)
    tolerance = max(1e-4, 4 * torch.finfo(autocast or head.weight.dtype).eps)
    if (change := _change(*followed)) > tolerance:
        raise TrainingError(
            f"{type(model).__name__} lets a token see those after it: its hidden states move by {change:.2g} of the "
            "largest when these change, and the loss needs a causal model"
        )
    if hidden.shape[-1] != head.weight.shape[-1]:
        raise TrainingError(
            f"{type(model).__name__} has hidden states of size {hidden.shape[-1]} and a head for size "
            f"{head.weight.shape[-1]}, with something between them that the loss cannot reproduce"
        )
    bias = None if head.bias is None else head.bias.float()
    measured = replace(head, weight=head.weight.float(), bias=bias).logits(hidden.float())
    if expected.shape != measured.shape:
        raise TrainingError(
            f"{type(model).__name__} has logits of shape {tuple(expected.shape)} where its head gives "
            f"{tuple(measured.shape)}, so that the loss cannot be computed from its hidden states"
        )
    difference = _change(expected, measured)
    if not difference <= tolerance:  # a NaN is refused too
        raise TrainingError(
            f"{type(model).__name__} has logits that its head (scale {head.scale:g}, soft-cap {head.softcap}, bias "
            f"{'yes' if head.bias is not None else 'no'}) does not reproduce: they differ by {difference:.2g} of the "
            f"largest logit, where {tolerance:.2g} is rounding; the loss would not be this model's"
        )


@torch.no_grad()
def check_same_in_training(model: PreTrainedModel, tokens: Sequence[int], autocast: torch.dtype | None = None) -> None:
    """Refuse a model that computes something else in training, as dropout has it: the teacher would be met in noise."""
    input_ids = torch.tensor([list(tokens)], device=model.device)
    own = torch.arange(len(tokens), device=model.device)
    with evaluating(model), _without_zeros(model), autocasting(model.device, autocast):
        expected = hidden_states(model, input_ids, own)
        model.train()
        change = _change(expected, hidden_states(model, input_ids, own))
    if not change <= max(1e-4, 4 * torch.finfo(expected.dtype).eps):
        settings = {k: v for k, v in model.config.get_text_config().to_dict().items() if is_noise(k, v)}
        raise TrainingError(
            f"{type(model).__name__} computes something else in training: its hidden states move by {change:.2g} of "
            "the largest, and the loss needs a model without dropout and noise "
            f"(its configuration has {', '.join(f'{k} {v}' for k, v in settings.items()) or 'no setting for it'})"
        )


@contextlib.contextmanager
def _without_zeros(model: nn.Module) -> Iterator[None]:
    """Small numbers in place of weights that are all 0 before they train, as an adapter's are, and hide the others."""
    zeros = [parameter for parameter in model.parameters() if parameter.requires_grad and not parameter.any()]
    for parameter in zeros:
        parameter.normal_(std=0.02, generator=torch.Generator(parameter.device).manual_seed(0))
    try:
        yield
    finally:
        for parameter in zeros:
            parameter.zero_()


def _change(from_: Tensor, to: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    from_, to = from_.float(), to.float()
    return ((to - from_).abs().max() / from_.abs().max().clamp_min(1e-6)).item()
