"""Tensors without values that pass for tensors of a device that is not there, so that all code takes its path there.

A launch of a Triton kernel does nothing. Attention through `scaled_dot_product_attention` takes the memory that flash
and memory-efficient kernels take, which never hold a length by length matrix; on tensors without values torch would
take the kernel that does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from sdft._compat import READ_NUMBER, storage_number
from sdft.planning.shapes import Shapes
from sdft.planning.tracker import MemoryTracker
from sdft_kernels.autograd import IMPLEMENTATIONS, scale_op
from sdft_kernels.backends import select as backends
from sdft_kernels.backends import torch as plain

aten = torch.ops.aten

_PRODUCTS = (aten.mm, aten.addmm)
_DEVICE = torch.Tensor.device.__get__
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]  # stubs say that it is a bool
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]  # likewise


#: What takes its operands in autocast's type, of what models and adapters call. Autocast itself works on real tensors.
_LOWERED = (
    *(torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm),
    *(Tensor.mm, torch.bmm, Tensor.bmm, torch.addmm, torch.baddbmm, torch.nn.functional.conv1d, torch.einsum),
)


class PassFor(TorchFunctionMode):
    """Tensors without values say that they are on `device`, and what is made there is one.

    Copies to host memory and back are such tensors too, which `tracker` tells apart. Where autocast is on, products
    take their operands in its type, and copies of weights that train are kept until its outermost region ends.
    """

    def __init__(self, device: str, tracker: MemoryTracker) -> None:
        super().__init__()
        self.device, self.tracker = torch.device(device), tracker
        self._copies: dict[int, Tensor] = {}  # by weight, in autocast's type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DEVICE:
            return torch.device("cpu") if self.tracker.is_on_host(args[0]) else self.device
        if func == _IS_META:
            return False
        if func == _IS_CUDA:
            return self.device.type == "cuda"
        if func == Tensor.is_set_to:
            one, other = args
            return one.shape == other.shape and _storage(one) == _storage(other)
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func == Tensor.pin_memory and self.tracker.is_on_host(args[0]):
            return args[0]
        if func == Tensor.to and _IS_META(args[0]):
            return self._copied(args, kwargs or {})
        if func is torch.empty and self._is_host((kwargs or {}).get("device")):
            with self.tracker.in_host_memory():
                return torch.empty(*args, **{**kwargs, "device": "meta", "pin_memory": False})
        kwargs = {name: self._moved(value) for name, value in kwargs.items()} if kwargs else {}
        if func in _LOWERED and torch.is_autocast_enabled(self.device.type):
            kwargs = {name: self.lowered(value) for name, value in kwargs.items()}
            return func(*(self.lowered(value) for value in args), **kwargs)
        return func(*(self._moved(value) for value in args), **kwargs)

    def lowered(self, value: Any) -> Any:
        """A float32 tensor in autocast's type."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        dtype = torch.get_autocast_dtype(self.device.type)
        if not (value.requires_grad and value.is_leaf):
            return value.to(dtype)
        if id(value) not in self._copies:
            with torch.enable_grad():  # one copy serves with a graph and without
                self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]

    def forget_copies(self) -> None:
        """What autocast does where its outermost region ends."""
        self._copies.clear()

    def _moved(self, value: Any) -> Any:
        return "meta" if _names_device(value) and torch.device(value).type == self.device.type else value

    def _is_host(self, value: Any) -> bool:
        return self.device.type != "cpu" and _names_device(value) and torch.device(value).type == "cpu"

    def _copied(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What `to` gives: a copy where it leaves the device or host memory for the other."""
        was_there, named = self.tracker.is_on_host(args[0]), list(filter(_names_device, (*args[1:], *kwargs.values())))
        is_there = was_there if not named else self._is_host(named[0])
        args = tuple("meta" if _names_device(value) else value for value in args)
        kwargs = {name: "meta" if _names_device(value) else value for name, value in kwargs.items()}
        if is_there != was_there:
            kwargs["copy"] = True
        with self.tracker.in_host_memory() if is_there else contextlib.nullcontext():
            return Tensor.to(*args, **kwargs)


def _names_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu"))


def _storage(tensor: Tensor) -> int:
    return storage_number(tensor.untyped_storage())


class _NoStream:
    """Stands for a CUDA stream and for an event on one."""

    def __init__(self, *_: Any) -> None:
        """On no device."""

    def wait_stream(self, other: _NoStream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: _NoStream) -> None:
        """Nothing to wait for."""

    def record_event(self) -> _NoStream:
        return self


@contextlib.contextmanager
def _no_streams() -> Iterator[None]:
    """Copies on CUDA streams of their own are made at once."""
    with (
        mock.patch.object(torch.cuda, "Stream", _NoStream),
        mock.patch.object(torch.cuda, "current_stream", return_value=_NoStream()),
        mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()),
        mock.patch.object(Tensor, "record_stream", return_value=None),
    ):
        yield


def _hooks_within(mode: TorchFunctionMode) -> contextlib.AbstractContextManager[Any]:
    """A context in which hooks of saved tensors run in the mode, which autograd's engine leaves.

    So do layers that are made again in the backward pass, which a hook does.
    """
    make = saved_tensors_hooks.__init__

    def within(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(value: Any) -> Any:
            with mode:
                return hook(value)

        return run

    def init(hooks: saved_tensors_hooks, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        make(hooks, within(pack), within(unpack))

    return mock.patch.object(saved_tensors_hooks, "__init__", init)


def on_in_backward(mode: TorchFunctionMode) -> contextlib.AbstractContextManager[Any]:
    """A context in which backward formulas in Python run in the mode, which autograd's engine leaves."""
    backward = BackwardCFunction.apply

    def apply(node: Any, *gradients: Any) -> Any:
        with mode:
            return backward(node, *gradients)

    return mock.patch.object(BackwardCFunction, "apply", apply)


class Device:
    """A device to plan for: "cuda", or "cpu" for comparison with what is measured there.

    `real` tensors are those of this machine's CPU. Otherwise tensors have no values. After the time `until`, of
    `time.monotonic`, operators raise TimeoutError.
    """

    def __init__(self, kind: str = "cuda", *, real: bool = False, until: float = math.inf) -> None:
        self.kind, self.real, self._until = kind, real, until
        # An allocator on CUDA gives out 512 bytes at a time.
        self.tracker = MemoryTracker(512 if kind == "cuda" else 1, self._run)
        self._shapes = Shapes()
        self._passes = None if real else PassFor(kind, self.tracker)

    @property
    def tensors(self) -> torch.device:
        """Where tensors are made."""
        return torch.device("cpu" if self.real else "meta")

    def pretence(self) -> contextlib.AbstractContextManager[Any]:
        """What has tensors pass for the device's."""
        return self._passes or contextlib.nullcontext()

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Everything within runs as on the device, and its memory is counted."""
        with contextlib.ExitStack() as stack:
            if self.kind == "cpu":  # the compiled kernels take addresses, which tensors without values have not
                stack.enter_context(mock.patch.object(backends, "compiled", plain))
            if self._passes is not None:
                stack.enter_context(self._pretending(self._passes))
            stack.enter_context(self.tracker)
            yield

    @contextlib.contextmanager
    def _pretending(self, passes: PassFor) -> Iterator[None]:
        clear_cache = torch.clear_autocast_cache

        def attend(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled(self.kind):
                args = tuple(map(passes.lowered, args))
            return attention(*args, **kwargs)

        def clear() -> None:
            passes.forget_copies()
            clear_cache()

        with (
            _no_launches(),
            _no_streams(),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
            on_in_backward(passes),
            _hooks_within(passes),
            mock.patch.object(torch, "clear_autocast_cache", clear),
            # Autocast asks whether there is a GPU before it lets itself be switched on.
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
            mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
            passes,
        ):
            yield

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if time.monotonic() > self._until:
            raise TimeoutError("planning took too long")
        if func in IMPLEMENTATIONS:  # whose fake kernel would hide what it takes
            with self.pretence(), self.tracker, self.tracker.part("loss"):
                return IMPLEMENTATIONS[func](*args, **kwargs)
        if self.real:
            return func(*args, **kwargs)
        if func is scale_op:
            return None
        if func.overloadpacket is READ_NUMBER:
            return 1  # masks and factors: nothing is left out, and nothing is to be scaled
        if func.overloadpacket is aten.equal:
            return True  # what should be the same, as a fresh adapter's base is
        if kwargs.get("out") is not None and func.overloadpacket in _PRODUCTS:
            return kwargs["out"]  # torch 2.11 takes `out_dtype` for `beta` on tensors without values
        return self._shapes.run(func, args, kwargs)


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    """Launches of Triton kernels do nothing."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def nothing(*_: Any, **__: Any) -> None:
        """In place of a launch."""

    with (
        mock.patch.object(JITFunction, "run", nothing),
        mock.patch.object(InterpretedFunction, "run", nothing),
        mock.patch.object(Autotuner, "run", nothing),
    ):
        yield


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any
) -> Tensor:
    """What `scaled_dot_product_attention` returns and keeps: its inputs, the output, and a float32 for each row."""
    return _Attention.apply(query, key, value, attn_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        # As flash attention's backward pass has it: a float32 sum for the queries' gradient, a number for each row,
        # and gradients of keys and values for each head of the queries, which are then added up over those that share.
        workspace = [query.new_empty(query.shape, dtype=torch.float32)]
        workspace.append(query.new_empty(query.shape[:-1], dtype=torch.float32))
        if query.shape[1] != key.shape[1]:
            heads = (key.shape[0], query.shape[1], *key.shape[2:])
            workspace += [key.new_empty(heads), value.new_empty(*heads[:-1], value.shape[-1])]
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), None
