"""Tensors of other kinds than plain ones: fake, on meta, traced, wrapped, shared out, with a tangent.

They get the right numbers, an operator of a graph, or one sentence that names the argument; never numbers of the
tensors that a trace was made with, and never the end of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.proxy_tensor import make_fx

from sdft_kernels import fused_linear_divergence, linear_token_stats
from sdft_kernels.backends.cpu import backend as cpu_backend
from sdft_kernels.scoring import linear_token_stats_op
from tests.cases import relative_error


def scored(hidden: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
    return linear_token_stats(hidden, weight, labels, softcap=20.0).entropy


SCORING = {"labels": torch.arange(20), "no labels": None}


@pytest.mark.parametrize("labels", SCORING.values(), ids=SCORING)
def test_scoring_is_an_operator(labels: Tensor | None) -> None:
    hidden, weight, bias = torch.randn(20, 16), torch.randn(100, 16), torch.randn(100)
    arguments = (hidden, weight, bias, labels, 0.7, 1.2, 20.0, 90, torch.float32, None, "auto")
    torch.library.opcheck(linear_token_stats_op, arguments)


def test_scoring_is_traced_as_it_runs() -> None:
    """Nothing of the tensors that a trace was made with is left in it."""
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)
    expected = scored(2 * hidden, weight)

    def call(states: Tensor) -> Tensor:
        return scored(states, weight)

    made: dict[str, Callable[[Tensor], Tensor]] = {
        "make_fx": make_fx(call)(hidden),
        "functionalize": torch.func.functionalize(call),
        "compile": torch.compile(call, backend="aot_eager", fullgraph=True),
        "jit": torch.jit.trace(call, (hidden,)),
    }
    for name, function in made.items():
        assert torch.equal(function(2 * hidden), expected), name


def test_scoring_runs_on_fake_and_meta_tensors() -> None:
    hidden, weight, labels = torch.randn(20, 16), torch.randn(100, 16), torch.arange(20)
    on_meta = linear_token_stats(hidden.to("meta"), weight.to("meta"), labels.to("meta"))
    with FakeTensorMode() as mode:
        fake = linear_token_stats(*(mode.from_tensor(tensor) for tensor in (hidden, weight, labels)))
    for real, meta, imagined in zip(linear_token_stats(hidden, weight, labels), on_meta, fake, strict=True):
        assert (real.shape, real.dtype) == (meta.shape, meta.dtype) == (imagined.shape, imagined.dtype)
        assert meta.is_meta


class Elsewhere(Tensor):
    """A tensor that stands for another, as a DTensor does: it has no storage of its own."""

    @staticmethod
    def __new__(cls: Any, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was called")


@pytest.fixture
def mesh() -> Iterator[Any]:
    """One process, as its own group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_head_is_refused_by_name_and_its_full_tensor_taken(mesh: Any) -> None:
    head = torch.nn.Linear(16, 100, bias=False)
    fully_shard(head, mesh=mesh)
    hidden, whole = torch.randn(20, 16), head.weight.full_tensor().detach()
    for call in (scored, torch.compile(scored, backend="aot_eager")):
        with pytest.raises(TypeError, match=r"^weight must be a plain tensor, not a DTensor.*\.full_tensor\(\)"):
            call(hidden, head.weight)
    with pytest.raises(TypeError, match=r"^teacher_weight must be a plain tensor, not a DTensor"):
        fused_linear_divergence(hidden, whole, hidden, head.weight)
    assert torch.equal(scored(hidden, head.weight.full_tensor()), scored(hidden, whole))
    fused_linear_divergence(hidden, head.weight.full_tensor(), 2 * hidden, whole).loss.backward()
    expected = whole.clone().requires_grad_()
    fused_linear_divergence(hidden, expected, 2 * hidden, whole).loss.backward()
    assert relative_error(head.weight.grad.full_tensor(), expected.grad) < 1e-6


def test_what_a_collective_is_still_to_fill_is_waited_for(mesh: Any) -> None:
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)
    states = hidden.clone().requires_grad_()
    expected = fused_linear_divergence(states, weight, 2 * hidden, weight).loss
    expected.backward()

    def under_way(tensor: Tensor) -> Tensor:
        found = all_reduce(tensor, "sum", mesh)
        assert isinstance(found, AsyncCollectiveTensor)
        return found

    assert torch.equal(scored(under_way(hidden), under_way(weight)), scored(hidden, weight))
    late = under_way(hidden).requires_grad_()
    loss = fused_linear_divergence(late, under_way(weight), under_way(2 * hidden), weight).loss
    loss.backward()
    assert torch.equal(loss, expected) and torch.equal(late.grad, states.grad)


