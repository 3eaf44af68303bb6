"""How models are run: within their forward pass, in evaluation mode, in mixed precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

# What TRL's trainers with the fused loss need as well.
from sdft_kernels.integrations.models import Result as Result
from sdft_kernels.integrations.models import as_forward_of as as_forward_of


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
