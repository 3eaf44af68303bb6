"""The loss as torch sees it: custom operator, autograd, compilation, fake tensors, no waiting for a device."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import ledger
from benchmarks.recorder import passing_for_cuda, record
from sdft_kernels import autograd, chunk_loop, fused_linear_cross_entropy, fused_linear_divergence, operator, tokens
from sdft_kernels.backends import products
from sdft_kernels.operator import fused_linear_divergence_op
from tests.cases import DIVERGENCES, assert_as_exact_as_products, fused, random_case, relative_error


def small_inputs(count: int = 12, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(count, 8, requires_grad=True),
        torch.randn(vocab, 8, requires_grad=True),
        torch.randn(count, 8),
        torch.randn(vocab, 8),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_opcheck(divergence: str, reduction: str) -> None:
    hidden, weight, teacher_hidden, teacher_weight = small_inputs()
    bias = torch.randn(50, requires_grad=True)
    wanted = [reduction != "none"] * 3
    labels, hard_labels = torch.randint(0, 50, (2, 12))
    per_token = torch.rand(12), labels, -torch.rand(12), hard_labels, torch.rand(12)
    options = (divergence, 0.5, 1.0, 1.0, 1.0, None, 5.0, 2.0, reduction, 50, None, "auto", 2.0, torch.float32, *wanted)
    arguments = (hidden, weight, bias, teacher_hidden, teacher_weight, None, *per_token, *options)
    torch.library.opcheck(fused_linear_divergence_op, arguments)


class Model(nn.Module):
    def __init__(self, reduction: str, frozen_head: bool) -> None:
        super().__init__()
        self.reduction = reduction
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50).requires_grad_(not frozen_head)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        output = fused_linear_divergence(
            self.body(x),
            self.head.weight,
            x,
            self.head.weight,
            student_bias=self.head.bias,
            reduction=self.reduction,
            divergence="jsd",
            labels=labels,
        )
        return (output.loss * 3 + output.token_loss.mean()).sum()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction: str, frozen_head: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = Model(reduction, frozen_head)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (4, 7, 12):
        x, labels = torch.randn(count, 8), torch.randint(0, 50, (count,))
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(x, labels)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        for expected, actual in zip(*gradients, strict=True):
            assert relative_error(actual, expected) < 1e-6


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    model = Model("mean", frozen_head=False)
    x, labels = torch.randn(6, 8), torch.randint(0, 50, (6,))
    expected = model(x, labels)
    actual = torch.compile(model, fullgraph=True)(x, labels)
    actual.backward()
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_runs_on_fake_and_meta_tensors(reduction: str) -> None:
    def run(device: str) -> None:
        hidden = torch.randn(12, 8, device=device, requires_grad=True)
        weight = torch.randn(50, 8, device=device, requires_grad=True)
        labels = torch.zeros(12, dtype=torch.int64, device=device)
        output = fused_linear_divergence(hidden, weight, hidden, weight, labels=labels, reduction=reduction)
        assert output.loss.shape == (() if reduction == "mean" else (12,))
        assert output.student_logprob.shape == output.token_loss.shape == (12,)
        output.loss.sum().backward()
        assert hidden.grad.shape == (12, 8)
        assert weight.grad.shape == (50, 8)

    run("meta")
    with FakeTensorMode():
        run("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_chunk_bytes", [None, 100_000])
def test_a_device_returns_what_tracing_expects(dtype: torch.dtype, max_chunk_bytes: int | None) -> None:
    """Shapes and dtypes, of one chunk and of several, on meta tensors that pass for a device's."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    given = (meta(300, 16), meta(1000, 16), meta(1000), meta(300, 16), meta(1000, 16), *[None] * 6)
    options = ("reverse_kl", 0.5, 1.0, 1.0, 1.0, None, None, None, "mean", 1000, max_chunk_bytes, "auto", None, dtype)
    results: list[operator.OpResult] = []
    record(lambda: results.append(operator.forward(*given, *options, True, True, True)), ledger.TRAFFIC, {})
    with passing_for_cuda():
        expected = operator._fake(*given, *options, True, True, True)
    assert [(t.shape, t.dtype) for t in results[0]] == [(t.shape, t.dtype) for t in expected]
    assert results[0][8].dtype == (torch.float32 if dtype == torch.float16 else dtype)


