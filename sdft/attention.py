"""Which of torch's attentions a pass takes: not cuDNN's where a length rarely comes twice.

cuDNN prepares itself for each shape that a process has not seen, which takes 40 to 110 ms with a mask and 860 without
one at 16,000 tokens, on an H200; from then on it is up to twice as fast as the others (`python -m
benchmarks.attention_lengths`, docs/gpu.md). On newer GPUs it has answered wrong (pytorch/pytorch#193893).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: From so many tokens on a step takes what cuDNN's attention saves at each: in 28 layers more than it takes to prepare.
LONG = 4096


@contextlib.contextmanager
def of_any_length(device: torch.device) -> Iterator[None]:
    """Without cuDNN's attention: a rollout has a new length with each token. torch's others stay as they were."""
    prepares = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if prepares:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if prepares:
            torch.backends.cuda.enable_cudnn_sdp(True)


def attention_for(batches: Sequence[dict[str, Any]], device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Without cuDNN's where all that is read, (rows, tokens) under names in `input_ids`, is shorter than `LONG`."""
    read = (tensor for batch in batches for name, tensor in batch.items() if name.endswith("input_ids"))
    longest = max((ids.shape[1] for ids in read), default=0)
    return of_any_length(device) if longest < LONG else contextlib.nullcontext()
