"""What the kernels and the benchmarks use of torch and triton that is private: still there, and the same."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from sdft_kernels import _compat

#: Interfaces by the functions of `sdft_kernels._compat` that use them.
OF_TORCH = [
    ("_C._dynamo.eval_frame.set_code_exec_strategy", "leave_uncompiled"),
    ("_C._dynamo.eval_frame._FrameExecStrategy", "leave_uncompiled"),
    ("_C._dynamo.eval_frame._FrameAction.SKIP", "leave_uncompiled"),
    ("_C._autograd._get_current_graph_task_keep_graph", "backward_runs_again"),
    ("_C._functions.DelayedError", "failing_when_differentiated"),
    ("_assert_async", "assert_on_device"),
    ("_C._functorch.is_functorch_wrapped_tensor", "under_grad"),
    ("_C._functorch.is_gradtrackingtensor", "under_grad"),
    ("_C._functorch.get_unwrapped", "under_grad"),
    ("_C._functorch.is_batchedtensor", "under_vmap_with_gradient"),
]


@pytest.mark.parametrize(("name", "user"), OF_TORCH)
def test_torch_has_what_the_kernels_use(name: str, user: str) -> None:
    try:
        operator.attrgetter(name)(torch)
    except AttributeError:
        pytest.fail(f"torch {torch.__version__} has moved torch.{name}: give sdft_kernels._compat.{user} another way")


def test_triton_says_whether_it_interprets() -> None:
    triton = pytest.importorskip("triton")
    try:
        assert _compat.interpreted() in (True, False)
    except (ImportError, AttributeError):
        pytest.fail(f"triton {triton.__version__} has moved knobs.runtime.interpret: see sdft_kernels._compat")


def graphs_compiled_of(function: Callable[[Tensor], Tensor]) -> int:
    """How much is compiled where code calls the function that the compiler runs as it is."""
    compiled = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    def run(x: Tensor) -> Tensor:
        def results() -> Iterator[Tensor]:  # a generator that breaks the graph
            torch._dynamo.graph_break()
            yield function(x)

        return next(results())

    torch._dynamo.reset()
    assert torch.compile(run, backend=note)(torch.ones(2)).tolist() == [2, 2]
    return len(compiled)


def test_a_function_can_be_left_uncompiled() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    def compiled(x: Tensor) -> Tensor:
        return double(x)

    def left(x: Tensor) -> Tensor:
        return double(x)

    assert graphs_compiled_of(compiled), "the compiler compiles nothing here: this test shows nothing"
    _compat.leave_uncompiled(left)
    assert not graphs_compiled_of(left), "sdft_kernels._compat.leave_uncompiled has no effect any more"


def test_a_torch_without_that_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    _compat.leave_uncompiled(lambda: None)


@pytest.mark.parametrize("again", [False, True])
def test_the_backward_pass_knows_whether_its_graph_is_kept(again: bool) -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(_compat.backward_runs_again()))
    y.backward(retain_graph=again)
    assert seen == [again], "sdft_kernels._compat.backward_runs_again says something else than retain_graph"


def test_a_second_derivative_fails() -> None:
    x = torch.ones(1, requires_grad=True)
    marked = _compat.failing_when_differentiated("not twice", x, torch.ones(1))
    assert marked == 1
    with pytest.raises(RuntimeError, match="not twice"):
        marked.backward()


def test_an_assertion_on_the_cpu_fails_at_once() -> None:
    _compat.assert_on_device(torch.tensor(True), "no")
    with pytest.raises(RuntimeError, match="no"):
        _compat.assert_on_device(torch.tensor(False), "no")


def test_tensors_that_stand_for_others_are_known() -> None:
    assert _compat.stands_for_others(DTensor), "a DTensor is not known any more by its __tensor_flatten__"
    assert _compat.waits_for_itself(AsyncCollectiveTensor), "a collective's result has no trigger_wait any more"
    assert not _compat.stands_for_others(AsyncCollectiveTensor)
    assert not _compat.stands_for_others(Tensor) and not _compat.stands_for_others(torch.nn.Parameter)


def test_the_benchmarks_find_what_they_follow() -> None:
    from benchmarks import _compat as ours

    storage = torch.empty(3, device="meta").untyped_storage()
    assert ours.storage_number(storage) == ours.storage_number(storage)
    assert ours.storage_number(storage) != ours.storage_number(torch.empty(3, device="meta").untyped_storage())
    written = [argument.alias_info is not None for argument in ours.arguments_of(torch.ops.aten.copy_.default)]
    assert written[:2] == [True, False], f"torch {torch.__version__} has another form of an operator's schema"
    queries = torch.randn(1, 1, 4, 8, requires_grad=True)
    assert ours.tree_map(lambda leaf: leaf + 1, (1, [2])) == (2, [3]) and ours.tree_leaves((1, [2])) == [1, 2]
    seen = []

    class Seeing(ours.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Seeing():
        torch.nn.functional.scaled_dot_product_attention(queries, queries, queries).sum().backward()
        torch.ones(1).item()
    for operator_, use in ((ours.ATTENTION, "attention"), (ours.ATTENTION_BACKWARD, "its backward pass")):
        assert operator_ in seen, f"torch {torch.__version__} runs {use} on the CPU by another operator: see {seen}"
    assert ours.READ_NUMBER.default in seen, f"torch {torch.__version__} reads numbers by another operator"


def test_triton_tells_what_it_would_compile() -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    for owner, name in ((jit, "create_function_from_signature"), (jit.JITFunction, "_pack_args")):
        assert hasattr(owner, name), f"triton has moved {name}: see benchmarks._compat.specialised"


@pytest.mark.peers
def test_peers_have_what_the_benchmarks_take_from_them() -> None:
    pytest.importorskip("liger_kernel")
    from trl.experimental.sdft import SDFTTrainer

    from benchmarks import _compat as ours

    assert callable(ours.liger_jsd())
    for name, parameters in ours.TRL_OVERRIDES.items():
        method = getattr(SDFTTrainer, name, None)
        assert method is not None, f"TRL has no SDFTTrainer.{name} any more"
        found = tuple(inspect.signature(method).parameters)[1:]
        assert found == parameters, f"TRL calls SDFTTrainer.{name} with other arguments: {found}"
