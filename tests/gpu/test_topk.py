"""The divergence from a top-k teacher on a GPU against float64 full logits on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_kernels import fused_linear_topk_divergence
from sdft_kernels.reference import reference_topk_divergence
from tests.cases import DIVERGENCES, LEAST_NATS, relative_error
from tests.gpu.test_loss import GRADIENTS
from tests.test_topk import every_option, inputs, run, wide

#: Tokens, vocabulary and entries: more tokens than a block, real heads, and more entries than a kernel takes at once.
SHAPES = ((700, 5003, 20), (63, 151_936, 100), (129, 1008, 1), (64, 50_257, 300))
INTERPRETED = ((3, 1040, 7),)


def moved(given: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", GRADIENTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", ["plain", "all options"])
def test_matches_float64(divergence: str, dtype: torch.dtype, options: str, device: str) -> None:
    for tokens, vocab, k in SHAPES if device == "cuda" else INTERPRETED:
        given = inputs(tokens, vocab, k, dtype)
        settings = moved({"divergence": divergence, **({} if options == "plain" else every_option(given))}, device)
        given = moved(given, device)
        expected = run(reference_topk_divergence, wide(given), **settings)
        actual = run(fused_linear_topk_divergence, given, **settings, backend="triton")
        for name, value in actual.items():
            least = LEAST_NATS * tokens**0.5 if name.endswith(("entropy", "logprob")) else 0
            limit = GRADIENTS[dtype] if name.startswith("grad") else 3e-6
            assert relative_error(value, expected[name], least) <= limit, (name, tokens, vocab, k)
