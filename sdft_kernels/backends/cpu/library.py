"""Finds, checks and opens the library of compiled kernels, and defines the structures that it takes from Python.

tests/test_cpu_backend.py holds the structures and signatures here against kernels.c.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
from enum import IntEnum

from sdft_kernels import callers

#: The version of the interface between this module and the library: `INTERFACE` in kernels.c.
INTERFACE = 4


class Constant(IntEnum):
    """Places among a token's constants, which its gradient needs: `enum constant`."""

    A = 0
    B = 1
    C = 2
    P_FACTOR = 3
    Q_FACTOR = 4
    CENTRE = 5
    PEAK_RATIO = 6
    SHARE = 7
    REST = 8
    LOG_SHARE = 9
    SLOPE = 10
    UNIFORM = 11
    HARD_FACTOR = 12


class Options(ctypes.Structure):
    """How logits come from products, u and `factor`, as the kernels read it: `struct options`."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("inner", ctypes.c_float),
        ("hard_ratio", ctypes.c_float),
        ("capped", ctypes.c_int32),
    )


class Model(ctypes.Structure):
    """What makes some columns of a tile's logits: `struct model`."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("first", ctypes.c_long),
        ("tokens", ctypes.c_long),
        ("hidden_size", ctypes.c_long),
        ("head_stride", ctypes.c_long),
    )


class Labels(ctypes.Structure):
    """Labels of a tile's columns in rising order, and a number for each; or none: `struct labels`."""

    _fields_ = (("label", ctypes.c_void_p), ("value", ctypes.c_void_p), ("each", ctypes.c_long))


class Carry(ctypes.Structure):
    """What a tile's gradient is multiplied with, and where that goes: `struct carry`."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("head_gradient", ctypes.c_void_p),
        ("bias_gradient", ctypes.c_void_p),
        ("hidden_gradient", ctypes.c_void_p),
        ("target", Labels),
        ("hidden_size", ctypes.c_long),
        ("head_stride", ctypes.c_long),
        ("head_gradient_stride", ctypes.c_long),
        ("add", ctypes.c_int32),
        ("first_tile", ctypes.c_int32),
    )


@functools.cache
def find() -> ctypes.CDLL | None:
    """The compiled kernels, or None, with one warning, where they were not built or cannot be used."""
    spec = importlib.util.find_spec("sdft_kernels.backends.cpu._kernels")
    if spec is None or spec.origin is None:
        callers.warn(
            "the compiled CPU kernels were not built when sdft-kernels was installed, and the loss on a CPU is slower; "
            "to mend it, install sdft-kernels again where there is a C compiler"
        )
        return None
    try:
        return load(spec.origin)
    except OSError as error:
        callers.warn(
            f"the compiled CPU kernels in {spec.origin} are not used, and the loss is slower: {error}; to mend it, "
            "install sdft-kernels again (pip install --force-reinstall --no-deps)"
        )
        return None


def load(path: str) -> ctypes.CDLL:
    """A library of the compiled kernels; OSError where it is none, was cut off or is for another release."""
    _check_whole(path)
    found = ctypes.CDLL(path)
    version = getattr(found, "interface_version", None)
    if version is None or (built_for := version()) != INTERFACE:
        raise OSError("it has no interface_version" if version is None else f"it is of interface {built_for}")
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    logits, options = (pointer, size, size, size), ctypes.POINTER(Options)
    pair = (*logits, options, options, number, ctypes.c_double)
    models = ctypes.POINTER(Model)
    found.fold.argtypes = (*pair, models, number, ctypes.POINTER(Labels), pointer, number)
    found.fold_mixture.argtypes = (*pair, pointer, pointer, number)
    found.carry_back.argtypes = (*pair, pointer, ctypes.POINTER(Carry), pointer, number)
    for kernel in (found.fold, found.fold_mixture, found.carry_back):
        kernel.restype = None
    found.carry_back_scratch.argtypes, found.carry_back_scratch.restype = (size,), size
    return found


@functools.cache
def divergence_codes() -> dict[str, int]:
    """The number by which the kernels know each divergence."""
    found = find()
    assert found is not None, "the compiled kernels were not built"
    names = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(found, "divergence_names"))).decode()
    return {name: code for code, name in enumerate(names.split())}


def _check_whole(path: str) -> None:
    """OSError for a file that ends before it should: to map it would end the process, not raise.

    An ELF file's header says where its table of sections lies, which linkers write last.
    """
    with open(path, "rb") as file:
        header, size = file.read(64), os.fstat(file.fileno()).st_size
    if header[:4] != b"\x7fELF" or len(header) < 64:
        raise OSError("it is no library" if size else "it is empty")
    is_64_bit = header[4] == 2
    (table,) = struct.unpack_from("<Q" if is_64_bit else "<I", header, 40 if is_64_bit else 32)
    entry, count = struct.unpack_from("<HH", header, 58 if is_64_bit else 46)
    if table + entry * count > size:
        raise OSError(f"it has {size} bytes of {table + entry * count}")
