"""Cross-entropy on a GPU, alone and as a divergence's hard term, against float64 full logits on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdft_kernels import fused_linear_cross_entropy
from sdft_kernels.reference import reference_cross_entropy
from tests.cases import DIVERGENCES, LEAST_NATS, every_option, random_case, relative_error
from tests.gpu.conftest import give_back
from tests.gpu.test_loss import GRADIENTS, check
from tests.test_cross_entropy import OPTIONS, inputs, run

#: Tokens and vocabulary: one token, more than a block of them, and real heads.
SHAPES = ((1, 50_257), (63, 2047), (1025, 5008), (129, 151_936), (64, 262_144))
INTERPRETED = ((3, 1040),)


@pytest.mark.parametrize("dtype", GRADIENTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_matches_float64(reduction: str, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    for tokens, vocab in SHAPES if device == "cuda" else INTERPRETED:
        given = tuple(tensor.to(device) for tensor in inputs(tokens, vocab, dtype))
        wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in given)
        upstream = torch.randn(tokens, device=device) if reduction == "none" else torch.tensor(0.7, device=device)
        settings = {"reduction": reduction, **options}
        expected = run(reference_cross_entropy, wide, upstream, **settings)
        actual = run(fused_linear_cross_entropy, given, upstream, **settings, backend="triton")
        for name, value in actual.items():
            least = LEAST_NATS * tokens**0.5 if name.endswith(("entropy", "logprob")) else 0
            limit = GRADIENTS[dtype] if name.startswith("grad") else 3e-6
            error = relative_error(value, expected[name], least)
            assert error <= limit, (name, tokens, vocab, error)
        give_back()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", ["plain", "all options"])
def test_a_hard_term_matches_float64(options: str, dtype: torch.dtype, divergence: str, device: str) -> None:
    for tokens, vocab in ((700, 5003), (129, 151_936)) if device == "cuda" else INTERPRETED:
        labels: Tensor = torch.randint(0, vocab, (tokens,), device=device)
        labels[1::4] = -100
        settings = every_option(tokens, vocab, device) if options != "plain" else {}
        hard = {"hard_labels": labels, "hard_weight": torch.rand(tokens, device=device), "hard_temperature": 0.7}
        check(random_case(tokens, vocab=vocab, dtype=dtype, device=device, divergence=divergence, **settings, **hard))
        give_back()
