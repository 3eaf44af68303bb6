"""Chunks fit the budget, and cover the tokens evenly."""

import pytest
import torch

from sdft_kernels.chunking import (
    BLOCK_TOKENS,
    DEFAULT_BUDGET,
    ENOUGH_TOKENS,
    ENOUGH_WITHOUT_LOGITS,
    TILE_TOKENS,
    Held,
    blocks,
    plan_chunks,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("tokens", [1, 7, 512, 1024, 16_384])
@pytest.mark.parametrize("vocab", [11, 49_152, 262_144])
@pytest.mark.parametrize("gradient_bytes", [0, 2])
def test_chunks_fit_the_budget(tokens: int, vocab: int, gradient_bytes: int) -> None:
    budget = 200 << 20
    plan = plan_chunks(tokens, vocab, Held(8 + gradient_bytes), CPU, budget)
    assert plan.chunk * vocab * (8 + gradient_bytes) <= budget
    assert 1 <= plan.chunk <= tokens


@pytest.mark.parametrize(("vocab", "most"), [(11, 256), (49_152, 256), (151_936, 138), (262_144, 112)])
def test_without_a_budget_memory_is_the_same_from_512_tokens_on(vocab: int, most: int) -> None:
    """That of the default budget's tokens, or of the fewest or the most that are of use."""
    chunks = [plan_chunks(tokens, vocab, Held(8), CPU).chunk for tokens in (512, 1024, 3000, 16_384)]
    assert all(most - 16 < chunk <= most for chunk in chunks), chunks


def test_chunks_are_even() -> None:
    plan = plan_chunks(1000, 1000, Held(8), CPU, 8 * 1000 * 400)
    assert [part.stop - part.start for part in plan.slices(1000)] == [336, 336, 328]


def test_a_budget_too_small_for_one_token_still_works() -> None:
    plan = plan_chunks(10, 262_144, Held(8), CPU, 1)
    assert plan.chunk == 1


def test_no_tokens() -> None:
    assert plan_chunks(0, 100, Held(8), CPU).chunk == 1


@pytest.mark.parametrize("tokens", [1, 100, 1024, 1200, 5000, 16_384, 131_072])
@pytest.mark.parametrize("vocab", [32_000, 151_936, 256_000])
@pytest.mark.parametrize("trainable_head", [True, False])
def test_chunks_on_a_device(tokens: int, vocab: int, trainable_head: bool) -> None:
    """Whole tiles, even, inside the budget, and enough tokens in each where there are any and the budget allows."""
    plan = plan_chunks(tokens, vocab, Held(8), CUDA, trainable_head=trainable_head)
    sizes = [part.stop - part.start for part in plan.slices(tokens)]
    assert sum(sizes) == tokens and max(sizes) <= plan.chunk
    assert plan.chunk * vocab * 8 <= DEFAULT_BUDGET["cuda"]
    assert all(size % TILE_TOKENS["cuda"] == 0 for size in sizes[:-1])
    assert max(sizes) - min(sizes) < 2 * TILE_TOKENS["cuda"]
    enough = ENOUGH_TOKENS[False]["trainable" if trainable_head else "frozen"]
    most = DEFAULT_BUDGET["cuda"] // (vocab * 8)
    assert min(sizes) > min(tokens, enough, most) / 2 - TILE_TOKENS["cuda"]  # two even chunks where one is too many
    if enough <= most / 2:
        assert min(sizes) > min(tokens, enough) - TILE_TOKENS["cuda"]


def test_a_budget_on_a_device_is_used_up() -> None:
    plan = plan_chunks(10_000, 1000, Held(10), CUDA, 1000 * 10 * 3000)
    assert plan.chunk == 2560 and [part.stop - part.start for part in plan.slices(10_000)][-1] == 2448


@pytest.mark.parametrize("budget", [None, 1])
def test_where_no_logits_are_held(budget: int | None) -> None:
    """A budget for them has no say: whole on the CPU, in chunks of enough tokens on a device."""
    assert plan_chunks(10_000, 152_000, Held(0), CPU, budget).chunks == 1
    sizes = [part.stop - part.start for part in plan_chunks(10_000, 152_000, Held(0), CUDA, budget).slices(10_000)]
    assert sum(sizes) == 10_000
    assert all(ENOUGH_WITHOUT_LOGITS - 128 < size < 2 * ENOUGH_WITHOUT_LOGITS for size in sizes)
    assert plan_chunks(0, 100, Held(0), CPU).chunk == 1


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 600, 1000])
def test_few_tokens_are_one_chunk_where_no_logits_are_held(tokens: int) -> None:
    """Each chunk more would read both heads again."""
    plan = plan_chunks(tokens, 152_000, Held(0), CUDA)
    assert (plan.chunk, plan.chunks) == (tokens, 1)


BLOCKED = Held(2, 8)  # float32 logits of both models for a block, and their bfloat16 gradient for the chunk


@pytest.mark.parametrize("tokens", [1, 100, 512, 513, 600, 1100, 5000, 16_384])
def test_blocks_are_whole_tiles_and_even(tokens: int) -> None:
    sizes = [block.stop - block.start for block in blocks(tokens)]
    assert sum(sizes) == tokens and max(sizes) <= BLOCK_TOKENS
    assert all(size % TILE_TOKENS["cuda"] == 0 for size in sizes[:-1])
    assert max(sizes) - min(sizes) < 2 * TILE_TOKENS["cuda"]


@pytest.mark.parametrize("tokens", [1, 100, 1024, 5000, 16_384, 131_072])
@pytest.mark.parametrize("vocab", [32_000, 151_936, 256_000])
@pytest.mark.parametrize("trainable_head", [True, False])
@pytest.mark.parametrize("budget", [None, 10 << 20, 400 << 20, 3 << 30])
def test_chunks_of_blocks_fit_the_budget(tokens: int, vocab: int, trainable_head: bool, budget: int | None) -> None:
    plan = plan_chunks(tokens, vocab, BLOCKED, CUDA, budget, trainable_head=trainable_head)
    sizes = [part.stop - part.start for part in plan.slices(tokens)]
    assert sum(sizes) == tokens and max(sizes) <= plan.chunk
    held = 2 * plan.chunk + 8 * min(plan.chunk, BLOCK_TOKENS)
    assert held * vocab <= (budget or DEFAULT_BUDGET["cuda"])
    if budget is None and trainable_head and tokens >= 4096 and vocab < 200_000:
        assert min(sizes) > ENOUGH_TOKENS[True]["trainable"] - TILE_TOKENS["cuda"]


def test_one_chunk_is_made_where_adding_up_several_would_take_more_memory() -> None:
    """Of 8,192 tokens 16 KB of gradient for each entry, and 16 KB for the float32 gradient of Llama 3.1's head."""
    assert plan_chunks(8192, 128_256, BLOCKED, CUDA, trainable_head=True, added_up=4 * 4096).chunks == 1
    assert plan_chunks(8192, 128_256, BLOCKED, CUDA, trainable_head=True, added_up=4 * 896).chunks == 2
    assert plan_chunks(8192, 128_256, BLOCKED, CUDA, trainable_head=True).chunks == 2
    assert plan_chunks(16_384, 128_256, BLOCKED, CUDA, trainable_head=True, added_up=4 * 4096).chunks == 4
    assert plan_chunks(8192, 256_000, BLOCKED, CUDA, trainable_head=True, added_up=4 * 3584).chunks == 1
    budget = 3 << 30  # which the caller names is for logits alone
    assert plan_chunks(8192, 256_000, BLOCKED, CUDA, budget, trainable_head=True, added_up=4 * 3584).chunks == 2
