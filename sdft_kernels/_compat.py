"""Every private or unstable interface of torch and triton that the kernels use, each with the reason for it.

tests/test_compat.py says in a sentence which of them a new release has moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor


def leave_uncompiled(function: Callable[..., Any]) -> None:
    """Have torch's compiler run the function, and what it calls, as it is. The public `torch.compiler.disable` imports
    the compiler, which takes seconds and 150 MiB. Under a torch without this interface nothing happens: results are the
    same, and the compiler may then spend time on code of ours."""
    with contextlib.suppress(AttributeError):
        frames = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(cast(FunctionType, function).__code__, frames._FrameExecStrategy(skip, skip))


def backward_runs_again() -> bool:
    """Whether the backward pass under way was asked to keep its graph. No public function tells, and a gradient that
    is asked for again must not be scaled in its own memory."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def failing_when_differentiated(message: str, *tensors: Tensor) -> Tensor:
    """Returns the first tensor with a graph node that raises `message` if anyone differentiates it with respect to any
    of `tensors`. It is what torch's own `once_differentiable` does, but that decorator is for an `autograd.Function`,
    and an operator's backward is none."""
    return torch._C._functions.DelayedError(message.encode(), len(tensors))(*tensors)[0]


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fails on the device where the condition is false. The public `torch._check` and `assert` wait for its value."""
    torch._assert_async(condition, message)


def waits_for_itself(kind: type[Tensor]) -> bool:
    """Whether this is an `AsyncCollectiveTensor`: the result of a collective, on which any operator first waits. The
    class is private, so it is known by its method."""
    return hasattr(kind, "trigger_wait")


def stands_for_others(kind: type[Tensor]) -> bool:
    """Whether these tensors wrap others, as a DTensor wraps its shard. torch's compiler knows such classes by the same
    method, and there is no public question."""
    return hasattr(kind, "__tensor_flatten__") and not waits_for_itself(kind)


def under_grad(tensor: Tensor) -> bool:
    """Whether torch.func.grad or its like differentiates the tensor. No public function tells."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def under_vmap_with_gradient(tensor: Tensor) -> bool:
    """Whether torch.func.vmap has wrapped a tensor that takes gradients; what wraps it says that it takes none."""
    functorch = torch._C._functorch
    if not functorch.is_batchedtensor(tensor):
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels. The variable TRITON_INTERPRET is the documented way to ask for it,
    and triton reads it into this setting when it is imported; where triton is missing, ImportError."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