SYNCHRONISING = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "masked_select", "unique", "equal")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device; counts what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.__name__.split(".")[0]
        assert name not in SYNCHRONISING, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are then treated as a device's, whose values the host may not look at."""
    for module in (tokens, autograd, chunk_loop):
        monkeypatch.setattr(module, "reads_are_free", lambda tensor: False)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch, backend: str, reduction: str) -> None:
    as_on_a_device(monkeypatch)
    hidden, weight, teacher_hidden, teacher_weight = small_inputs()
    token_weight = torch.tensor([1.0, 0.0, 2.0] * 4)
    options = {
        "token_weight": token_weight,
        "labels": torch.randint(0, 50, (12,)),
        "old_logprobs": -torch.rand(12),
        "importance_clip": 2.0,
        "hard_labels": torch.tensor([3, -100] * 6),
        "hard_weight": 0.5,
        "hard_temperature": 2.0,
        "reduction": reduction,
        "backend": backend,
    }
    labels = options["hard_labels"]
    with NoWaiting() as mode:
        output = fused_linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend)
        output.loss.backward(torch.full_like(output.loss, 0.5))
        output = fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, **options)
        output.loss.backward(torch.full_like(output.loss, 0.5))
    assert mode.calls > 20


def test_the_watch_for_waiting_can_fail() -> None:
    with pytest.raises(AssertionError, match="makes the host wait"), NoWaiting():
        torch.ones(()).item()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_token_of_weight_zero_contributes_nothing_on_a_device(
    monkeypatch: pytest.MonkeyPatch, backend: str, divergence: str
) -> None:
    """There it is not left out, and its hidden states may hold anything; the result is that of numbers in its place."""
    weight = torch.tensor([1.0, 0.0, 0.5] * 4)
    case = random_case(
        12,
        bias=True,
        token_weight=weight,
        labels=torch.randint(0, 1003, (12,)),
        old_logprobs=-torch.rand(12) * 8,
        hard_labels=torch.randint(0, 1003, (12,)),
        hard_weight=torch.rand(12),
        divergence=divergence,
    )
    numbers = copy.deepcopy(case)
    case.student_hidden[weight == 0] = float("nan")
    case.teacher_hidden[weight == 0] = float("nan")
    case.options["labels"][weight == 0] = -100
    case.options["hard_labels"][weight == 0] = 10**9
    case.options["hard_weight"][weight == 0] = float("nan")
    as_on_a_device(monkeypatch)
    assert_as_exact_as_products(fused(case, backend=backend), numbers)


class TensorOfItsOwnKind(Tensor):
    """Whose values nothing looks at, so that no token is left out, on a CPU either."""


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_weights_that_are_no_plain_tensor(backend: str) -> None:
    weight = torch.tensor([1.0, 0.0, 0.5] * 4)
    case = random_case(12, token_weight=weight)
    expected = fused(case, backend=backend)
    case.teacher_hidden[weight == 0] = float("nan")
    case.options["token_weight"] = weight.as_subclass(TensorOfItsOwnKind)
    actual = fused(case, backend=backend)
    assert relative_error(actual.output.loss, expected.output.loss) < 1e-6
    for name in case.trainable:
        assert relative_error(actual.gradients[name], expected.gradients[name]) < 2e-6, name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_weight_that_all_but_vanishes_leaves_its_token_its_values(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    case = random_case(12, token_weight=torch.tensor([1e30, 1e-30, 1.0] * 4))
    expected = fused(case, backend=backend)
    as_on_a_device(monkeypatch)
    assert relative_error(fused(case, backend=backend).output.token_loss, expected.output.token_loss) < 1e-6


def test_backward_twice() -> None:
    hidden, weight, *teacher = small_inputs()
    loss = fused_linear_divergence(hidden, weight, *teacher).loss * 2
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, second, third, strict=True):
        assert relative_error(b, 3 * a) < 1e-6
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (hidden, weight))


