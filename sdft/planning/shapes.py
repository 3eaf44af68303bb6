"""What operators make of tensors without values, remembered: layers are alike, and torch takes long to say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdft._compat import storage_number, tree_leaves

_FIRST = object()  # an operator gave its first argument back


class Shapes:
    """Runs operators, and makes the result of one that is known from its arguments' shapes."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's result on tensors without values."""
        try:
            key = (func, _described(args), _described(kwargs))
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be a key
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            self._known[key] = _made(result, args, kwargs)
            return result
        if known is _FIRST:
            return args[0]
        if known is NotImplemented:
            return func(*args, **kwargs)
        kind, made = known
        tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in made]
        return tensors[0] if kind is None else kind(tensors)


def _described(value: Any) -> Any:
    """What of an argument decides about a result's shape, as a key."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((name, _described(each)) for name, each in value.items())
    return type(value), value


def _made(result: Any, args: Any, kwargs: Any) -> Any:
    """How to make the result again; NotImplemented unless it is new tensors, each with memory of its own."""
    if args and result is args[0] and isinstance(result, Tensor):
        return _FIRST
    one = isinstance(result, Tensor)
    if not one and type(result) not in (tuple, list):
        return NotImplemented
    tensors = [result] if one else list(result)
    if not all(type(each) is Tensor and each.is_meta for each in tensors):
        return NotImplemented
    there = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    new = {_storage(each) for each in tensors}
    if len(new) < len(tensors) or new & there:
        return NotImplemented
    return None if one else type(result), [(each.shape, each.stride(), each.dtype) for each in tensors]


def _storage(tensor: Tensor) -> int:
    return storage_number(tensor.untyped_storage())
