"""What is kept for the backward pass, in host memory.

Under activation checkpointing these are the layers' inputs: layers × tokens × hidden size numbers. On a GPU each is
copied to pinned host memory while the next layer computes, and comes back while the layer after it is worked on in the
backward pass; the copies run on a stream of their own. transformers' own option (`activation_checkpointing_kwargs:
{offload: true}`) copies on the stream that computes, which waits for each.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: Smaller tensors stay where they are: they take no memory to speak of.
LEAST_BYTES = 1 << 20


class _Copy(NamedTuple):
    """A tensor in host memory, its device, and what says that the copy is there."""

    place: int
    host: Tensor
    device: torch.device
    copied: Any


class OnHost(torch.autograd.graph.saved_tensors_hooks):
    """A context: what operations within it keep for the backward pass is kept in host memory.

    `device` is the one that computes. On a CPU, where there is nothing to be gained, copies are made at once.
    """

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        super().__init__(self._pack, self._unpack)
        self._least_bytes = least_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: list[_Copy | None] = []
        self._coming: dict[int, Tensor] = {}

    def _pack(self, tensor: Tensor) -> Tensor | _Copy:
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.nbytes < self._least_bytes:
            return tensor
        on_gpu = self._stream is not None
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
        copied = None
        if self._stream is None:
            host.copy_(tensor)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                host.copy_(tensor, non_blocking=True)
                copied = self._stream.record_event()
            tensor.record_stream(self._stream)
        kept = _Copy(len(self._kept), host, tensor.device, copied)
        self._kept.append(kept)
        return kept

    def _unpack(self, kept: Tensor | _Copy) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor = self._coming.pop(kept.place, None)
        if tensor is None:
            tensor = self._fetch(kept)
        if self._stream is not None:
            compute = torch.cuda.current_stream(kept.device)
            compute.wait_stream(self._stream)
            tensor.record_stream(compute)
        self._kept[kept.place] = None
        before = self._kept[kept.place - 1] if kept.place else None
        if before is not None and before.place not in self._coming:
            self._coming[before.place] = self._fetch(before)
        return tensor

    def _fetch(self, kept: _Copy) -> Tensor:
        """Start to bring a tensor back."""
        if self._stream is None:
            return kept.host.to(kept.device, copy=True)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(kept.copied)
            return kept.host.to(kept.device, non_blocking=True)


def keeping(device: torch.device, on_host: bool) -> contextlib.AbstractContextManager[object]:
    """`OnHost` if that is wanted on a GPU; otherwise a context that does nothing."""
    return OnHost(device) if on_host and device.type != "cpu" else contextlib.nullcontext()
