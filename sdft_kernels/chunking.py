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

#: On a device, tokens of a chunk beyond which little is gained, so that no more of the default budget is taken. Each
#: chunk reads and writes the whole float32 gradient of a trainable head, and with fewer tokens would wait for that;
#: with a frozen head it only reads the head. From A100 to B200, hidden sizes from 896: benchmarks/roofline.py.
ENOUGH_TOKENS = {"trainable": 1152, "frozen": 512}

#: A chunk is a multiple of this many tokens where it can be: rows that a device's matrix product works on at once,
#: the rest of which a chunk that ends within a tile would waste; on the CPU, vectors that columns are loaded in.
TILE_TOKENS = {"cpu": 16, "cuda": 128}


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


def plan_chunks(
    tokens: int,
    vocab: int,
    bytes_per_logit: int,
    device: torch.device,
    budget: int | None = None,
    *,
    trainable_head: bool = False,
) -> ChunkPlan:
    """Splits `tokens` evenly into as few chunks as `budget` bytes of logits allow, or are any use on a device.

    `bytes_per_logit` counts all that is held for a token and vocabulary entry: both models' logits, and the
    gradient where it has a buffer of its own. A budget too small for one token still gives chunks of one. Where
    nothing is held, 0, the budget has no say; chunks small enough for their hidden states to stay in a device's
    cache are still of use.
    """
    on_device, any_size = device.type != "cpu", budget is None or bytes_per_logit == 0
    enough = ENOUGH_TOKENS["trainable" if trainable_head else "frozen"] if on_device and any_size else tokens
    if budget is None:
        budget = DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cuda"])
        if device.type == "cpu":
            least, largest = (count * vocab * bytes_per_logit for count in CPU_TOKENS)
            budget = min(max(budget, least), largest)
    tile = TILE_TOKENS.get(device.type, TILE_TOKENS["cuda"])
    most = max(1, budget // (vocab * bytes_per_logit) if bytes_per_logit else tokens + tile - 1)
    tile = tile if most >= tile else 1
    chunks = max(1, _divide_up(tokens, most // tile * tile), tokens // max(1, enough))
    chunk = max(1, min(tokens, _divide_up(_divide_up(tokens, tile), chunks) * tile))
    return ChunkPlan(chunk, chunks, tile)


def _divide_up(total: int, part: int) -> int:
    return -(-total // part)
