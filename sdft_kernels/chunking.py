"""How many tokens are worked on at once, from a memory budget and the shapes.

A chunk is the tokens whose logit gradients are held together: the larger it is, the fewer times the weight
gradient is read and written. Within it, a block is the tokens whose teacher logits are held: they are needed
only until the block's gradients are written, so their buffer is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

#: Workspace for logits where the caller names none: small beside what a model on that device takes.
DEFAULT_BUDGET = {"cpu": 160 << 20, "cuda": 3 << 30}

#: On a device, tokens of a chunk beyond which little is gained, so that no more of the default budget is taken. Each
#: chunk reads and writes the whole float32 gradient of a trainable head, and with fewer tokens would wait for that;
#: with a frozen head it only reads the head. From A100 to B200, hidden sizes from 896: benchmarks/roofline.py.
ENOUGH_TOKENS = {"trainable": 1152, "frozen": 512}

#: Rows that a device's matrix product works on at once: a chunk that ends within a tile wastes the rest of it.
TILE_ROWS = 128

#: Blocks in a chunk: two on the CPU, where memory is what the teacher's buffer costs; one on a device, where every
#: further block costs launches.
BLOCKS_PER_CHUNK = {"cpu": 2, "cuda": 1}


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens in a chunk, and in each of its blocks, at the most."""

    chunk: int
    block: int
    chunks: int = 1
    tile: int = 1

    def slices(self, tokens: int) -> Iterator[slice]:
        """All the tokens in even chunks, whole tiles each but for the last."""
        tiles = _divide_up(tokens, self.tile)
        ends = [min(tiles * number // self.chunks * self.tile, tokens) for number in range(self.chunks + 1)]
        return (slice(first, past) for first, past in pairwise(ends) if first < past)


def plan_chunks(
    tokens: int,
    vocab: int,
    logit_bytes: int,
    gradient_bytes: int,
    device: torch.device,
    budget: int | None = None,
    *,
    trainable_head: bool = False,
) -> ChunkPlan:
    """Splits `tokens` evenly into as few chunks as `budget` bytes of logits allow, or are any use on a device.

    A token of a chunk holds its student logits, `logit_bytes` per vocabulary entry, and `gradient_bytes` per
    entry where the gradient has a buffer of its own; a token of a block holds its teacher logits besides. A
    budget too small for one token still gives chunks of one.
    """
    on_device = device.type != "cpu"
    enough = ENOUGH_TOKENS["trainable" if trainable_head else "frozen"] if on_device and budget is None else tokens
    if budget is None:
        budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
    blocks = BLOCKS_PER_CHUNK.get(device.type, BLOCKS_PER_CHUNK["cuda"])
    per_token = vocab * (logit_bytes + gradient_bytes + logit_bytes / blocks)
    most = max(1, int(budget / per_token))
    tile = TILE_ROWS if on_device and most >= TILE_ROWS else 1
    chunks = max(1, _divide_up(tokens, most // tile * tile), tokens // max(1, enough))
    chunk = max(1, min(tokens, _divide_up(_divide_up(tokens, tile), chunks) * tile))
    return ChunkPlan(chunk, _divide_up(chunk, blocks), chunks, tile)


def _divide_up(total: int, part: int) -> int:
    return -(-total // part)
