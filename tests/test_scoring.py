"""Log-probabilities, entropies and log-sum-exps against float64 full logits, on every backend (of which "auto" is the
compiled kernels)."""

from typing import Any

import pytest
import torch

from sdft_kernels import TokenStats, linear_token_stats
from sdft_kernels.reference import logits
from tests.cases import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expected_stats(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None, **options: Any
) -> TokenStats:
    bias = None if bias is None else bias.double()
    z = logits(hidden.double(), weight.double(), bias, **options)
    log_p = z.log_softmax(-1)
    logprob = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    top1 = z.gather(1, labels.unsqueeze(1)).squeeze(1) == z.amax(1)
    return TokenStats(logprob, top1, -(log_p.exp() * log_p).sum(1), z.logsumexp(1))


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"scale": 1.5, "temperature": 0.7}, {"softcap": 8.0, "scale": 0.5, "temperature": 1.2}]
)
def test_matches_full_logits(backend: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    hidden, weight = torch.randn(9, 24).to(dtype), torch.randn(2503, 24).to(dtype)
    bias = torch.randn(2503).to(dtype)
    expected = expected_stats(hidden, weight, torch.zeros(9, dtype=torch.int64), bias, **options)
    labels = torch.randint(0, 2503, (9,))
    labels[::2] = logits(hidden.double(), weight.double(), bias.double())[::2].argmax(1)
    expected = expected_stats(hidden, weight, labels, bias, **options)
    actual = linear_token_stats(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=options.get("scale", 1.0),
        softcap=options.get("softcap"),
        temperature=options.get("temperature", 1.0),
        max_chunk_bytes=4 * 2503 * 5,
        backend=backend,
    )
    # Logits of a hundred nats: some draws leave float32 products fewer digits than 2e-6, whatever comes after.
    products = expected_stats(hidden.float() @ weight.float().T, torch.eye(2503), labels, bias, **options)
    for name in ("logprob", "entropy", "logsumexp"):
        limit = max(2e-6, 1.5 * relative_error(getattr(products, name), getattr(expected, name)))
        assert relative_error(getattr(actual, name), getattr(expected, name)) < limit, name
    assert torch.equal(actual.top1, expected.top1)
    assert actual.top1.any() and not actual.top1.all()


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_without_labels_and_without_tokens(backend: str) -> None:
    stats = linear_token_stats(torch.randn(3, 8), torch.randn(50, 8), backend=backend)
    assert stats.logprob is None and stats.top1 is None
    assert stats.entropy.shape == (3,)
    empty = linear_token_stats(
        torch.randn(0, 8), torch.randn(50, 8), torch.zeros(0, dtype=torch.int64), backend=backend
    )
    assert empty.logprob.shape == (0,)


def test_takes_no_gradient() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    assert not linear_token_stats(hidden, torch.randn(50, 8, requires_grad=True)).entropy.requires_grad


def test_a_prefix_of_the_head() -> None:
    hidden, weight, labels = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([0, 1, 2])
    actual = linear_token_stats(hidden, weight, labels, vocab_size=40)
    expected = expected_stats(hidden, weight[:40], labels, None)
    assert relative_error(actual.logprob, expected.logprob) < 2e-6


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"hidden must have shape \(N, H\)", {"hidden": torch.randn(8)}),
        ("weight has 9 columns and hidden 8", {"weight": torch.randn(50, 9)}),
        (r"labels run from 50 to 50, but must lie in \[0, 50\)", {"labels": torch.tensor([50] * 3)}),
        (r"labels must have shape \(3,\)", {"labels": torch.tensor([5])}),
        ("temperature must be positive and finite in float32, not -1", {"temperature": -1}),
        ("logit_scale must be finite and not 0", {"logit_scale": 0.0}),
        ("logit_scale / temperature must lie between 1e-27 and 1e", {"temperature": 1e-45}),
        ("logit_scale / temperature must lie between 1e-27 and 1e", {"logit_scale": 1e-300}),
        ("logit_scale / softcap must lie between 1e-27 and 1e", {"softcap": 3e38}),
        ("hidden has no columns", {"hidden": torch.randn(3, 0), "weight": torch.randn(50, 0)}),
        ("softcap must be positive", {"softcap": -3.0}),
        (r"bias must have shape \(50,\)", {"bias": torch.zeros(3)}),
        (r"vocab_size must be positive and under 2\^63, not 0", {"vocab_size": 0}),
    ],
)
def test_wrong_arguments(message: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"hidden": torch.randn(3, 8), "weight": torch.randn(50, 8), **changes}
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**arguments)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_that_a_bias_masks(backend: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = torch.randn(5, 24).to(dtype), torch.randn(503, 24).to(dtype), torch.arange(5)
    bias = torch.randn(503).to(dtype)
    bias[9:400] = -torch.inf
    actual = linear_token_stats(hidden, weight, labels, bias=bias, temperature=2.0, backend=backend)
    rest = (weight[bias.isfinite()], labels, bias[bias.isfinite()])
    expected = expected_stats(hidden, *rest, temperature=2.0)
    for name in ("logprob", "entropy", "logsumexp"):
        assert relative_error(getattr(actual, name), getattr(expected, name), 0.3) < 3e-6, name
