"""Tensors without values that pass for tensors of a device that is not there, so that all code takes its path there.

A launch of a kernel of ours does nothing. Attention through `scaled_dot_product_attention` takes the memory that flash
and memory-efficient kernels take, which never hold a length by length matrix; on tensors without values torch would
take the kernel that does. Where a model is told `attn_implementation="eager"`, its matrices are there and counted.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdft._compat import READ_NUMBER, storage_number, tree_map
from sdft.planning.tracker import MemoryTracker
from sdft_kernels.backends.cpu import backend as compiled
from sdft_kernels.backends.cpu import pages
from sdft_kernels.operator import forward, fused_linear_divergence_op, scale_op

aten = torch.ops.aten

_PRODUCTS = (aten.mm, aten.addmm)
_DEVICE = torch.Tensor.device.__get__
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]  # a bool in torch's stubs
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]  # as above
#: What moves a tensor to another place.
_MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)


class PassFor(TorchFunctionMode):
    """Tensors without values say that they are on `device`, and what is made there is one.

    Where the device is a GPU, what is put on the CPU has no values either, says that it is there, and is the host's to
    the tracker.
    """

    def __init__(self, device: str, tracker: MemoryTracker) -> None:
        super().__init__()
        self.device, self._tracker = torch.device(device), tracker
        self._apart = self.device.type != "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DEVICE:
            return torch.device("cpu") if self._tracker.is_on_host(args[0]) else self.device
        if func == _IS_META:
            return False
        if func == _IS_CUDA:
            return self.device.type == "cuda" and not self._tracker.is_on_host(args[0])
        if func == Tensor.is_set_to:
            one, other = args
            return one.shape == other.shape and _storage(one) == _storage(other)
        if func is Tensor.backward:  # which would call what it calls without this mode
            with self:
                return torch.autograd.backward(*args, **kwargs)
        if func == Tensor.pin_memory:
            return args[0]
        named = [place for place in map(_place, (*args, *kwargs.values())) if place is not None]
        if func == Tensor.cpu:
            named = ["cpu"]
        elif func == Tensor.cuda:
            named = [self.device.type]
        if not named:
            return func(*args, **kwargs)
        return self._placed(func, args, kwargs, on_host=self._apart and named[0] == "cpu")

    def _placed(self, func: Any, args: Any, kwargs: Any, *, on_host: bool) -> Any:
        args, kwargs = tree_map(self._moved, args), tree_map(self._moved, kwargs)
        kwargs.pop("pin_memory", None)
        if func in _MOVES and self._tracker.is_on_host(args[0]) != on_host:
            kwargs["copy"] = True  # to torch both are the same device
        if func in (Tensor.cpu, Tensor.cuda):
            func, args = Tensor.to, (args[0], "meta")
        with self._tracker.place(on_host=on_host):
            return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        return value if _place(value) is None else "meta"


def _place(value: Any) -> str | None:
    """The type of device that an argument names."""
    if isinstance(value, torch.device):
        return value.type if value.type in ("cuda", "cpu") else None
    return value.partition(":")[0] if isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu") else None


def _storage(tensor: Tensor) -> int:
    return storage_number(tensor.untyped_storage())


class Device:
    """A device to plan for: "cuda", or "cpu" for comparison with what is measured there.

    `real` tensors are those of this machine's CPU. Otherwise tensors have no values.
    """

    def __init__(self, kind: str = "cuda", *, real: bool = False) -> None:
        self.kind, self.real = kind, real
        # An allocator on CUDA gives out 512 bytes at a time.
        self.tracker = MemoryTracker(512 if kind == "cuda" else 1, self._run)
        self._passes = contextlib.nullcontext() if real else PassFor(kind, self.tracker)
        self._known: dict[Any, Any] = {}

    @property
    def tensors(self) -> torch.device:
        """Where tensors are made."""
        return torch.device("cpu" if self.real else "meta")

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Everything within runs as on the device, and its memory is counted."""
        with contextlib.ExitStack() as stack:
            if not self.real:
                stack.enter_context(_no_launches())
                stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
            stack.enter_context(self._passes)
            stack.enter_context(self.tracker)
            yield

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is fused_linear_divergence_op:  # whose fake kernel would hide what it takes
            with self._passes, self.tracker, self.tracker.part("loss workspace"):
                return forward(*args, **kwargs)
        if self.real:
            return func(*args, **kwargs)
        if func is scale_op or func.overloadpacket in (aten._fused_adamw_, aten._fused_adam_, aten._fused_sgd_):
            return None
        if func.overloadpacket is READ_NUMBER:
            return 1  # masks and factors: nothing is left out, and nothing is to be scaled
        if func.overloadpacket is aten.equal:
            return True  # what should be the same, as a fresh adapter's base is
        if kwargs.get("out") is not None and func.overloadpacket in _PRODUCTS:
            return kwargs["out"]  # torch 2.11 takes `out_dtype` for `beta` on tensors without values
        if not _is_functional(func):
            return func(*args, **kwargs)
        return self._like_before(func, args, kwargs)

    def _like_before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a functional operator makes of tensors of some shapes: found out once, for torch is slow to say."""
        try:
            key = (func, *map(_shape, args), *((name, _shape(value)) for name, value in kwargs.items()))
            known = self._known.get(key)
        except TypeError:  # what cannot be a key
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and result.device.type == "meta":
                self._known[key] = result.shape, result.stride(), result.dtype
            return result
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _shape(value: Any) -> Any:
    """What the shape of a result depends on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list):
        return tuple(map(_shape, value))
    return type(value), value


_FUNCTIONAL: dict[Any, bool] = {}


def _is_functional(func: Any) -> bool:
    """Whether an operator makes one new tensor, and changes none."""
    if func not in _FUNCTIONAL:
        schema = func._schema
        own = all(each.alias_info is None for each in (*schema.arguments, *schema.returns))
        _FUNCTIONAL[func] = own and len(schema.returns) == 1 and func.namespace == "aten"
    return _FUNCTIONAL[func]


@contextlib.contextmanager
def _no_launches() -> Iterator[None]:
    """Launches of Triton kernels and calls of compiled ones do nothing."""
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(compiled, "call", nothing))
        stack.enter_context(mock.patch.object(compiled, "address", lambda tensor: None))
        stack.enter_context(mock.patch.object(pages, "huge", _empty))
        stack.enter_context(mock.patch.object(pages, "kept", _empty))
        if importlib.util.find_spec("triton") is not None:
            from triton.runtime.autotuner import Autotuner
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            for kind in (JITFunction, InterpretedFunction, Autotuner):
                stack.enter_context(mock.patch.object(kind, "run", nothing))
        yield


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


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
