"""Chunks fit the budget, and cover the tokens evenly."""

import pytest
import torch

from sdft_kernels.chunking import plan_chunks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("tokens", [1, 7, 512, 1024, 16_384])
@pytest.mark.parametrize("vocab", [11, 49_152, 262_144])
@pytest.mark.parametrize("gradient_bytes", [0, 2])
def test_chunks_fit_the_budget(tokens: int, vocab: int, gradient_bytes: int) -> None:
    budget = 200 << 20
    plan = plan_chunks(tokens, vocab, 4, gradient_bytes, CPU, budget)
    assert plan.chunk * vocab * (4 + gradient_bytes) + plan.block * vocab * 4 <= budget
    assert 1 <= plan.block <= plan.chunk <= tokens


def test_chunks_are_even() -> None:
    plan = plan_chunks(1000, 1000, 4, 0, CPU, 6 * 1000 * 400)
    assert plan.chunk == 334


def test_a_budget_too_small_for_one_token_still_works() -> None:
    plan = plan_chunks(10, 262_144, 4, 0, CPU, 1)
    assert (plan.chunk, plan.block) == (1, 1)


def test_no_tokens() -> None:
    assert plan_chunks(0, 100, 4, 0, CPU).chunk == 1
