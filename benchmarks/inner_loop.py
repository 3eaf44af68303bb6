"""The loops in which a compiled kernel spends its time, found in its machine code, and what it does there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

#: (label, instruction, branch target) patterns of nvdisasm's and of LLVM's listings.
_NVIDIA = (r"^(\.L\w+):", r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", r"\bBRA\b.*?(\.L\w+)")
_AMD = (r"^(\.LBB\w+):", r"^\t([a-z]\w+)", r"^\ts_c?branch\w*\s+(\.LBB\w+)")

_SPECIAL = re.compile(r"MUFU|v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f")
_SHUFFLE = re.compile(r"SHFL|C?REDUX|\w+_dpp|ds_swizzle|ds_(?:b)?permute|v_permlane|v_readlane")
_ACCESS = re.compile(r"(?:LDG|LDGSTS|STG)\.E(?:\.\w+)*|(?:global|buffer)_(?:load|store)_\w+")
_WIDE = re.compile(r"\.128$|_dwordx4$|_b128$")


@dataclass(frozen=True)
class Loop:
    """One turn of a loop, of one thread; of the whole kernel where there is none."""

    loops: bool
    instructions: int
    special: int  # exponentials, logarithms and reciprocals
    shuffles: int  # and other exchanges between the threads of a warp
    accesses: dict[str, int]  # of global memory, by instruction with its width

    @property
    def narrow(self) -> int:
        """Accesses of fewer than 16 bytes; without a loop only stores count, for row constants are loaded there."""
        ours = {name: n for name, n in self.accesses.items() if self.loops or "STG" in name or "store" in name}
        return sum(n for name, n in ours.items() if not _WIDE.search(name))

    @property
    def wide_loads(self) -> int:
        return sum(n for name, n in self.accesses.items() if _WIDE.search(name) and ("LDG" in name or "load" in name))


def kernel_loops(code: str, backend: str) -> tuple[Loop, Loop | None]:
    """The innermost loop, and all that one turn of the outermost around it does besides; None where there is no other.

    From nvdisasm's listing ("cuda") or LLVM's ("hip").
    """
    label, instruction, branch = _NVIDIA if backend == "cuda" else _AMD
    lines = code.splitlines()
    starts = {found.group(1): number for number, line in enumerate(lines) if (found := re.match(label, line))}
    loops: list[tuple[int, int]] = []
    waits: list[tuple[int, int]] = []
    for number, line in enumerate(lines):
        target = re.search(branch, line)
        start = starts.get(target.group(1), number) if target else number
        if start < number - 1:  # one line long: the trap after the end
            (waits if _waits(lines[start:number]) else loops).append((start, number))
    # A wait that stands behind the kernel's end has a jump after it, on no condition, which only leads back.
    loops = [loop for loop in loops if "@" in lines[loop[1]] or not any(loop[1] == end + 1 for _, end in waits)]
    inner = [loop for loop in loops if not any(other != loop and _within(other, loop) for other in loops)]
    bodies = {span: _instructions(lines, [span], instruction) for span in inner or [(0, len(lines) - 1)]}
    # Of several loops, the one that reads the rows.
    span, body = max(bodies.items(), key=lambda item: (sum(map(bool, map(_ACCESS.fullmatch, item[1]))), len(item[1])))
    outer = [loop for loop in loops if loop != span and _within(span, loop)]
    if not outer:
        return _turn(body, loops=bool(inner)), None
    first, last = max(outer, key=lambda loop: loop[1] - loop[0])
    inside = sorted(loop for loop in inner if _within(loop, (first, last)))
    between = zip([first, *(end + 1 for _, end in inside)], [*(start - 1 for start, _ in inside), last], strict=True)
    return _turn(body, loops=True), _turn(_instructions(lines, list(between), instruction), loops=True)


def _waits(lines: list[str]) -> bool:
    """Whether a loop of these lines only asks whether a barrier has been reached."""
    return len(lines) <= 4 and any("SYNCS" in line for line in lines)


def _turn(body: list[str], *, loops: bool) -> Loop:
    return Loop(
        loops=loops,
        instructions=len(body),
        special=sum(bool(_SPECIAL.match(name)) for name in body),
        shuffles=sum(bool(_SHUFFLE.match(name)) for name in body),
        accesses=dict(sorted(Counter(name for name in body if _ACCESS.fullmatch(name)).items())),
    )


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _instructions(lines: list[str], spans: list[tuple[int, int]], pattern: str) -> list[str]:
    """Of these lines, from first to last."""
    listed = (line for first, last in spans for line in lines[first : last + 1])
    names = [found.group(1) for line in listed if (found := re.match(pattern, line))]
    return [name for name in names if name not in ("NOP", "s_nop")]
