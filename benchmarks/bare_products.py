"""The matrix products and the attention of a call, noted while it runs, and then done again with nothing around them.

That is the time of a training step in which all the rest took none: what no other way of doing the same step gets
below, on the same machine, in the same precision. The loss's products are those of its torch backend.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._compat import ATTENTION, ATTENTION_BACKWARD, TorchDispatchMode, tree_map
from benchmarks.recorder import PRODUCTS
from sdft_kernels.autograd import IMPLEMENTATIONS, arguments_of


@dataclass(frozen=True)
class Form:
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        """One of this form, of random values."""
        steps = ((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return torch.rand(1 + sum(steps)).to(self.dtype).as_strided(self.shape, self.stride)


Call = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]  # operator, arguments, keywords; tensors as forms


class BareProducts(TorchDispatchMode):
    """A context in which matrix products and attention are counted; `seconds` does them all again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Our operators would hide what they do, as the compiled kernels do.
        if func in IMPLEMENTATIONS:
            names = arguments_of(func)
            given = {**dict(zip(names, args, strict=False)), **kwargs, "backend": "torch"}
            with self:
                return IMPLEMENTATIONS[func](*(given[name] for name in names))
        if func.overloadpacket in PRODUCTS or func in (ATTENTION, ATTENTION_BACKWARD):
            arguments, keywords = tree_map(_form, (tuple(args), tuple(kwargs.items())))
            self.calls[func, arguments, keywords] += 1
        return func(*args, **kwargs)

    def seconds(self) -> float:
        """Of the noted calls, one after another, each as often as it was made."""
        return sum(_timed(call, times) for call, times in self.calls.items())


def _form(value: Any) -> Any:
    return Form(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _timed(call: Call, times: int) -> float:
    func, arguments, keywords = tree_map(lambda value: value.tensor() if isinstance(value, Form) else value, call)
    if func == ATTENTION_BACKWARD:  # takes what the forward pass made of queries, keys and values
        gradient, queries, keys, values, _, _, *options = arguments
        made = ATTENTION(queries, keys, values, *options, **dict(keywords))
        arguments = (gradient, queries, keys, values, *made, *options)
    started = time.perf_counter()
    for _ in range(times):
        func(*arguments, **dict(keywords))
    return time.perf_counter() - started
