"""The loss as a torch operator: its schema, its fake kernel and its autograd formula.

The gradient of Σ w·L is known when the forward pass ends; the backward pass multiplies it by the upstream
scalar. Only reduction="none" with a trainable head computes it in the backward pass, since each token has its
own upstream gradient there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import registration
from sdft_kernels._compat import backward_runs_again, failing_when_differentiated
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.select import select
from sdft_kernels.chunk_loop import Side, Wanted, check_labels, run_chunks, token_weights
from sdft_kernels.options import LossInputs, LossOptions
from sdft_kernels.tokens import LiveTokens, TokenRows, is_plain, on_its_device, reads_are_free

OpResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@registration.flat
def forward(
    given: LossInputs,
    options: LossOptions,
    operands: torch.dtype,
    wanted: Wanted,
) -> OpResult:
    """Returns the loss, five vectors over tokens, the gradients of hidden states, head and bias, and the factor that
    these gradients are still to be multiplied with.

    What is not wanted comes back empty. `operands` is the dtype of the products' operands.
    """
    hidden, labels, old_logprobs = given.student_hidden, given.labels, given.old_logprobs
    dtypes = Dtypes.of(operands, given.student_weight.dtype, hidden.device)
    live = LiveTokens(given.token_weight, hidden.shape[0])
    weight, missing_factor = token_weights(live, given.token_weight, hidden, options.reduction, dtypes)
    if labels is not None:
        labels = live.take(labels).contiguous()
        check_labels(labels, options.compared(given.student_weight, given.teacher_weight))
    if old_logprobs is not None:
        old_logprobs = live.take(old_logprobs).to(dtypes.wide).contiguous()
    loss, student_entropy, teacher_entropy = (hidden.new_empty(live.count, dtype=dtypes.wide) for _ in range(3))
    logprobs = [None if labels is None else torch.empty_like(loss) for _ in range(2)]
    rows = TokenRows(weight, labels, old_logprobs, loss, student_entropy, teacher_entropy, *logprobs)
    # Autocast has had its say in `operands`; from here on it would lower the softmax arithmetic as well.
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        gradients = run_chunks(
            Side(hidden, given.student_weight, given.student_bias),
            Side(given.teacher_hidden, given.teacher_weight, given.teacher_bias),
            live,
            rows,
            options,
            dtypes,
            wanted,
        )
    weighted = live.spread(rows.weight * loss)
    student_logprob, teacher_logprob = (loss.new_empty(0) if v is None else live.spread(v) for v in logprobs)
    return (
        (weighted if options.reduction == "none" else weighted.sum()) * missing_factor,
        live.spread(loss),
        live.spread(student_entropy),
        live.spread(teacher_entropy),
        student_logprob,
        teacher_logprob,
        gradients.hidden,
        gradients.weight.to(dtypes.head_gradient),
        gradients.bias,
        missing_factor,
    )


fused_linear_divergence_op = registration.operator("fused_linear_divergence", forward)

#: The operator's arguments, in order.
ARGUMENTS = list(inspect.signature(forward).parameters)


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(ARGUMENTS, values, strict=True))


@torch.library.register_fake(fused_linear_divergence_op)
def _fake(*values: Any) -> OpResult:
    given = _named(values)
    hidden, weight = given["student_hidden"], given["student_weight"]
    dtypes = Dtypes.of(given["operands"], weight.dtype, hidden.device)
    wide = dtypes.wide
    tokens = hidden.shape[0]
    labelled = 0 if given["labels"] is None else tokens
    return (
        hidden.new_empty((tokens,) if given["reduction"] == "none" else (), dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(labelled, dtype=wide),
        hidden.new_empty(labelled, dtype=wide),
        hidden.new_empty(hidden.shape if given["hidden"] else (0,)),
        hidden.new_empty(weight.shape if given["weight"] else (0,), dtype=dtypes.head_gradient),
        hidden.new_empty(weight.shape[0] if given["bias"] else 0, dtype=wide),
        hidden.new_empty((), dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: OpResult) -> None:
    ctx.set_materialize_grads(False)
    given = _named(inputs)
    parameters = (given["student_hidden"], given["student_weight"], given["student_bias"])
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    ctx.per_token = given["reduction"] == "none"
    ctx.backend, ctx.operands = given["backend"], given["operands"]
    ctx.deferred = gradients_deferred(given["reduction"], *ctx.needs_input_grad[1:3])
    if ctx.deferred:
        ctx.tensor_names = [name for name, value in given.items() if isinstance(value, Tensor)]
        ctx.save_for_backward(*(given[name] for name in ctx.tensor_names))
        ctx.options = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    else:
        ctx.save_for_backward(*output[-4:])


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if grad_loss is not None:
        with torch.no_grad():
            gradients = _deferred_gradients(ctx, grad_loss) if ctx.deferred else _ready_gradients(ctx, grad_loss)
    if grad_loss is not None and torch.is_grad_enabled():  # create_graph=True
        sources = (grad_loss, *ctx.saved_tensors)
        gradients = tuple(None if gradient is None else _not_twice(gradient, *sources) for gradient in gradients)
    return (*gradients, *(None,) * (len(ARGUMENTS) - len(gradients)))


def _ready_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """What the forward pass computed, times the upstream gradient."""
    hidden, weight, bias, missing_factor = (saved.detach() for saved in ctx.saved_tensors)
    factor = grad_loss * missing_factor
    gradients = (
        # Where each token has its own upstream gradient, the head is frozen.
        (hidden, factor.unsqueeze(1) if ctx.per_token else factor),
        (weight, factor),
        (bias, factor),
    )
    return tuple(
        _scaled(ctx, gradient, factor, dtype) if needed else None
        for (gradient, factor), dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    )


def _deferred_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of Σ g·w·L, computed now that the upstream gradients g are known."""
    tensors = (saved.detach() for saved in ctx.saved_tensors)
    given = {**ctx.options, **dict(zip(ctx.tensor_names, tensors, strict=True))}
    weight = given["token_weight"]
    given["token_weight"] = grad_loss if weight is None else weight * grad_loss
    given["reduction"] = "sum"
    needed = ctx.needs_input_grad[:3]
    given["hidden"], given["weight"], given["bias"] = needed
    *gradients, missing_factor = fused_linear_divergence_op(**given)[-4:]
    return tuple(
        _scaled(ctx, gradient, missing_factor, dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)
    )


