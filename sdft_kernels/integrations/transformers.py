"""The loss that a causal language model of transformers makes of `labels`, without logits: for anyone's Trainer.

    from sdft_kernels.integrations.transformers import fused_causal_lm_loss

    fused_causal_lm_loss(model)

Such a model multiplies its hidden states with its head and calls its `loss_function` with the logits. Here the head
passes the hidden states on, and the loss function makes the loss of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from sdft_kernels.integrations.models import View, check_adapters, check_head, cross_entropy, text_model

#: By how much the loss may differ from the model's own in float32, when that is checked.
TOLERANCE = 1e-4


class FusedCausalLMLoss:
    """A model's `loss_function`: of the hidden states that its head has passed on, and else of logits as before."""

    def __init__(self, in_evaluation: bool) -> None:
        self.in_evaluation = in_evaluation
        self.awaits_view = False
        self.view: View | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **named: Any,
    ) -> Tensor:
        """`ForCausalLMLoss`, whose arguments these are: the mean, or the sum divided by `num_items_in_batch`."""
        view, self.view = self.view, None
        if view is None and self.awaits_view:
            raise ValueError("the model has made logits without its output head's forward, where the loss takes over")
        if view is None:
            items: Any = num_items_in_batch  # a number is taken, though its type is not named
            return ForCausalLMLoss(logits, labels, vocab_size, items, ignore_index, shift_labels, **named)
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.numel() != view.hidden[..., 0].numel():
            raise ValueError(
                f"labels have the shape {tuple(shift_labels.shape)} and hidden states {tuple(view.hidden.shape)}; each "
                "token needs a label, and logits_to_keep its default"
            )
        shift_labels = shift_labels.to(view.hidden.device).reshape(view.hidden.shape[:-1])
        counted = shift_labels != ignore_index
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = cross_entropy(view.at(counted), shift_labels[counted], reduction=reduction)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    @contextmanager
    def given_hidden_states(self, model: Any) -> Iterator[None]:
        """While this lasts, the model's head passes its hidden states to the loss, and gives logits of no tokens."""
        head = View.of(model, torch.empty(0)).head
        own = head.__dict__.get("forward")

        def pass_on(hidden: Tensor) -> Tensor:
            self.view = View.of(model, hidden)
            return hidden[..., :0]

        head.forward, self.awaits_view = pass_on, True
        try:
            yield
        finally:
            self.view, self.awaits_view = None, False
            del head.forward
            if own is not None:
                head.forward = own


def fused_causal_lm_loss(model: Any, in_evaluation: bool = False) -> Callable[[], None]:
    """Have a causal language model make the loss of `labels` without logits. Returns a function that undoes it.

    The loss is that of transformers' `ForCausalLMLoss`, with its `num_items_in_batch`, `ignore_index` and
    `shift_labels`, and in float32; what a model adds to it, as mixtures of experts do, stays. Two things differ: the
    outputs' `logits` are None, and the mean over no token is 0 where transformers has nan. A call without `labels` has
    logits as before, and so has `generate`.

    Call this before the model is given to a Trainer, DDP or FSDP. An adapter may be there or come later.

    Args:
        model: a model of transformers, or peft's around one.
        in_evaluation: whether it is so in evaluation mode too. A Trainer with `compute_metrics` needs logits there.

    Raises:
        ValueError: the model's loss is another, or its logits are not its hidden states times one matrix.
        RuntimeError: this was called before, or something else has replaced the model's `forward`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).train()
        >>> undo = fused_causal_lm_loss(model)
        >>> tokens = torch.tensor([[3, 1, 4, 1]])
        >>> model(tokens, labels=tokens).logits is None
        True
        >>> undo()
    """
    model = text_model(model)
    name, own = type(model).__name__, type(model).forward
    if isinstance(getattr(model, "loss_function", None), FusedCausalLMLoss):
        raise RuntimeError(f"{name} has the fused loss already")
    if "forward" in vars(model):
        raise RuntimeError(
            f"{name} has another forward than its class, as TRL, Liger, torch.compile, a device_map and a Trainer's "
            "precision replace it; call fused_causal_lm_loss before them"
        )
    if (
        getattr(model, "loss_function", None) is not ForCausalLMLoss
        or "labels" not in inspect.signature(own).parameters
    ):
        raise ValueError(f"{name} does not compute transformers' ForCausalLMLoss of its labels, which is fused here")
    check_head(model)
    expected = _loss_of_few_tokens(model)
    fused = FusedCausalLMLoss(in_evaluation=True)
    model.loss_function = fused
    model.forward = MethodType(_without_logits(own), model)
    forward = model.forward

    def undo() -> None:
        if getattr(model, "loss_function", None) is fused:
            model.loss_function = ForCausalLMLoss
        if vars(model).get("forward") is forward:
            del model.forward

    try:
        found = _loss_of_few_tokens(model)
        tolerance = max(TOLERANCE, 4 * torch.finfo(model.dtype).eps)
        if not (found - expected).abs() <= tolerance * expected.abs():
            raise ValueError(f"its loss is {expected.item():.6g}, and that of its hidden states {found.item():.6g}")
    except Exception as error:  # a model's forward, which without logits may raise anything
        undo()
        raise ValueError(
            f"{name} makes its loss of labels in another way than from its head's output: {error}"
        ) from error
    fused.in_evaluation = in_evaluation
    return undo


def _without_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's method `forward` that makes no logits where it is given labels and its loss is the fused one.

    It is bound to the model and closes over nothing of it, so that a deep copy of the model is whole.
    """
    signature = inspect.signature(forward)

    @wraps(forward)
    def fused(self: Any, *positional: Any, **named: Any) -> Any:
        loss = self.loss_function
        wanted = isinstance(loss, FusedCausalLMLoss) and (self.training or loss.in_evaluation)
        if not wanted or signature.bind(self, *positional, **named).arguments.get("labels") is None:
            return forward(self, *positional, **named)
        check_adapters(self)
        with loss.given_hidden_states(self):
            output = forward(self, *positional, **named)
        if isinstance(output, tuple):
            return (output[0], None, *output[2:])
        return replace(output, logits=None)

    return fused


@torch.no_grad()
def _loss_of_few_tokens(model: Any) -> Any:
    """The outputs' loss of six tokens, one of which has no label."""
    tokens = torch.arange(6, device=model.device)[None] % model.config.get_text_config().vocab_size
    labels = torch.where(torch.arange(6, device=model.device) == 2, -100, tokens)
    training = model.training
    model.eval()
    try:
        return model(input_ids=tokens, labels=labels, use_cache=False).loss
    finally:
        model.train(training)
