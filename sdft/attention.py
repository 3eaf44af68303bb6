"""Which of torch's attentions a pass takes: cuDNN's only for shapes that come again, and for very long ones.

cuDNN prepares itself for each shape that a process has not seen: on an H200 that takes 40 to 110 ms with a mask, and
860 without one at 16,000 tokens. From then on it is up to twice as fast as torch's others, which saves 120 ms a step
there, in 28 layers of 12 heads (`python -m benchmarks.attention_lengths`, docs/gpu.md).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

#: How often the same shapes take torch's other attentions: they may not come again.
TRIED = 2
#: From so many tokens on cuDNN's saves more in one step than it takes to prepare.
LONG = 32_768


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


class ShapesSeen:
    """How often steps have read batches of which shapes, in this process."""

    def __init__(self) -> None:
        self._times: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def attention_for(
        self, batches: Sequence[dict[str, Any]], device: torch.device
    ) -> contextlib.AbstractContextManager[None]:
        """For the passes over what is read of them: (rows, tokens), under names that end in `input_ids`."""
        read = (tensor for batch in batches for name, tensor in batch.items() if name.endswith("input_ids"))
        shapes = tuple(tuple(ids.shape) for ids in read)
        self._times[shapes] += 1
        longest = max((length for _, length in shapes), default=0)
        if self._times[shapes] > TRIED or longest >= LONG:
            return contextlib.nullcontext()
        return of_any_length(device)
