"""Which back-end does the work."""

from __future__ import annotations

import importlib.util

import torch

from sdft_kernels.backends import torch as plain
from sdft_kernels.backends.cpu import backend as compiled
from sdft_kernels.backends.cpu import library
from sdft_kernels.backends.interface import Backend

#: What `backend` may be.
BACKENDS = ("auto", "torch", "compiled", "triton")


def select(name: str, device: torch.device, operands: torch.dtype) -> Backend:
    """The back-end called `name`, for products of operands in this dtype.

    "auto" takes Triton on CUDA where it is installed, and the compiled kernels on a CPU where they were built.
    Otherwise, and in float64, it takes plain torch.
    """
    narrow = name == "auto" and operands != torch.float64
    if name == "triton" or (narrow and device.type == "cuda" and importlib.util.find_spec("triton") is not None):
        from sdft_kernels.backends.gpu import backend as gpu

        return gpu
    if name == "compiled" or (narrow and device.type == "cpu" and library.find() is not None):
        return compiled
    return plain
