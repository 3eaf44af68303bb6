"""Scoring, and the loss without a gradient, on a GPU: the kernels that multiply, in each of their tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_kernels import linear_token_stats
from sdft_kernels.backends import products
from sdft_kernels.backends.gpu import linear as triton_linear
from sdft_kernels.backends.gpu.linear import PROCESS_TILES, SCORE_TILES
from sdft_kernels.backends.gpu.operands import Tile, configurations
from tests.cases import (
    Float32Products,
    assert_as_exact_as_products,
    every_option,
    fused,
    random_case,
    relative_error,
)
from tests.gpu.conftest import CHOSEN
from tests.test_scoring import expected_stats

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = ((1, 50_257, 75), (131, 643, 75), (64, 4096, 128), (129, 151_936, 896), (1025, 32_003, 64))
INTERPRETED = ((3, 643, 75),)


def kinds() -> list[str]:
    """Of this device: Hopper has the tiles of other NVIDIA GPUs too."""
    if CHOSEN != "cuda" or torch.version.hip is not None:
        return ["cuda", "hopper"] if CHOSEN == "cpu" else ["hip"]
    return ["hopper", "cuda"] if torch.cuda.get_device_capability()[0] == 9 else ["cuda"]


def tiles(of: dict[str, tuple[Tile, ...]]) -> list[tuple[str, Tile]]:
    return [(kind, tile) for kind in kinds() for tile in of[kind]]


def use(monkeypatch: pytest.MonkeyPatch, kernel: Any, kind: str, tile: Tile) -> None:
    """Has the kernel take this tile, and its operands as on a device of that kind."""
    monkeypatch.setattr(kernel, "configs", configurations({kind: (tile,)}, kind))
    monkeypatch.setattr(triton_linear, "copies_tiles", lambda matrix: kind == "hopper")


def shapes() -> tuple[tuple[int, int, int], ...]:
    return SHAPES if CHOSEN == "cuda" else INTERPRETED


def check_scores(
    tokens: int, vocab: int, size: int, dtype: torch.dtype, device: str, *, with_bias: bool = True
) -> None:
    hidden = torch.randn(tokens, size, device=device).to(dtype)
    weight = (torch.randn(vocab, size, device=device) * 2 / size**0.5).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype) if with_bias else None
    labels = torch.randint(0, vocab, (tokens,), device=device)
    options = {"softcap": 8.0, "temperature": 0.7}
    wanted = expected_stats(hidden, weight, labels, bias, scale=1.5, **options)
    actual = linear_token_stats(hidden, weight, labels, bias=bias, logit_scale=1.5, backend="triton", **options)
    with Float32Products(dtype):
        from_products = expected_stats(hidden, weight, labels, bias, scale=1.5, **options)
    for name in ("logprob", "entropy", "logsumexp"):
        limit = max(3e-6, 1.5 * relative_error(getattr(from_products, name), getattr(wanted, name)))
        assert relative_error(getattr(actual, name), getattr(wanted, name)) <= limit, (name, tokens, vocab, size)
    assert actual.top1 is not None and (actual.top1 != wanted.top1).sum() <= tokens // 100  # of nearly equal logits


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("kind", "tile"), tiles(SCORE_TILES), ids=str)
def test_scores_in_every_tile(monkeypatch: pytest.MonkeyPatch, kind: str, tile: Tile, dtype: str, device: str) -> None:
    use(monkeypatch, triton_linear.score_hidden_kernel, kind, tile)
    for shape in shapes():
        check_scores(*shape, HALF[dtype], device, with_bias=kind != "hopper")  # whose tiles are for heads without one


def test_scores_of_float32(device: str) -> None:
    for shape in shapes():
        check_scores(*shape, torch.float32, device)


@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("options", ["plain", "all options"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize(("kind", "tile"), tiles(PROCESS_TILES), ids=str)
def test_the_loss_without_a_gradient_in_every_tile(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tile: Tile,
    divergence: str,
    dtype: str,
    options: str,
    shared_head: bool,
    device: str,
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("logits were written to memory")

    use(monkeypatch, triton_linear.process_hidden_kernel, kind, tile)
    for tokens, vocab, size in shapes():
        settings = every_option(tokens, vocab, device) if options != "plain" else {}
        if kind == "hopper":
            settings.pop("teacher_bias", None)
        case = random_case(
            tokens,
            size,
            size + 32,
            vocab,
            HALF[dtype],
            shared_head=shared_head,
            bias="teacher_bias" in settings,
            device=device,
            divergence=divergence,
            **settings,
        )
        case.trainable = ()
        with monkeypatch.context() as context:
            context.setattr(products, "logits", refuse)
            actual = fused(case, backend="triton")
        assert_as_exact_as_products(actual, case, least=3e-6)


def test_the_tuner_chooses_one_of_the_tiles(cuda: str) -> None:
    check_scores(1024, 50_257, 768, torch.bfloat16, cuda, with_bias=kinds()[0] != "hopper")
    case = random_case(1024, 768, vocab=50_257, dtype=torch.bfloat16, shared_head=True, device=cuda)
    case.trainable = ()
    assert_as_exact_as_products(fused(case, backend="triton"), case, least=3e-6)
    for kernel, tiles in (
        (triton_linear.score_hidden_kernel, SCORE_TILES),
        (triton_linear.process_hidden_kernel, PROCESS_TILES),
    ):
        chosen = kernel.best_config
        sizes = tuple(chosen.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        assert (*sizes, chosen.num_warps) in tiles[kinds()[0]]
