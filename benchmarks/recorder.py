"""Notes what a call would do on a GPU that is not there: every launch, with the memory it reads and writes.

The call runs on tensors without values that pass for CUDA ones, so that each package takes the path it takes on a
GPU; nothing is computed. Views are free. A launch reads each of its inputs and writes each of its outputs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from benchmarks._compat import READ_NUMBER, TorchDispatchMode, arguments_of, storage_number, tree_leaves
from benchmarks.compiled import Launch, launches_noted
from sdft.planning.pretend import on_in_backward

aten = torch.ops.aten

PRODUCTS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm)
#: In-place operations that do not read what they write over.
OVERWRITES = (aten.copy_, aten.fill_, aten.zero_)
ALLOCATES = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
#: The host waits for the device to know the result, or its size.
WAITS = (READ_NUMBER, aten.nonzero, aten.masked_select, aten.equal)


@dataclass(frozen=True)
class Touch:
    """Memory that a launch reads or writes: which storage, the view's shape, and its distinct bytes."""

    storage: int
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Op:
    """One launch, or one wait of the host."""

    name: str
    reads: tuple[Touch, ...] = ()
    writes: tuple[Touch, ...] = ()
    flops: int = 0  # of a matrix product; 0 for everything else
    waits: bool = False

    @property
    def nbytes(self) -> int:
        return sum(touch.nbytes for touch in (*self.reads, *self.writes))


@dataclass
class Record:
    """What a call did, in order, and the most memory it held above its inputs."""

    ops: list[Op] = field(default_factory=list)
    peak: int = 0
    kept: frozenset[int] = frozenset()  # storages that outlive the call


@dataclass(frozen=True)
class Traffic:
    """The pointers through which a Triton kernel reads and writes each element of the tensor once, and the pairs of
    those that it reads, (R, H) and (V, H), whose product it makes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    products: tuple[tuple[str, str], ...] = ()


def record(call: Callable[[], object], traffic: dict[str, Traffic], implementations: dict[Any, Any]) -> Record:
    """What `call` does on meta tensors that pass for CUDA ones.

    `traffic` says what each Triton kernel reads and writes, by its name behind its module's; `implementations`
    are run in place of custom operators, whose fake kernels would hide what they do.
    """
    recorder = _Recorder(traffic, implementations)
    with launches_noted(recorder.launched), passing_for_cuda(recorder.passes_for_cuda), recorder:
        call()
    return recorder.finish()


@contextmanager
def passing_for_cuda(mode: TorchFunctionMode | None = None) -> Iterator[None]:
    """Meta tensors say that they are on a GPU, and what is made on a GPU is a meta tensor."""
    mode = mode or _PassForCuda()
    with on_in_backward(mode), mode:
        yield


class _PassForCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda")
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # a bool in torch's stubs
            return True
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    def __init__(self, traffic: dict[str, Traffic], implementations: dict[Any, Any]) -> None:
        super().__init__()
        self.passes_for_cuda = _PassForCuda()
        self.noted = Record()
        self._traffic = traffic
        self._implementations = implementations
        self._storages: dict[int, tuple[int, StorageWeakRef, int]] = {}  # by address: number, whether alive, bytes
        self._numbers = 0

    def finish(self) -> Record:
        self.noted.kept = frozenset(number for number, _, _ in self._storages.values())
        return self.noted

    def launched(self, launch: Launch) -> None:
        name = f"{launch.kernel.fn.__module__.rpartition('.')[2]}.{launch.name}"
        if name not in self._traffic:
            raise KeyError(f"what {name} reads and writes is not stated: add it to the ledger's TRAFFIC")
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
        reads, writes = (
            [given[pointer] for pointer in pointers if given[pointer] is not None]
            for pointers in (self._traffic[name].reads, self._traffic[name].writes)
        )
        flops = sum(2 * given[rows].numel() * len(given[head]) for rows, head in self._traffic[name].products)
        self.noted.ops.append(Op(name, self._touches(reads), self._touches(writes), flops))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._implementations:
            with self.passes_for_cuda, self:
                return self._implementations[func](*args, **kwargs)
        with self:
            made_of_others = func.decompose(*args, **kwargs)
        if made_of_others is not NotImplemented:
            return made_of_others
        packet = func.overloadpacket
        if packet is READ_NUMBER:
            self._note(Op(str(packet), waits=True))
            return 0  # the comparisons that ask whether there is anything left to do: there is not
        # On tensors without values torch 2.11 takes a product's `out_dtype` for its `beta`.
        into = kwargs.get("out") if packet in PRODUCTS else None
        result = func(*args, **kwargs) if into is None else into
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        reads, writes = _accesses(func, args, kwargs)
        before = {storage_number(value.untyped_storage()) for value in given}
        made = [value for value in results if storage_number(value.untyped_storage()) not in before]
        for value in made:
            self._number(value, nbytes=value.untyped_storage().nbytes())
        if packet not in ALLOCATES and (writes or made):
            self._note(
                Op(
                    str(packet),
                    self._touches(reads),
                    self._touches([*writes, *made]),
                    flops=_product_flops(args) if packet in PRODUCTS else 0,
                    waits=packet in WAITS,
                )
            )
        self._weigh()
        return result

    def _note(self, op: Op) -> None:
        if op.waits or any(touch.nbytes for touch in op.writes):
            self.noted.ops.append(op)

    def _touches(self, tensors: list[Tensor]) -> tuple[Touch, ...]:
        return tuple(Touch(self._number(tensor), tuple(tensor.shape), _distinct_bytes(tensor)) for tensor in tensors)

    def _number(self, tensor: Tensor, nbytes: int = 0) -> int:
        """The storage's number; what is seen before it is made was there before the call, and weighs nothing."""
        storage = tensor.untyped_storage()
        key = storage_number(storage)
        if key not in self._storages:
            self._numbers += 1
            self._storages[key] = (self._numbers, StorageWeakRef(storage), nbytes)
        return self._storages[key][0]

    def _weigh(self) -> None:
        self._storages = {key: known for key, known in self._storages.items() if not known[1].expired()}
        self.noted.peak = max(self.noted.peak, sum(nbytes for _, _, nbytes in self._storages.values()))


def _accesses(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments that are read and those that are written, by the operator's schema."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    name = func.overloadpacket.__name__
    takes_its_form = name.startswith("new_") or name.endswith("_like")
    overwrites = kwargs.get("beta") == 0 or func.overloadpacket in OVERWRITES
    unread = [args[0]] if overwrites or takes_its_form else []
    for argument, value in _bound(arguments_of(func), args, kwargs):
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            writes += tensors
        if not (argument.is_out or any(value is other for other in unread)):
            reads += tensors
    return reads, writes


def _bound(arguments: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    yield from zip(arguments, args, strict=False)
    yield from ((argument, kwargs[argument.name]) for argument in arguments if argument.name in kwargs)


def _product_flops(args: Any) -> int:
    left, right = [value for value in args if isinstance(value, Tensor)][-2:]
    return 2 * left.numel() * right.shape[-1]


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of a view, where broadcast dimensions lie on top of each other."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= 0 if size == 0 else 1 if stride == 0 else size
    return count * tensor.element_size()
