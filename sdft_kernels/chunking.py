"""How many tokens are worked on at once, from a memory budget and the shapes.

A chunk is the tokens whose logit gradients are held together: the larger it is, the fewer times the weight
gradient is read and written. Within it, a block is the tokens whose teacher logits are held: they are needed
only until the block's gradients are written, so their buffer is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Workspace for logits where the caller names none: small beside what a model on that device takes.
DEFAULT_BUDGET = {"cpu": 160 << 20, "cuda": 1 << 30}

#: Blocks in a chunk: two on the CPU, where memory is what the teacher's buffer costs; one on a device, where every
#: further block costs launches.
BLOCKS_PER_CHUNK = {"cpu": 2, "cuda": 1}


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens in a chunk, and in each of its blocks."""

    chunk: int
    block: int


def plan_chunks(
    tokens: int,
    vocab: int,
    logit_bytes: int,
    gradient_bytes: int,
    device: torch.device,
    budget: int | None = None,
) -> ChunkPlan:
    """Splits `tokens` evenly into as few chunks as `budget` bytes of logits allow.

    A token of a chunk holds its student logits, `logit_bytes` per vocabulary entry, and `gradient_bytes` per
    entry where the gradient has a buffer of its own; a token of a block holds its teacher logits besides. A
    budget too small for one token still gives chunks of one.
    """
    if budget is None:
        budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
    blocks = BLOCKS_PER_CHUNK.get(device.type, BLOCKS_PER_CHUNK["cuda"])
    per_token = vocab * (logit_bytes + gradient_bytes + logit_bytes / blocks)
    most = max(1, int(budget / per_token))
    chunks = max(1, -(-tokens // most))
    chunk = max(1, -(-tokens // chunks))
    return ChunkPlan(chunk=chunk, block=max(1, -(-chunk // blocks)))
