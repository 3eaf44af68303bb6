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

#: On the CPU, where the caller names no budget, a chunk has at least the first and at most the second number of tokens,
#: whatever memory they need. Products of fewer are slow (a head of 640 × 262,144 on two cores took 1.19 × the bare
#: products with chunks of 80 tokens, 1.11 × with 96, 1.04 × with 128), and of more than 256 no faster (576 × 49,152:
#: 1.14 × with 256 tokens and with 352).
CPU_TOKENS = (112, 256)

#: On a device, a chunk is worked through in blocks of this many tokens where the gradient has memory of its own. Then
#: float32 logits exist for one block at a time; the gradient, which takes 2 bytes a logit instead of 10, is kept for
#: the whole chunk. The head's gradient is read and written once a chunk, by one matrix product over all its tokens. On
#: an H200 the loss of 8,192 tokens took 63.6 ms with chunks of 1,280 tokens and no blocks, and 60.5 with blocks of 512
#: in chunks of 4,096, in the same memory (Llama-3.1-8B's head, docs/gpu.md).
BLOCK_TOKENS = 512

#: On a device, larger chunks than these gain little, so they take no more of the default budget. Each chunk reads and
#: writes the whole float32 gradient of a trainable head, and a chunk of fewer tokens would wait for that memory; with a
#: frozen head it only reads the head. The key says whether chunks are made of blocks.
ENOUGH_TOKENS = {
    True: {"trainable": 4096, "frozen": 1024},
    False: {"trainable": 1152, "frozen": 512},
}

#: A chunk is a multiple of this many tokens where it can be. A device's matrix product works on this many rows at once,
#: and wastes part of them where a chunk ends within a tile; the CPU's kernels load this many columns as a vector.
TILE_TOKENS = {"cpu": 16, "cuda": 128}
#: As ENOUGH_TOKENS, where a back-end holds no logits: a chunk's hidden states should then stay in a device's cache.
ENOUGH_WITHOUT_LOGITS = 1024


@dataclass(frozen=True)
class Held:
    """Bytes of workspace that a token needs for each entry of the vocabulary.

    `chunk` bytes are needed while the token's chunk is worked on, and `block` more while its block is. Where `block` is
    0, chunks are not divided into blocks.
    """

    chunk: int
    block: int = 0

    def most_tokens(self, nbytes: int) -> int:
        """The most tokens of a chunk that needs at most `nbytes` for each entry of the vocabulary."""
        tokens = nbytes // (self.chunk + self.block)
        return tokens if tokens <= BLOCK_TOKENS else (nbytes - BLOCK_TOKENS * self.block) // self.chunk


@dataclass(frozen=True)
class ChunkPlan:
    """The most tokens in a chunk, the number of chunks, and the tile that chunks are multiples of."""

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
    """Splits `tokens` evenly into as few chunks as `budget` bytes allow; on a device into more, where larger ones
    would be no faster.

    `held` counts everything that is held for a token and vocabulary entry: both models' logits, and the gradient where
    it has a buffer of its own. A budget too small for one token still gives chunks of one token. Where nothing is held
    the budget does not matter, and chunks are small enough for their hidden states to stay in a device's cache.
    `added_up` is the number of bytes for each vocabulary entry that several chunks need to add up the head's gradient.
    A single chunk does not need them, so where the caller names no budget, there is one chunk if that takes no more
    memory than several.
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