def test_backward_into_the_same_gradients_again_and_again() -> None:
    hidden, weight, *teacher = small_inputs()
    loss = fused_linear_divergence(hidden, weight, *teacher).loss
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert relative_error(weight.grad, 3 * once) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_traced_has_the_upstream_gradient_too(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Also where tensors are real and calls only noted, among which a kernel's launch has to be."""
    as_on_a_device(monkeypatch)

    def gradients(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> tuple[Tensor, ...]:
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = fused_linear_divergence(hidden, weight, *teacher, backend=backend).loss * 3
        return torch.autograd.grad(loss, (hidden, weight))

    traced = make_fx(gradients)(*small_inputs())
    others = small_inputs()
    for actual, expected in zip(traced(*others), gradients(*others), strict=True):
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction: str) -> None:
    hidden, weight, *teacher = small_inputs()
    loss = fused_linear_divergence(hidden, weight, *teacher, reduction=reduction).loss.sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("of", ["hvp", "vhp", "jvp", "hessian"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [True, False])
def test_second_derivatives_are_refused_not_taken_for_0(of: str, reduction: str, frozen: bool) -> None:
    """By who allows that a derivative is not there, as `torch.autograd.functional` does."""
    hidden, weight, *teacher = (tensor.detach() for tensor in small_inputs())
    weight.requires_grad_(not frozen)

    def loss(states: Tensor) -> Tensor:
        labels = torch.zeros(len(states), dtype=torch.int64)
        return fused_linear_divergence(states, weight, *teacher, labels=labels, reduction=reduction).loss.sum()

    direction = () if of == "hessian" else (torch.ones_like(hidden),)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        getattr(torch.autograd.functional, of)(loss, hidden, *direction)


def test_gradients_accumulate() -> None:
    hidden, weight, teacher_hidden, teacher_weight = small_inputs()
    fused_linear_divergence(hidden, weight, teacher_hidden, teacher_weight, reduction="sum").loss.backward()
    whole = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    for part in (slice(0, 5), slice(5, 12)):
        output = fused_linear_divergence(hidden[part], weight, teacher_hidden[part], teacher_weight, reduction="sum")
        output.loss.backward()
    assert relative_error(hidden.grad, whole[0]) < 1e-6
    assert relative_error(weight.grad, whole[1]) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    hidden, weight, teacher_hidden, teacher_weight = small_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_divergence(hidden.sin(), weight, teacher_hidden, teacher_weight).loss * 2

    loss(hidden, weight).backward()
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("function", [lambda out: out.token_loss, lambda out: out.student_entropy])
def test_per_token_values_are_detached(function: Callable[[Any], Tensor]) -> None:
    hidden, weight, *teacher = small_inputs()
    assert not function(fused_linear_divergence(hidden, weight, *teacher)).requires_grad


def test_backward_hands_its_memory_over() -> None:
    """The head's gradient is not copied on its way to .grad: it is the largest tensor there is."""
    hidden, weight, *teacher = small_inputs(vocab=4000)
    loss = fused_linear_divergence(hidden, weight, *teacher).loss
    large = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == weight.shape:
                large.append(func.__name__)
            return result

    with Watch():
        loss.backward(torch.tensor(0.5))
    assert set(large) <= {"detach.default", "mul_.Tensor"}, large


@pytest.mark.parametrize("hidden", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_device_gives_the_hidden_gradient_in_the_hidden_states_type_whatever_autocast_makes_of_products(
    hidden: torch.dtype,
) -> None:
    """A device's product gives its operands' type or float32; shapes alone are checked here, with no device."""
    gradient, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 100), (100, 16)))
    with passing_for_cuda():
        products.hidden_gradient(gradient, weight, torch.empty(8, 16, dtype=hidden, device="meta"))