def scale(values: Tensor, factor: Tensor, backend: str, operands: torch.dtype) -> None:
    with on_its_device(values):
        select(backend, values.device, operands).scale(values, factor)


#: It is an operator so that a dispatch mode, which sees operators alone, sees a kernel's launch too.
scale_op = registration.operator("scale_", scale, mutates_args=("values",))


def _scaled(ctx: Any, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor in `dtype`, in the gradient's own memory where it fits and no backward pass comes again."""
    asked_again = backward_runs_again()
    of_each_token = factor.dim() > 0
    if not of_each_token:
        if reads_are_free(factor) and factor.item() == 1:
            return gradient.to(dtype, copy=asked_again)
        factor = factor.view(1)  # else a CUDA kernel would first round it to the gradient's dtype
    if gradient.dtype != dtype and gradient.device.type != "cpu":
        # Both in one pass over a head's worth of memory; on the CPU torch would put the product in between anyway.
        return torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype))
    if asked_again or not is_plain(gradient) or not gradient.is_contiguous():
        return (gradient * factor).to(dtype)
    if of_each_token:
        gradient.mul_(factor)
    else:
        scale_op(gradient, factor, ctx.backend, ctx.operands)
        torch.autograd.graph.increment_version(gradient)  # as torch's own operations in place do
    return gradient.to(dtype)


def _not_twice(gradient: Tensor, *sources: Tensor) -> Tensor:
    """The same gradient, which raises torch's own error when it is differentiated: there is no second derivative here.

    The error is attached to everything that the gradient depends on. Otherwise `torch.autograd.functional` would find
    no path from there to the gradient, and take the derivative to be 0.
    """
    message = "trying to differentiate twice a function that was marked with @once_differentiable"
    return failing_when_differentiated(message, gradient.detach().requires_grad_(), *sources)


def gradients_deferred(reduction: str, trainable_weight: bool, trainable_bias: bool) -> bool:
    """Whether gradients have to wait for the backward pass: each token's upstream gradient enters the head's."""
    return reduction == "none" and (trainable_weight or trainable_bias)


torch.library.register_autograd(fused_linear_divergence_op, _backward, setup_context=_setup_context)