def test_a_tensor_that_is_not_dense_is_refused_by_name() -> None:
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)
    for sparse in (weight.to_sparse(), weight.to_sparse_csr(), weight.to_mkldnn()):
        with pytest.raises(
            TypeError, match=rf"^weight must be a dense tensor, not one of layout {sparse.layout}: take"
        ):
            linear_token_stats(hidden, sparse)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([weight[:3], weight[3:5]], layout=layout)
        with pytest.raises(TypeError, match=r"^student_hidden must be a dense tensor, not a nested one"):
            fused_linear_divergence(nested, weight, hidden, weight)


class Named(Tensor):
    """A tensor with a name of its own, and storage of its own."""


def test_a_subclass_with_its_own_storage_is_a_tensor_like_any_other() -> None:
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)
    assert torch.equal(scored(hidden.as_subclass(Named), weight.as_subclass(Named)), scored(hidden, weight))
    loss = fused_linear_divergence(hidden.as_subclass(Named), weight.as_subclass(Named), 2 * hidden, weight).loss
    assert torch.equal(loss, fused_linear_divergence(hidden, weight, 2 * hidden, weight).loss)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_tensor_that_stands_for_another_is_refused_by_name(backend: str) -> None:
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)
    words = "must be a plain tensor, not a Elsewhere, which stands for others"
    with pytest.raises(TypeError, match=f"^weight {words}"):
        linear_token_stats(hidden, Elsewhere(weight), backend=backend)
    with pytest.raises(TypeError, match=f"^teacher_hidden {words}"):
        fused_linear_divergence(hidden, weight, Elsewhere(hidden), weight, backend=backend)
    with pytest.raises(TypeError, match=f"^token_weight {words}"):
        fused_linear_divergence(hidden, weight, hidden, weight, token_weight=Elsewhere(hidden[:, 0]), backend=backend)


def test_no_pointer_is_taken_of_what_has_no_values() -> None:
    with pytest.raises(TypeError, match="a plain tensor on the CPU was expected, not a Tensor on meta"):
        cpu_backend.address(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match="not a Elsewhere on cpu"):
        cpu_backend.address(Elsewhere(torch.empty(3)))


@pytest.mark.parametrize("place", range(4))
def test_forward_mode_is_refused_not_dropped(place: int) -> None:
    tensors = [torch.randn(20, 16), torch.randn(100, 16), torch.randn(20, 16), torch.randn(100, 16)]
    name = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")[place]

    def loss(tensor: Tensor) -> Tensor:
        return fused_linear_divergence(*tensors[:place], tensor, *tensors[place + 1 :]).loss

    tangent = (torch.ones_like(tensors[place]),)
    with pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
        torch.func.jvp(loss, (tensors[place],), tangent)
    with pytest.raises(NotImplementedError, match="hidden has a tangent"):
        torch.func.jvp(lambda states: scored(states, tensors[1]), (tensors[0],), (torch.ones(20, 16),))


def test_gradients_by_torch_func_are_refused_by_name() -> None:
    hidden, weight, other = torch.randn(20, 16), torch.randn(100, 16), torch.randn(20, 16)

    def loss(states: Tensor) -> Tensor:
        return fused_linear_divergence(states, weight, other, weight).loss

    for transform in (torch.func.grad, torch.func.jacrev, lambda call: make_fx(torch.func.grad(call))):
        with pytest.raises(NotImplementedError, match=r"^student_hidden is under torch.func.grad, vjp or jacrev"):
            transform(loss)(hidden)
    both = torch.stack((hidden, other))
    with pytest.raises(NotImplementedError, match=r"^student_hidden is under torch.func.grad"):
        torch.func.grad(lambda states: torch.func.vmap(loss)(states).sum())(both)
    with pytest.raises(NotImplementedError, match=r"^student_hidden takes a gradient and is under torch.func.vmap"):
        torch.func.vmap(loss)(both.clone().requires_grad_())
    torch.testing.assert_close(torch.func.vmap(loss)(both), torch.stack((loss(hidden), loss(other))))


@pytest.mark.parametrize("of", ["scoring", "loss"])
def test_forward_mode_is_refused_while_a_graph_is_traced(of: str) -> None:
    hidden, weight = torch.randn(20, 16), torch.randn(100, 16)

    def value(states: Tensor) -> Tensor:
        return (
            scored(states, weight) if of == "scoring" else fused_linear_divergence(states, weight, hidden, weight).loss
        )

    def tangent(states: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(value, (states,), (torch.ones_like(states),))[1]
        return found

    with pytest.raises(NotImplementedError, match="hidden has a tangent"):
        torch.compile(tangent, backend="aot_eager")(hidden)
    with pytest.raises(NotImplementedError, match="hidden has a tangent"):
        torch.func.jvp(torch.compile(value, backend="aot_eager"), (hidden,), (torch.ones_like(hidden),))
