"""Attention while rollouts are written: each pass has a length that the one before had not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def of_any_length(device: torch.device) -> Iterator[None]:
    """Under which torch's attention is not cuDNN's, which prepares itself for each length that a process has not seen.

    That takes tens of milliseconds, more than the pass of a token (docs/gpu.md), and on newer GPUs cuDNN has answered
    wrong (pytorch/pytorch#193893). The process's other back-ends stay as its user has them.
    """
    prepares = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if prepares:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if prepares:
            torch.backends.cuda.enable_cudnn_sdp(True)
