"""Cross-entropy straight from hidden states and a head, alone and as a divergence's hard term."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.ledger import IMPLEMENTATIONS, TRAFFIC
from benchmarks.recorder import record
from sdft_kernels import CrossEntropyOutput, FusedLinearDivergence, fused_linear_cross_entropy, fused_linear_divergence
from sdft_kernels.cross_entropy import fused_linear_cross_entropy_op
from sdft_kernels.reference import reference_cross_entropy, reference_divergence
from tests.cases import DIVERGENCES, assert_close, every_option, fused, random_case, reference, relative_error

BACKENDS = ("torch", "compiled", "triton")

EVERY_OPTION = {
    "temperature": 1.3,
    "logit_scale": 1.2,
    "softcap": 9.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "entropy_weight": 0.3,
}
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "all": EVERY_OPTION,
    "smoothed, negated": {"label_smoothing": 0.2, "logit_scale": -1.1},
    "sharpened": {"entropy_weight": -0.4, "z_loss": 0.01},
}


def inputs(tokens: int, vocab: int, dtype: torch.dtype = torch.float32, size: int = 48) -> tuple[Tensor, ...]:
    """Hidden states, head, bias, labels, of which some are ignored, and token weights, of which some are 0."""
    labels, weight = torch.randint(0, vocab, (tokens,)), torch.rand(tokens) + 0.1
    labels[1::5], weight[2::5] = -100, 0
    head = torch.randn(vocab, size) * 2 / size**0.5
    return torch.randn(tokens, size).to(dtype), head.to(dtype), torch.randn(vocab).to(dtype), labels, weight


def run(function: Any, given: tuple[Tensor, ...], upstream: Tensor, **options: Any) -> dict[str, Tensor]:
    """Every value, and the gradients of what requires one."""
    hidden, head, bias, labels, weight = given
    trained = [tensor.detach().clone().requires_grad_() for tensor in (hidden, head, bias)]
    out: CrossEntropyOutput = function(*trained[:2], labels, bias=trained[2], token_weight=weight, **options)
    out.loss.backward(upstream.to(out.loss.dtype))
    names = ("hidden", "weight", "bias")
    return out._asdict() | {f"grad of {name}": tensor.grad for name, tensor in zip(names, trained, strict=True)}


def assert_matches(given: tuple[Tensor, ...], reduction: str, options: dict[str, Any], limit: float = 3e-6, **of: Any):
    upstream = torch.randn(len(given[0])) if reduction == "none" else torch.tensor(0.7)
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in given)
    expected = run(reference_cross_entropy, wide, upstream, reduction=reduction, **options)
    actual = run(fused_linear_cross_entropy, given, upstream, reduction=reduction, **options, **of)
    for name, value in actual.items():
        most = limit if name.startswith("grad") else 3e-6
        assert relative_error(value, expected[name]) <= most, (name, relative_error(value, expected[name]))


def test_the_definition_is_torchs_cross_entropy() -> None:
    hidden, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    labels = torch.randint(0, 11, (9,))
    labels[2] = -100
    z = 1.5 * hidden @ weight.T / 0.8
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
            found = reference_cross_entropy(hidden, weight, labels, logit_scale=1.5, temperature=0.8, **options)
            torch.testing.assert_close(found.loss, functional.cross_entropy(z, labels, **options))


def test_the_definition_adds_the_hard_term_to_the_divergence() -> None:
    """At its own temperature, with the weights of the tokens, which divide the mean."""
    inputs = [torch.randn(*shape).double() for shape in ((5, 4), (7, 4), (5, 3), (7, 3))]
    labels, weight, hard = torch.randint(0, 7, (5,)), torch.rand(5).double(), torch.rand(5).double()
    labels[1] = -100
    alone = reference_divergence(*inputs, temperature=2.0, token_weight=weight)
    both = reference_divergence(
        *inputs, temperature=2.0, token_weight=weight, hard_weight=hard, hard_labels=labels, hard_temperature=0.5
    )
    entropy = functional.cross_entropy(inputs[0] @ inputs[1].T / 0.5, labels, reduction="none")
    assert both.hard_loss is not None
    torch.testing.assert_close(both.hard_loss, entropy)
    torch.testing.assert_close(both.loss, alone.loss + (weight * hard * entropy).sum() / weight.sum())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_float64_reference(backend: str, options: dict[str, float]) -> None:
    for number, (tokens, vocab) in enumerate(((1, 1003), (63, 1008), (64, 1003), (129, 1008))):
        if backend == "triton":
            tokens = min(tokens, 6)
        reduction = ("mean", "none", "sum")[number % 3]
        assert_matches(inputs(tokens, vocab), reduction, options, backend=backend, max_chunk_bytes=100_000)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype, limit: float) -> None:
    """Gradients are rounded once, on their way out."""
    assert_matches(inputs(7, 1003, dtype), "mean", EVERY_OPTION, limit, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    *trained, labels, weight = inputs(5, 11, torch.float64, size=4)

    def loss(hidden: Tensor, head: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {**EVERY_OPTION, "reduction": reduction, "max_chunk_bytes": 300}
        return fused_linear_cross_entropy(hidden, head, labels, bias=bias, token_weight=weight, **options).loss

    assert torch.autograd.gradcheck(loss, [tensor.requires_grad_() for tensor in trained])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_tokens_contribute_nothing_whatever_they_hold(backend: str) -> None:
    hidden, head, _, labels, weight = inputs(8, 1003)
    counted = (labels != -100) & (weight != 0)
    poisoned = torch.where(counted.unsqueeze(1), hidden, torch.nan).requires_grad_()
    other = torch.where(labels == -100, -1, labels)  # another index for the same tokens
    out = fused_linear_cross_entropy(poisoned, head, other, token_weight=weight, ignore_index=-1, backend=backend)
    out.loss.backward()
    expected = fused_linear_cross_entropy(
        hidden[counted], head, labels[counted], token_weight=weight[counted], backend=backend
    )
    torch.testing.assert_close(out.loss, expected.loss)
    assert poisoned.grad is not None
    for values in (*out[1:], poisoned.grad):
        assert (values[~counted] == 0).all() and values[counted].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_token_that_counts_gives_zeros(tokens: int) -> None:
    hidden, head = torch.randn(tokens, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    out = fused_linear_cross_entropy(hidden, head, torch.full((tokens,), -100))
    out.loss.backward()
    assert out.loss == 0
    assert hidden.grad is not None and head.grad is not None and not hidden.grad.any() and not head.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_entry_has_no_gradient_even_as_a_label(backend: str) -> None:
    hidden, head, bias, labels, _ = inputs(4, 1003)
    bias[[5, 8]], labels[:] = -torch.inf, torch.tensor([5, 1, 5, 2])
    assert_matches((hidden, head, bias, labels, torch.ones(4)), "sum", {}, backend=backend)


def test_only_the_first_entries_take_part() -> None:
    hidden, head, bias, _, weight = inputs(6, 1003)
    labels = torch.randint(0, 900, (6,))
    assert_matches((hidden, head, bias, labels, weight), "mean", {**EVERY_OPTION, "vocab_size": 900})


def test_under_autocast_and_without_gradients() -> None:
    hidden, head, bias, labels, weight = inputs(6, 1003)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = fused_linear_cross_entropy(hidden, head, labels, token_weight=weight)
    rounded = fused_linear_cross_entropy(hidden.bfloat16(), head.bfloat16(), labels, token_weight=weight)
    torch.testing.assert_close(lowered.loss, rounded.loss)
    for backend in BACKENDS:
        with torch.no_grad():
            found = fused_linear_cross_entropy(hidden, head, labels, bias=bias, backend=backend, **EVERY_OPTION)
        expected = reference_cross_entropy(hidden.double(), head.double(), labels, bias=bias.double(), **EVERY_OPTION)
        assert not found.loss.requires_grad
        assert all(relative_error(a, b) <= 3e-6 for a, b in zip(found, expected, strict=True))


def test_the_operator_is_one_of_torchs() -> None:
    hidden, head, _, labels, weight = inputs(3, 50, size=8)
    given = (hidden.requires_grad_(), head, None, labels.clamp(min=0), weight)
    options = (1.0, 1.0, None, 0.1, 0.0, 0.0, "mean", None, None, "torch", torch.float32)
    torch.library.opcheck(fused_linear_cross_entropy_op, (*given, *options, True, False, False))


@pytest.mark.parametrize("trainable_head", [True, False])
def test_it_takes_three_products_or_two_with_a_frozen_head(trainable_head: bool) -> None:
    tokens, size, vocab = 2048, 256, 32_768
    hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head = torch.empty(vocab, size, dtype=torch.bfloat16, device="meta", requires_grad=trainable_head)
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    noted = record(lambda: fused_linear_cross_entropy(hidden, head, labels).loss.backward(), TRAFFIC, IMPLEMENTATIONS)
    assert sum(op.flops for op in noted.ops) == (3 if trainable_head else 2) * 2 * tokens * size * vocab


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "labels run from -5 to", {"labels": torch.tensor([1, -5, 3])}),
        (TypeError, "labels must be int64", {"labels": torch.ones(3)}),
        (TypeError, "labels must be a tensor", {"labels": None}),
        (ValueError, r"token_weight must have shape \(3,\)", {"token_weight": torch.ones(4)}),
        (ValueError, "label_smoothing must lie between 0 and 1, not be 1.5", {"label_smoothing": 1.5}),
        (ValueError, "z_loss must lie between 0", {"z_loss": -1.0}),
        (ValueError, "entropy_weight must lie between", {"entropy_weight": float("nan")}),
        (TypeError, "ignore_index must be a whole number, not float", {"ignore_index": 0.5}),
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "vocab_size must lie in", {"vocab_size": 60}),
    ],
)
def test_a_wrong_argument_is_named(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"hidden": torch.randn(3, 8), "weight": torch.randn(50, 8), "labels": torch.tensor([1, 2, -100]), **changed}
    with pytest.raises(error, match=message):
        fused_linear_cross_entropy(**given)


#: Temperatures of the divergence and of the hard term, and a soft cap.
HARD = {"the same": (1.3, 1.3, None), "sharper, capped": (2.0, 1.0, 9.0), "softer": (1.3, 2.1, None)}


@pytest.mark.parametrize(("temperature", "hard_temperature", "softcap"), HARD.values(), ids=HARD)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hard_term(
    backend: str, divergence: str, temperature: float, hard_temperature: float, softcap: float | None
) -> None:
    """Beside every other option, of a number and of a weight for each token."""
    tokens, vocab = (9, 1008) if softcap else (7, 1003)
    labels = torch.randint(0, vocab, (tokens,))
    labels[2] = -100
    options = every_option(tokens, vocab) | {"temperature": temperature, "student_softcap": softcap}
    options |= {"hard_labels": labels, "hard_temperature": hard_temperature, "divergence": divergence}
    for reduction, weight, upstream in (("mean", 0.7, None), ("none", torch.rand(tokens), torch.randn(tokens))):
        case = random_case(tokens, vocab=vocab, bias=True, reduction=reduction, hard_weight=weight, **options)
        actual = fused(case, upstream, backend=backend, max_chunk_bytes=60_000)
        assert_close(actual, reference(case, upstream), 3e-6, 3e-6)
        assert actual.output.hard_loss is not None and actual.output.hard_loss[2] == 0


@pytest.mark.parametrize("hard_temperature", [1.0, 0.8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hard_term_where_most_tokens_are_masked(backend: str, hard_temperature: float) -> None:
    case = random_case(4, vocab=1003, bias=True, hard_weight=2.0, hard_temperature=hard_temperature)
    assert case.student_bias is not None
    case.student_bias[100:] = -torch.inf
    case.options |= {"hard_labels": torch.tensor([3, 50, 99, 0]), "divergence": "forward_kl"}
    case.options["teacher_bias"] = torch.where(case.student_bias == -torch.inf, -torch.inf, 0)
    assert_close(fused(case, backend=backend), reference(case), 3e-6, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_hard_term_in_half_precision_and_without_gradients(backend: str, dtype: torch.dtype) -> None:
    options = {"hard_labels": torch.randint(0, 1003, (5,)), "hard_weight": 0.5, "temperature": 2.0}
    case = random_case(5, vocab=1003, dtype=dtype, **options)
    assert_close(fused(case, backend=backend), reference(case), 3e-6, 5e-3)
    case.trainable = ()
    assert_close(fused(case, backend=backend), reference(case), 3e-6, 5e-3)


def test_hard_labels_alone_count_once() -> None:
    case = random_case(5, hard_labels=torch.randint(0, 50, (5,)))
    assert torch.equal(fused(case).output.loss, fused(case.with_options(hard_weight=1.0)).output.loss)


def test_a_hard_term_of_weight_zero_only_reports_its_loss() -> None:
    case, labels = random_case(5), torch.randint(0, 1003, (5,))
    alone, beside = fused(case), fused(case.with_options(hard_labels=labels, hard_weight=0.0))
    assert alone.output.hard_loss is None and beside.output.hard_loss is not None
    torch.testing.assert_close(beside.output.loss, alone.output.loss)
    logprob = fused(case.with_options(labels=labels)).output.student_logprob
    assert logprob is not None
    torch.testing.assert_close(beside.output.hard_loss, -logprob)


def test_the_module_has_a_hard_term_where_it_is_given_labels() -> None:
    case, labels = random_case(5), torch.tensor([1, -1, 3, 4, 5])
    given = (case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight)
    criterion = FusedLinearDivergence("jsd", hard_temperature=0.5, ignore_index=-1)
    options: dict[str, Any] = {"hard_labels": labels, "hard_weight": 0.3}
    expected = fused_linear_divergence(*given, divergence="jsd", hard_temperature=0.5, ignore_index=-1, **options)
    assert torch.equal(criterion(*given, **options).loss, expected.loss)
    assert criterion(*given).hard_loss is None


def test_the_hard_term_takes_no_product_and_no_launch_more() -> None:
    tokens, size, vocab = 1024, 256, 32_768
    hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head = torch.empty(vocab, size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    given = (hidden, head, hidden.detach(), head.detach())
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")

    def kernels_and_flops(**options: Any) -> tuple[list[str], int]:
        call = lambda: fused_linear_divergence(*given, **options).loss.backward()  # noqa: E731
        ops = record(call, TRAFFIC, IMPLEMENTATIONS).ops
        return [op.name for op in ops if op.name in TRAFFIC], sum(op.flops for op in ops)

    alone = kernels_and_flops(temperature=2.0)
    assert kernels_and_flops(temperature=2.0, hard_labels=labels, hard_weight=0.5) == alone
    of_labels = record(
        lambda: fused_linear_cross_entropy(hidden, head, labels).loss.backward(), TRAFFIC, IMPLEMENTATIONS
    )
    assert len([op for op in of_labels.ops if op.name in TRAFFIC]) <= len(alone[0])


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "hard_weight needs hard_labels", {"hard_labels": None}),
        (ValueError, "hard_weight must lie between", {"hard_weight": float("inf")}),
        (TypeError, "hard_weight must be a number, not str", {"hard_weight": "1"}),
        (ValueError, r"hard_weight must have shape \(3,\)", {"hard_weight": torch.ones(2)}),
        (TypeError, "hard_labels must be int64", {"hard_labels": torch.ones(3)}),
        (ValueError, "hard_labels run from 1 to 99", {"hard_labels": torch.tensor([1, 99, 2])}),
        (ValueError, "hard_temperature must be positive", {"hard_temperature": 0}),
    ],
)
def test_a_wrong_hard_term_is_named(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    options = {"hard_labels": torch.tensor([1, 2, -100]), "hard_weight": 1.0, **changed}
    with pytest.raises(error, match=message):
        fused(random_case(3, vocab=50), **options)
