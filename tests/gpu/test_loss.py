"""The loss on a GPU against float64 full logits on the same GPU, at shapes that cross every boundary of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdft_kernels.backends.gpu.divergence import BLOCK, NARROW_BLOCK
from tests.cases import (
    DIVERGENCES,
    Case,
    assert_as_exact_as_products,
    every_option,
    fused,
    random_case,
    reference,
    relative_error,
)
from tests.gpu.conftest import CHOSEN, give_back

#: Tokens and vocabulary: odd, multiples of 16, a kernel's block and one more or less, and real heads.
SHAPES = (
    (1, 50_257),
    (63, BLOCK - 1),
    (64, BLOCK),
    (129, BLOCK + 1),
    (1025, NARROW_BLOCK - 1),
    (64, NARROW_BLOCK),
    (1, NARROW_BLOCK + 1),
    (1025, 5008),
    (129, 17),
    (63, 151_936),
    (129, 262_144),
)
INTERPRETED = ((1, 17), (3, NARROW_BLOCK + 1))

#: Least relative error of gradients that is asked for: they come in the inputs' dtype, from rounded logits' gradients.
GRADIENTS = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
#: Triton's interpreter cuts the digits off that a device rounds.
CUT = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check(case: Case, upstream: torch.Tensor | None = None, **extra: Any) -> None:
    dtype = case.student_hidden.dtype
    actual = fused(case, upstream, backend="triton", **extra)
    limit = (GRADIENTS if CHOSEN == "cuda" else CUT)[dtype]
    assert_as_exact_as_products(actual, case, least=3e-6, upstream=upstream, gradients=limit)


def close_to_now(case: Case) -> torch.Tensor:
    """Log-probabilities of sampling which make importance weights from 1/3 to 3. The logits' gradients of a token are
    multiplied by its weight before they are rounded, so that one of a tiny weight loses digits in float16: of its own
    gradient alone, beside which those of other tokens are large."""
    now = reference(case).output.student_logprob
    assert now is not None
    return (now + 2 * torch.rand_like(now) - 1).float().clamp(max=0)


def scaled_for_float16(case: Case, upstream: torch.Tensor | None) -> torch.Tensor:
    """With a factor as a GradScaler finds it, for the largest gradient; else a returned one may be too small."""
    gradients = [gradient for gradient in reference(case, upstream).gradients.values() if gradient is not None]
    largest = torch.stack([gradient.abs().max() for gradient in gradients]).max()
    factor = torch.exp2((1024 / largest).log2().floor()).float()
    return factor if upstream is None else factor * upstream


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", GRADIENTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", ["plain", "all options"])
@pytest.mark.parametrize("head", ["trainable", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_float64(
    divergence: str, dtype: torch.dtype, options: str, head: str, reduction: str, device: str
) -> None:
    for number, (tokens, vocab) in enumerate(SHAPES if device == "cuda" else INTERPRETED):
        seed = torch.seed() % 2**62
        torch.manual_seed(seed)
        settings = every_option(tokens, vocab, device) if options != "plain" else {}
        case = random_case(
            tokens,
            vocab=vocab,
            dtype=dtype,
            bias=options != "plain",
            seed=seed,
            device=device,
            divergence=divergence,
            reduction=reduction,
            **settings,
        )
        if head == "frozen":
            case.trainable = ("student_hidden",)
        upstream = torch.randn(tokens, device=device) if reduction == "none" else None
        if dtype == torch.float16:
            if options != "plain":
                case.options["old_logprobs"] = close_to_now(case)
            upstream = scaled_for_float16(case, upstream)
        # Every other shape in several chunks, where it has the tokens.
        chunk_bytes = 10 * vocab * 128 if number % 2 and tokens > 128 else None
        try:
            check(case, upstream, max_chunk_bytes=chunk_bytes)
        except Exception as error:
            raise AssertionError(f"{tokens} tokens, vocabulary {vocab}, seed {seed}: {error}") from error
        finally:
            give_back()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [151_936, 262_144])
@pytest.mark.xdist_group("large")
def test_many_tokens_of_a_real_head(divergence: str, vocab: int, cuda: str) -> None:
    """With hidden states shared as under self-distillation, where what is expected is a small difference."""
    check(
        random_case(
            1025,
            student_size=256,
            vocab=vocab,
            dtype=torch.bfloat16,
            shared_head=True,
            device=cuda,
            divergence=divergence,
        )
    )


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.xdist_group("large")
def test_a_chunk_past_two_to_the_31st_logit(divergence: str, dtype: torch.dtype, cuda: str) -> None:
    """The last tokens of one such chunk have what they have alone, and so have gradients of the whole."""
    tokens, vocab = 8320, 262_144
    assert tokens * vocab > 2**31
    case = random_case(
        tokens, 64, vocab=vocab, dtype=dtype, shared_head=True, device=cuda, divergence=divergence, reduction="sum"
    )
    whole = fused(case, backend="triton", max_chunk_bytes=10 * tokens * vocab)
    last = slice(tokens - 70, tokens)
    alone = random_case(1, device=cuda, divergence=divergence, reduction="sum")
    alone.student_hidden, alone.teacher_hidden = case.student_hidden[last], case.teacher_hidden[last]
    alone.student_weight = alone.teacher_weight = case.student_weight
    few = fused(alone, backend="triton")
    check(alone)
    chunked = fused(case, backend="triton")
    limit = GRADIENTS[dtype]
    assert relative_error(whole.output.token_loss[last], few.output.token_loss) <= 3e-6
    for name, part in (("student_hidden", last), ("student_weight", slice(None))):
        one, other = whole.gradients[name], (few if name == "student_hidden" else chunked).gradients[name]
        assert one is not None and other is not None
        assert relative_error(one[part], other) <= limit, name


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence: str, device: str) -> None:
    logits = torch.tensor(
        [[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 1.0, 0.0], [1.0, -1.0, -1.0, -1.0]], device=device
    )
    case = random_case(4, device=device, divergence=divergence)
    for size in (1.0, 1e2, 1e4):
        case.student_hidden, case.student_weight = logits * size, torch.eye(4, device=device)
        case.teacher_hidden, case.teacher_weight = logits.flip(0) * size, torch.eye(4, device=device)
        check(case)


@pytest.mark.parametrize("dtype", GRADIENTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_nothing_of_a_token_of_weight_0_is_seen(dtype: torch.dtype, device: str) -> None:
    case = random_case(5, vocab=1003, dtype=dtype, device=device)
    case.options["token_weight"] = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0], device=device)
    for hidden in (case.student_hidden, case.teacher_hidden):
        hidden[1], hidden[3] = float("nan"), float("inf")
    check(case)


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_tokens_give_zeros(tokens: int, device: str) -> None:
    case = random_case(tokens, vocab=300, device=device)
    case.options["token_weight"] = torch.zeros(tokens, device=device)
    result = fused(case, backend="triton")
    assert result.output.loss.item() == 0
    assert all(gradient is None or not gradient.any() for gradient in result.gradients.values())


def test_heads_padded_differently(device: str) -> None:
    case = random_case(7, vocab=1003, dtype=torch.bfloat16, device=device)
    padding = torch.full((21, 40), float("nan"), dtype=torch.bfloat16, device=device)
    case.teacher_weight = torch.cat((case.teacher_weight, padding))
    with pytest.warns(UserWarning, match="1003 and 1024"):
        check(case)
