"""What a transformers model is to the loss: hidden states and an output head, which its configuration describes.

DDP, FSDP and DeepSpeed prepare parameters and collect gradients around a module's forward pass. The loss is not a
model's own forward pass: it takes the backbone's hidden states and the head's weight. It is therefore run as the
forward pass of the model, and the products with a head as the forward pass of that head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdft_kernels import checks
from sdft_kernels.arguments import LEAST_SHARE
from sdft_kernels.cross_entropy import fused_linear_cross_entropy
from sdft_kernels.fused_linear import fused_linear_divergence
from sdft_kernels.outputs import DivergenceOutput, TopkDivergenceOutput
from sdft_kernels.scoring import linear_token_stats
from sdft_kernels.top_scoring import linear_topk_logprobs
from sdft_kernels.topk import fused_linear_topk_divergence

Result = TypeVar("Result")

#: What configurations call the soft-cap of the logits: Gemma and most others, RecurrentGemma, xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: What they call a factor of the logits: Cohere, Muse, Falcon H1.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def as_forward_of(wrapper: nn.Module, module: nn.Module, function: Callable[[], Result]) -> Result:
    """Run `function` as the forward pass of `wrapper`, so that DDP or FSDP around `module` sees and prepares it.

    With FSDP2 a wrapper is the module itself, with hooks. They find tensors in what `function` returns where it is a
    tensor, or a tuple, list or dictionary of such.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    def redirected() -> Result:
        restore()
        return function()

    module.forward = redirected
    try:
        return wrapper()
    finally:
        restore()


def logit_settings(config: Any) -> tuple[float, float | None]:
    """The factor and the soft-cap of the logits that a text model's configuration describes."""
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    scale = scale * scaling if config.model_type == "hyperclovax" else scale / scaling  # Granite and MiniCPM3 divide
    return scale, next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)


def text_model(model: Any) -> Any:
    """The transformers model itself, with an adapter in its layers where peft has put one there."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def backbone(model: Any) -> nn.Module:
    """What is below the head, with whatever turns images into hidden states."""
    model = text_model(model)
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


@dataclass(frozen=True)
class View:
    """Hidden states (N, H) or (B, K, H) of a model, and the output head that would make logits of them."""

    hidden: Tensor
    head: nn.Module
    scale: float
    softcap: float | None

    @staticmethod
    def of(model: Any, hidden: Tensor) -> View:
        """The view with the head that the model has now: an adapter may have a head of its own."""
        head = text_model(model).get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # peft's copy of the layer, which trains, and the layer before
            active = [name for name in head.active_adapters if name in head.modules_to_save]
            head = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
        return View(hidden, head, *logit_settings(text_model(model).config.get_text_config()))

    def at(self, mask: Tensor) -> View:
        """The view of the tokens (N, H) that a mask (B, K) names."""
        return View(self.hidden[mask], self.head, self.scale, self.softcap)

    def logits(self) -> Tensor:
        """The logits themselves, in float32: for `check_head`, on a few tokens."""
        weight, bias = _weights(self.head)
        bias = None if bias is None else bias.float()
        logits = self.scale * nn.functional.linear(self.hidden.float(), weight.float(), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def topk_divergence(
    student: View, teacher: View, beta: float, k: int, temperature: float, **options: Any
) -> TopkDivergenceOutput:
    """`divergence` on the student's K likeliest tokens, found before the loss; `options` as in
    `fused_linear_topk_divergence`."""

    def compare() -> TopkDivergenceOutput:
        student_weight, student_bias = _weights(student.head)
        teacher_weight, teacher_bias = _weights(teacher.head)
        dtype = shared_dtype(student.hidden, student_weight, teacher.hidden, teacher_weight)
        hidden, weight = student.hidden.to(dtype), student_weight.to(dtype)
        own: dict[str, Any] = {"bias": student_bias, "logit_scale": student.scale, "softcap": student.softcap}
        ids = linear_topk_logprobs(hidden, weight, k, **own).ids
        taught = linear_topk_logprobs(
            teacher.hidden.to(dtype),
            teacher_weight.to(dtype),
            ids=ids,
            bias=teacher_bias,
            logit_scale=teacher.scale,
            softcap=teacher.softcap,
            temperature=temperature,
        )
        return fused_linear_topk_divergence(
            hidden, weight, ids, taught.logprobs, temperature=temperature, **own, **named(beta), **options
        )

    return _at_heads((student.head, teacher.head), compare)


def divergence(student: View, teacher: View, beta: float, **options: Any) -> DivergenceOutput:
    """The divergence of two views by the name that TRL and Liger give it: see `named`. `options` as there."""

    def compare() -> DivergenceOutput:
        student_weight, student_bias = _weights(student.head)
        teacher_weight, teacher_bias = _weights(teacher.head)
        dtype = shared_dtype(student.hidden, student_weight, teacher.hidden, teacher_weight)
        return fused_linear_divergence(
            student.hidden.to(dtype),
            student_weight.to(dtype),
            teacher.hidden.to(dtype),
            teacher_weight.to(dtype),
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_logit_scale=student.scale,
            teacher_logit_scale=teacher.scale,
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            **named(beta),
            **options,
        )

    return _at_heads((student.head, teacher.head), compare)


def cross_entropy(view: View, labels: Tensor, **options: Any) -> Tensor:
    """The cross-entropy of a view (N, H) with labels (N,); `options` as in `fused_linear_cross_entropy`."""

    def compare() -> Tensor:
        weight, bias = _weights(view.head)
        dtype = shared_dtype(view.hidden, weight)
        return fused_linear_cross_entropy(
            view.hidden.to(dtype),
            weight.to(dtype),
            labels,
            bias=bias,
            logit_scale=view.scale,
            softcap=view.softcap,
            **options,
        ).loss

    return _at_heads((view.head,), compare)


def logprobs(view: View, labels: Tensor, temperature: float) -> Tensor:
    """The log-probability of each label, of the shape of the labels; differentiable where gradients are recorded."""

    flat = View(view.hidden.flatten(0, -2), view.head, view.scale, view.softcap)
    if torch.is_grad_enabled():
        return -cross_entropy(flat, labels.flatten(), temperature=temperature, reduction="none").view_as(labels)

    def score() -> Tensor:
        weight, bias = _weights(view.head)
        dtype = shared_dtype(flat.hidden, weight)
        stats = linear_token_stats(
            flat.hidden.to(dtype),
            weight.to(dtype),
            labels.flatten(),
            bias=bias,
            temperature=temperature,
            logit_scale=view.scale,
            softcap=view.softcap,
        )
        assert stats.logprob is not None
        return stats.logprob.view_as(labels)

    return _at_heads((view.head,), score)


def logprobs_at(view: View, labels: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """`logprobs` of the labels (B, K) that a mask (B, K) names, and 0 for the others, which are not projected."""
    found = logprobs(view.at(mask), labels[mask], temperature)
    return found.new_zeros(labels.shape).masked_scatter(mask, found)


def named(beta: float, name: str = "beta") -> dict[str, Any]:
    """TRL's and Liger's β (TRL's α too) as arguments of the loss: 0 forward KL, 1 reverse KL, between them the JSD.

    ValueError, with the name that it has there, for what is none of these.
    """
    if beta in (0, 1):
        return {"divergence": "reverse_kl" if beta else "forward_kl"}
    share = checks.number(name, beta)
    if not LEAST_SHARE <= share <= 1 - LEAST_SHARE:
        raise ValueError(
            f"{name} is {share!r}; it may be 0 (forward KL), 1 (reverse KL), or for the JSD from {LEAST_SHARE:g} to "
            f"{1 - LEAST_SHARE:g}, since nearer the ends float32 hardly tells the mixture from one of the models"
        )
    return {"divergence": "jsd", "beta": share}


def check_adapters(model: Any) -> None:
    """ValueError for an adapter that makes other logits than the hidden states and the head's own weight give."""
    name = type(text_model(model)).__name__
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            f"{name} has an adapter that learns a prompt, which the backbone's hidden states know nothing of"
        )
    if hasattr(text_model(model).get_output_embeddings(), "base_layer"):
        raise ValueError(f"{name} has an adapter in its output head; target_modules must leave out the head")


