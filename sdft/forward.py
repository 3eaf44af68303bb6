"""Runs the loss as if it were the model's forward pass, and switches models to evaluation mode.

DDP and FSDP prepare parameters and collect gradients around a module's forward pass. The loss is not the model's own
forward pass: it takes the backbone's hidden states and the head's weight. It is therefore run as the forward pass of
the model, and the products with the head as the forward pass of the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without what is for training alone: noise, dropout, activation checkpointing.

    Afterwards each of its modules is in the mode that it had.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def autocasting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
