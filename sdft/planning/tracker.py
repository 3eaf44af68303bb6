"""Follows the memory of tensors as operators make them, by what it is for: tensors without values take none, and are
followed all the same.

A storage counts from the operator that first returns it until nothing refers to it any more, as in torch's own
allocators. What a kernel takes and gives back within one operator is not seen. Host memory is counted by itself.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdft._compat import TorchDispatchMode, storage_number, tree_leaves

Run = Callable[[Any, Any, Any], Any]  # an operator with its arguments


@dataclass(frozen=True)
class Peak:
    """The most bytes that there were at once, in which phase that was, and the bytes of each part at that moment."""

    total: int = 0
    phase: str = ""
    parts: dict[str, int] = field(default_factory=dict)


class _Memory:
    """What one memory holds now, and the most that it has held."""

    def __init__(self) -> None:
        self.current = 0
        self.parts: Counter[str] = Counter()
        self.peak = Peak()

    def add(self, part: str, nbytes: int) -> None:
        self.parts[part] += nbytes
        self.current += nbytes

    def weigh(self, phase: str) -> None:
        if self.current > self.peak.total:
            self.peak = self.now(phase)

    def now(self, phase: str) -> Peak:
        return Peak(self.current, phase, {name: size for name, size in self.parts.items() if size})


class MemoryTracker(TorchDispatchMode):
    """While it is on, counts the bytes of what operators make.

    Bytes are rounded up to a multiple of `granularity` for each storage, as an allocator gives them out. `run` runs an
    operator where that is not just calling it.
    """

    def __init__(self, granularity: int = 1, run: Run | None = None) -> None:
        super().__init__()
        self._granularity = granularity
        self._run = run or _call
        self._part, self._phase = "others", ""
        self._device, self._host = _Memory(), _Memory()
        self._place = self._device
        self._live: dict[int, tuple[_Memory, str, int]] = {}  # by storage: where it is, its part and bytes
        self._peaks: dict[str, Peak] = {}
        self._aside: dict[str, Peak] = {}
        self._whole: set[Any] = set()  # operators that are not made of others

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
    def in_host_memory(self) -> Iterator[None]:
        """What is made within is in host memory, and counts there."""
        before, self._place = self._place, self._host
        try:
            yield
        finally:
            self._place = before

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """What happens within is no part of the step: its peak is kept in `asides`, and changes no other."""
        before, peaks = self._device.peak, dict(self._peaks)
        self._device.peak = Peak()
        self._weigh()
        try:
            yield
        finally:
            self._aside[name] = max(self._device.peak, self._aside.get(name, Peak()), key=lambda peak: peak.total)
            self._device.peak, self._peaks = before, peaks

    @property
    def current(self) -> int:
        """The bytes that there are now on the device."""
        return self._device.current

    @property
    def peak(self) -> Peak:
        """The peak on the device."""
        return self._device.peak

    @property
    def host_peak(self) -> Peak:
        """The peak in host memory."""
        return self._host.peak

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peak of each phase on the device."""
        return dict(self._peaks)

    @property
    def asides(self) -> dict[str, Peak]:
        """The peak of what was done aside, by name."""
        return dict(self._aside)

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part now on the device."""
        return self._device.now("").parts

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor was made in host memory."""
        return self._live.get(storage_number(tensor.untyped_storage()), (None,))[0] is self._host

    def forget_peak(self) -> None:
        """Start over with what there is now."""
        self._device.peak = self._host.peak = Peak()
        self._peaks.clear()
        self._aside.clear()
        self._weigh()

    def relabel(self, tensor: Tensor, part: str) -> None:
        """Have what is there already be for another part."""
        key = storage_number(tensor.untyped_storage())
        if key in self._live:
            place, before, nbytes = self._live[key]
            self._live[key] = (place, part, nbytes)
            place.add(before, -nbytes)
            place.add(part, nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = NotImplemented
        if func not in self._whole:
            with self:
                result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            self._whole.add(func)
            result = self._run(func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_number(storage)
        if key in self._live:
            return
        nbytes = -(-storage.nbytes() // self._granularity) * self._granularity
        self._live[key] = (self._place, self._part, nbytes)
        weakref.finalize(storage, self._drop, key).atexit = False
        self._place.add(self._part, nbytes)
        self._weigh()

    def _drop(self, key: int) -> None:
        place, part, nbytes = self._live.pop(key)
        place.add(part, -nbytes)

    def _weigh(self) -> None:
        self._device.weigh(self._phase)
        self._host.weigh(self._phase)
        if self._phase and self.current > self._peaks.get(self._phase, Peak()).total:
            self._peaks[self._phase] = self._device.now(self._phase)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)
