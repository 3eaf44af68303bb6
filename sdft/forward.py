"""Computing something else in a module's forward pass, so that what is wrapped around the module sees it.

DDP and FSDP prepare parameters and collect gradients around a module's forward pass. The loss is none of the forward
passes that a model comes with: it needs the backbone's hidden states and the head's weight. It is therefore run as
the forward pass of the model, and the products with the head as the forward pass of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Result = TypeVar("Result")


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
