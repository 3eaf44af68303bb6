"""A loss as a torch operator: what the losses here share of their fake kernels, and their autograd formula.

The gradient of Σ w·L is known when the forward pass ends; the backward pass multiplies it by the upstream
scalar. Only reduction="none" with a trainable head computes it in the backward pass, since each token has its
own upstream gradient there.

A loss's function takes the trained hidden states, head and bias first, and names among its other arguments those of
`Wanted`, `token_weight`, `reduction`, `backend` and `operands`. It returns the loss first. Last it returns the
gradients of the first three, and the factor that these are still to be multiplied with; what is not wanted is empty.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import astuple
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import registration
from sdft_kernels._compat import backward_runs_again, failing_when_differentiated
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.select import select
from sdft_kernels.chunk_loop import Wanted
from sdft_kernels.tokens import is_plain, on_its_device, reads_are_free

#: The function of each operator here, for those who follow what it does.
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def differentiable(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator `sdft_kernels::name`, which runs `function`, and `fake` where there are no values."""
    operator = registration.operator(name, function)
    torch.library.register_fake(operator)(fake)
    torch.library.register_autograd(operator, _backward, setup_context=partial(_setup_context, operator))
    IMPLEMENTATIONS[operator] = function
    return operator


@cache
def arguments_of(operator: Any) -> list[str]:
    """The names of an operator's arguments, in order."""
    return list(inspect.signature(IMPLEMENTATIONS[operator]).parameters)


def wanted_gradients(reduction: str, *trained: Tensor | None) -> Wanted:
    """What the forward pass has to compute for hidden states, head and bias."""
    with_graph = torch.is_grad_enabled()
    wanted = Wanted(*(with_graph and tensor is not None and tensor.requires_grad for tensor in trained))
    return Wanted(False, False, False) if gradients_deferred(reduction, *astuple(wanted)[1:]) else wanted


def gradients_deferred(reduction: str, trainable_weight: bool, trainable_bias: bool) -> bool:
    """Whether gradients have to wait for the backward pass: each token's upstream gradient enters the head's."""
    return reduction == "none" and (trainable_weight or trainable_bias)


def empty_gradients(given: dict[str, Any], hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last four results of a loss's fake kernel."""
    dtypes = Dtypes.of(given["operands"], weight.dtype, hidden.device)
    return (
        hidden.new_empty(hidden.shape if given["wants_hidden"] else (0,)),
        hidden.new_empty(weight.shape if given["wants_weight"] else (0,), dtype=dtypes.head_gradient),
        hidden.new_empty(weight.shape[0] if given["wants_bias"] else 0, dtype=dtypes.wide),
        hidden.new_empty((), dtype=dtypes.wide),
    )


def _setup_context(operator: Any, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.operator, ctx.count = operator, len(inputs)
    given = dict(zip(arguments_of(operator), inputs, strict=True))
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in inputs[:3]]
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
    return (*gradients, *(None,) * (ctx.count - len(gradients)))


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
    given["wants_hidden"], given["wants_weight"], given["wants_bias"] = needed
    *gradients, missing_factor = ctx.operator(**given)[-4:]
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
