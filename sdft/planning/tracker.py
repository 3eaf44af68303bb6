"""Follows the memory of tensors as operators make them, by what it is for: tensors without values take none, and are
followed all the same.

A storage counts from the operator that first returns it until nothing refers to it any more, as in torch's own
allocators. What a kernel takes and gives back within one operator is not seen. The device's memory and the host's are
counted apart.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdft._compat import TorchDispatchMode, storage_number, tree_leaves

Run = Callable[[Any, Any, Any], Any]  # an operator with its arguments


@dataclass(frozen=True)
class Peak:
    """The most bytes that there were at once, in which phase that was, and the bytes of each part at that moment."""

    total: int = 0
    phase: str = ""
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class _Storage:
    """A storage that lives: what it is for, its bytes, and whether it is the host's."""

    part: str
    nbytes: int
    on_host: bool


class MemoryTracker(TorchDispatchMode):
    """While it is on, counts the bytes of what operators make.

    Bytes are rounded up to a multiple of `granularity` for each storage, as an allocator gives them out. `run` runs an
    operator where that is not just calling it. `host` is what the most bytes on the host were, and `current`, `peak`
    and `parts` are the device's.
    """

    def __init__(self, granularity: int = 1, run: Run | None = None) -> None:
        super().__init__()
        self.current = self.host_now = self.host = 0
        self.peak = Peak()
        self._granularity = granularity
        self._run = run or _call
        self._part, self._phase, self._to_host = "others", "", False
        self._live: dict[int, _Storage] = {}
        self._parts: Counter[str] = Counter()
        self._peaks: dict[str, Peak] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made within is for `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is of the phase `name`, which what was there before counts towards too."""
        before, self._phase = self._phase, name
        self._weigh()
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def place(self, *, on_host: bool) -> Iterator[None]:
        """What is made within is in the host's memory, or else where its inputs are."""
        before, self._to_host = self._to_host, on_host
        try:
            yield
        finally:
            self._to_host = before

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor that was seen is in the host's memory."""
        if not self.host_now:
            return False
        found = self._live.get(storage_number(tensor.untyped_storage()))
        return found is not None and found.on_host

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peak of each phase."""
        return dict(self._peaks)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part now."""
        return {name: size for name, size in self._parts.items() if size}

    def forget_peak(self) -> None:
        """Start over with what there is now."""
        self.peak, self.host = Peak(), self.host_now
        self._peaks.clear()
        self._weigh()

    def relabel(self, tensor: Tensor, part: str) -> None:
        """Have what is there already be for another part."""
        found = self._live.get(storage_number(tensor.untyped_storage()))
        if found is not None and not found.on_host:
            self._parts[found.part] -= found.nbytes
            self._parts[part] += found.nbytes
            found.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where composed operators arrive whole
            with self:
                made_of_others = func.decompose(*args, **kwargs)
            if made_of_others is not NotImplemented:
                return made_of_others
        result = self._run(func, args, kwargs)
        if isinstance(result, Tensor):
            self._see(result, args)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf, args)
        return result

    def _see(self, tensor: Tensor, inputs: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage_number(storage)
        if key in self._live:
            return
        nbytes = -(-storage.nbytes() // self._granularity) * self._granularity
        on_host = self._to_host or (self.host_now > 0 and self._are_on_host(inputs))
        self._live[key] = _Storage(self._part, nbytes, on_host)
        weakref.finalize(storage, self._drop, key).atexit = False
        if on_host:
            self.host_now += nbytes
            self.host = max(self.host, self.host_now)
        else:
            self._parts[self._part] += nbytes
            self.current += nbytes
            self._weigh()

    def _are_on_host(self, inputs: Any) -> bool:
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        return bool(tensors) and all(self.is_on_host(tensor) for tensor in tensors)

    def _drop(self, key: int) -> None:
        gone = self._live.pop(key)
        if gone.on_host:
            self.host_now -= gone.nbytes
        else:
            self._parts[gone.part] -= gone.nbytes
            self.current -= gone.nbytes

    def _weigh(self) -> None:
        if self.current > self.peak.total:
            self.peak = Peak(self.current, self._phase, self.parts)
        if self._phase and self.current > self._peaks.get(self._phase, Peak()).total:
            self._peaks[self._phase] = Peak(self.current, self._phase, self.parts)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)
