"""How many tokens are worked on at once, from a memory budget and the shapes.

A chunk is the tokens whose logits are held together: the larger it is, the fewer times the head and its gradient
are read and written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

#: Workspace for logits where the caller names none: small beside what a model on that device takes.
DEFAULT_BUDGET = {"cpu": 160 << 20, "cuda": 3 << 30}

#: On the CPU, where the caller names no budget, the tokens of a chunk lie between these whatever they take: products of
#: fewer are slow (a head of 640 × 262,144 on two cores took 1.19 × the bare products with chunks of 80 tokens, 1.11 ×
#: with 96, 1.04 × with 128), and of more than 256 no faster (576 × 49,152: 1.14 × with 256 tokens and with 352).
CPU_TOKENS = (112, 256)

#: On a device, tokens whose float32 logits are there at once, a block, where the gradient that is made of them has
#: memory of its own: that, of which a logit takes 2 bytes instead of 10, is kept for a whole chunk of blocks. A head's
#: gradient is read and written once a chunk, and its matrix product is of as many tokens as that. On an H200 the loss
#: of 8,192 tokens took 63.6 ms with chunks of 1,280 tokens and no blocks, and 60.5 with blocks of 512 in chunks of
#: 4,096, in the same memory (Llama-3.1-8B's head, docs/gpu.md).
BLOCK_TOKENS = 512

#: On a device, tokens of a chunk beyond which little is gained, so that no more of the default budget is taken. Each
#: chunk reads and writes the whole float32 gradient of a trainable head, and with fewer tokens would wait for that;
#: with a frozen head it only reads the head. By whether chunks are of blocks.
ENOUGH_TOKENS = {
    True: {"trainable": 4096, "frozen": 1024},
    False: {"trainable": 1152, "frozen": 512},
}

#: A chunk is a multiple of this many tokens where it can be: rows that a device's matrix product works on at once,
#: the rest of which a chunk that ends within a tile would waste; on the CPU, vectors that columns are loaded in.
TILE_TOKENS = {"cpu": 16, "cuda": 128}
#: The same where no logits are held, and a chunk's hidden states are to stay in a device's cache.
ENOUGH_WITHOUT_LOGITS = 1024


@dataclass(frozen=True)
class Held:
    """Bytes of workspace that a token takes for each entry of the vocabulary: while its chunk is worked on, and beside
    that while its block is, which is all of the chunk where it is 0."""

    chunk: int
    block: int = 0

    def most_tokens(self, nbytes: int) -> int:
        """Of a chunk that keeps to so many bytes for each entry."""
        tokens = nbytes // (self.chunk + self.block)
        return tokens if tokens <= BLOCK_TOKENS else (nbytes - BLOCK_TOKENS * self.block) // self.chunk


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens in a chunk at the most, and how many chunks there are."""

    chunk: int
    chunks: int
    tile: int

    def slices(self, tokens: int) -> Iterator[slice]:
        """All the tokens in even chunks, whole tiles each but for the last."""
        tiles = _divide_up(tokens, self.tile)
        ends = [min(tiles * number // self.chunks * self.tile, tokens) for number in range(self.chunks + 1)]
        return (slice(first, past) for first, past in pairwise(ends) if first < past)


def blocks(tokens: int) -> Iterator[slice]:
    """The tokens of a chunk in even blocks, whole tiles each but for the last."""
    return ChunkPlan(BLOCK_TOKENS, _divide_up(tokens, BLOCK_TOKENS), TILE_TOKENS["cuda"]).slices(tokens)


def plan_chunks(
    tokens: int,
    vocab: int,
    held: Held,
    device: torch.device,
    budget: int | None = None,
    *,
    trainable_head: bool = False,
    added_up: int = 0,
) -> ChunkPlan:
    """Splits `tokens` evenly into as few chunks as `budget` bytes of logits allow, or are any use on a device.

    `held` counts all that is held for a token and vocabulary entry: both models' logits, and the gradient where it has
    a buffer of its own. A budget too small for one token still gives chunks of one. Where nothing is held, 0, the
    budget has no say; chunks small enough for their hidden states to stay in a device's cache are still of use.
    `added_up` are bytes for each vocabulary entry that several chunks need to add up the head's gradient, and one does
    not: where the caller names no budget, one is made if it takes no more memory.
    """
    on_device, any_size = device.type != "cpu", budget is None or held.chunk == 0
    useful = ENOUGH_TOKENS[held.block > 0]["trainable" if trainable_head else "frozen"]
    if held.chunk == 0:
        useful = ENOUGH_WITHOUT_LOGITS
    enough = useful if on_device and any_size else tokens
    spared = added_up if budget is None else 0
    if budget is None:
        budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
        if device.type == "cpu":
            least, largest = (count * vocab * held.chunk for count in CPU_TOKENS)
            budget = min(max(budget, least), largest)
    tile = TILE_TOKENS.get(device.type, TILE_TOKENS["cuda"])
    most = max(1, held.most_tokens(budget // vocab)) if held.chunk else tokens + tile - 1
    tile = tile if most >= tile else 1
    chunks = max(1, _divide_up(tokens, most // tile * tile), tokens // max(1, enough))
    if spared and tokens <= held.most_tokens(budget // vocab + spared) and held.chunk * (tokens - enough) < spared:
        chunks = 1
    chunk = max(1, min(tokens, _divide_up(_divide_up(tokens, tile), chunks) * tile))
    return ChunkPlan(chunk, chunks, tile)


def _divide_up(total: int, part: int) -> int:
    return -(-total // part)