def check_head(
    model: Any, wrapper: nn.Module | None = None, precision: AbstractContextManager[Any] | None = None
) -> None:
    """ValueError for a model whose logits are not its backbone's hidden states times one matrix, as `View` has them.

    `wrapper` is around a model that is prepared for training already; `precision` is what both compute in.
    """
    check_adapters(model)
    name, bare = type(text_model(model)).__name__, text_model(model)
    head = bare.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor) or backbone(model) is bare:
        raise ValueError(f"{name} has no linear output head apart from its backbone, and the fused loss needs one")
    wrapper = model if wrapper is None else wrapper
    tokens = torch.arange(4, device=bare.device)[None] % bare.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), precision or nullcontext():
            mixed = torch.is_autocast_enabled(bare.device.type)
            dtype = torch.get_autocast_dtype(bare.device.type) if mixed else bare.dtype
            expected = wrapper(input_ids=tokens, use_cache=False).logits.float()
            measured = as_forward_of(
                wrapper, model, lambda: View.of(model, hidden_states(model, input_ids=tokens)).logits()
            )
    finally:
        model.train(training)
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)
    if expected.shape != measured.shape or not (measured - expected).abs().max() <= tolerance * expected.abs().max():
        raise ValueError(
            f"{name} has logits that its hidden states and its output head do not give, with the factor and the "
            "soft-cap that its configuration describes"
        )


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """The hidden states (B, L, H) below the head."""
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


def _at_heads(heads: tuple[nn.Module, ...], function: Callable[[], Result]) -> Result:
    """What `function` makes of the heads, run as their forward pass: a sharded head is whole only there."""
    first, *others = dict.fromkeys(heads)
    return as_forward_of(first, first, lambda: _at_heads(tuple(others), function) if others else function())


def _weights(head: Any) -> tuple[Tensor, Tensor | None]:
    bias = getattr(head, "bias", None)
    return whole(head.weight), None if bias is None else whole(bias)


def whole(parameter: Any) -> Tensor:
    """A parameter's values, gathered where it is still a shard of FSDP2's."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def shared_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest type among the tensors, in which they are multiplied where there is no autocast."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
