"""The divergence from a top-k teacher on a GPU against float64 full logits on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_kernels import fused_linear_topk_divergence
from sdft_kernels.reference import reference_topk_divergence
from tests.cases import DIVERGENCES, LEAST_NATS, Float32Products, relative_error
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
        given, upstream = moved(given, device), torch.tensor(1.0, device=device)
        if dtype == torch.float16:  # as in test_loss: importance weights from 1/3 to 3, and a factor as a GradScaler's
            once = run(reference_topk_divergence, wide(given), **settings)
            if options != "plain":
                now = once["student_logprob"]
                settings["old_logprobs"] = (now + 2 * torch.rand_like(now) - 1).float().clamp(max=0)
                once = run(reference_topk_divergence, wide(given), **settings)
            largest = max(value.abs().max() for name, value in once.items() if name.startswith("grad"))
            upstream = torch.exp2((1024 / largest).log2().floor()).float()
        expected = run(reference_topk_divergence, wide(given), upstream, **settings)
        with Float32Products(dtype):
            from_products = run(reference_topk_divergence, wide(given), upstream, **settings)
        actual = run(fused_linear_topk_divergence, given, upstream, **settings, backend="triton")
        for name, value in actual.items():
            least = LEAST_NATS * tokens**0.5 if name.endswith(("entropy", "logprob")) else 0
            limit = GRADIENTS[dtype] if name.startswith("grad") else 3e-6
            limit = max(limit, 1.5 * relative_error(from_products[name], expected[name], least))
            error = relative_error(value, expected[name], least)
            assert error <= limit, (name, tokens, vocab, k, error, limit)
