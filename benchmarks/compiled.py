"""Compiles for a GPU that is not there: the very kernels that a call would launch, specialised as it would be.

`record_launches` runs a call on CPU tensors with every launch noted instead of done; `compile_launch` compiles one
for a target; `resources` reads what the target's own tools say of the result. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks._compat import specialised
from benchmarks.inner_loop import Loop, kernel_loops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One launch that was asked for: the kernel, its grid, and its arguments with compile options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextmanager
def launches_noted(note: Callable[[Launch], None]) -> Iterator[None]:
    """Every launch of a Triton kernel goes to `note` instead of a device or the interpreter; one that would be tuned
    first, in the first of its configurations."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        note(Launch(kernel, tuple(grid(options) if callable(grid) else grid), arguments, options))

    def tune(tuner: Any, *arguments: Any, **options: Any) -> None:
        chosen = tuner.configs[0]
        if chosen.pre_hook is not None:
            chosen.pre_hook(dict(zip(tuner.arg_names, arguments, strict=False)) | options | chosen.all_kwargs())
        tuner.fn.run(*arguments, **options, **chosen.all_kwargs())

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(Autotuner, "run", tune),
    ):
        yield


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch. Its tensors may lie on the CPU; nothing is computed in them."""
    noted: list[Launch] = []
    with launches_noted(noted.append):
        call()
    return noted


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The binary that this launch would compile to on the target."""
    backend = make_backend(target)
    options, signature, constexprs, attributes = specialised(launch.kernel, launch.arguments, launch.options, backend)
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes, for each thread but for shared memory."""

    registers: int
    spills: int  # loads and stores of local memory; on AMD vector registers without room
    scalar_spills: int  # registers that are a warp's and not a thread's, without room: AMD only
    stack: int  # bytes
    shared: int  # bytes for a program
    matrix: dict[str, int]  # instructions of the tensor cores in the binary by kind
    widths: dict[str, int]  # global loads and stores in the binary by instruction width
    occupancy: float  # resident warps over the most that a multiprocessor holds
    inner: Loop
    around: Loop | None  # of a loop in a loop, the outer one


@dataclass(frozen=True)
class Multiprocessor:
    """What the warps resident on one share: registers a thread times threads, bytes, and places."""

    registers: int
    shared: int
    warps: int
    programs: int
    shared_reserved: int = 0  # of each program


#: CUDA C++ Programming Guide, "Compute Capabilities"; AMD CDNA 3 ISA and the MI300X tuning guide (4 SIMDs of 512
#: vector registers a lane and 8 waves each).
MULTIPROCESSORS = {
    80: Multiprocessor(65_536, 164 << 10, 64, 32, 1024),
    90: Multiprocessor(65_536, 228 << 10, 64, 32, 1024),
    100: Multiprocessor(65_536, 228 << 10, 64, 32, 1024),
    "gfx942": Multiprocessor(4 * 512 * 64, 64 << 10, 32, 32),
}


def occupancy(registers: int, shared: int, warps: int, target: GPUTarget) -> float:
    """Resident warps over the most there can be, by registers, shared memory and places."""
    limits = MULTIPROCESSORS[target.arch]
    # Registers are given out to a warp in eights for each thread, from the quarter of the file where it runs.
    of_a_warp = -(-registers // 8) * 8 * target.warp_size
    warps_by_registers = 4 * (limits.registers // 4 // max(1, of_a_warp))
    programs = min(limits.programs, limits.warps // warps, warps_by_registers // warps)
    taken = shared + limits.shared_reserved
    if taken:
        programs = min(programs, limits.shared // taken)
    return programs * warps / limits.warps


#: What was read of binaries so far, by their hash: many calls launch the same ones.
_KNOWN: dict[str, Resources] = {}


def resources(compiled: CompiledKernel, target: GPUTarget) -> Resources:
    """From cuobjdump and the disassembly on NVIDIA, from the metadata that the assembler keeps on AMD."""
    if compiled.hash not in _KNOWN:
        read = _nvidia if target.backend == "cuda" else _amd
        _KNOWN[compiled.hash] = read(compiled, target)
    return _KNOWN[compiled.hash]


def disassemble(compiled: CompiledKernel) -> str:
    """The machine code of an NVIDIA binary, by the tool in triton's wheel."""
    return _tool("nvdisasm", compiled, "-c")


def _nvidia(compiled: CompiledKernel, target: GPUTarget) -> Resources:
    usage = _tool("cuobjdump", compiled, "-res-usage")
    code = disassemble(compiled)
    registers = _number(r"REG:(\d+)", usage)
    inner, around = kernel_loops(code, target.backend)
    return Resources(
        registers=registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        scalar_spills=0,
        stack=_number(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        matrix=_count(re.findall(r"\b((?:HMMA|HGMMA|UTC\w*MMA)(?:\.\d\w+)?)\b", code)),
        widths=_count(re.findall(r"\b((?:LDG|LDGSTS|STG)\.E(?:\.\w+)*)\b", code)),
        occupancy=occupancy(registers, compiled.metadata.shared, compiled.metadata.num_warps, target),
        inner=inner,
        around=around,
    )


def _amd(compiled: CompiledKernel, target: GPUTarget) -> Resources:
    code = compiled.asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s*(\d+)", code)
    inner, around = kernel_loops(code, target.backend)
    return Resources(
        registers=registers,
        # Only these go to memory. Scalar registers without room go to the lanes of a vector register and come back
        # (v_writelane, v_readlane): instructions, but no traffic.
        spills=_number(r"\.vgpr_spill_count:\s*(\d+)", code),
        scalar_spills=_number(r"\.sgpr_spill_count:\s*(\d+)", code),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", code),
        shared=compiled.metadata.shared,
        matrix=_count(re.findall(r"\b(v_mfma_\w+)", code)),
        widths=_count(re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)\b", code)),
        occupancy=occupancy(registers, compiled.metadata.shared, compiled.metadata.num_warps, target),
        inner=inner,
        around=around,
    )


def _tool(name: str, compiled: CompiledKernel, *flags: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, *flags, file.name], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in the compiler's output")
    return int(found.group(1))


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
