"""Arguments of the kernels that multiply: operands in the form that they load, and the tiles that the tuner tries."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sdft_kernels._compat import interpreted
from sdft_kernels.backends.interface import HeadOperands

Tile = tuple[int, int, int, int]

#: The compile options of each kind of device. Stages are tiles of hidden entries that are loaded ahead: an AMD
#: multiprocessor has 64 KiB of shared memory for them, NVIDIA's have 164 to 228. The limit on registers lets NVIDIA's
#: assembler use all of them; left to itself it spills a few, so that another program may run beside this one.
DEVICE_OPTIONS = {
    "hopper": {"num_stages": 4, "maxnreg": 255},
    "cuda": {"num_stages": 3, "maxnreg": 255},
    "hip": {"num_stages": 2},
}


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the kernels here take operands of this dtype: tensor cores would round float32 ones to TF32."""
    return dtype in (torch.bfloat16, torch.float16)


class Operands:
    """Heads in the form that the kernels take. They are made for the first chunk of tokens and kept for the others."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def head(self, head: HeadOperands) -> HeadOperands:
        """The head in that form. Two heads that share a weight share it again."""
        if id(head.weight) not in self._made:
            self._made[id(head.weight)] = operand(head.weight)
        return HeadOperands(self._made[id(head.weight)], head.bias)


def operand(matrix: Tensor) -> Tensor:
    """The matrix with rows that load 16 bytes at a time: contiguous, aligned, zeros up to a multiple of 16 entries."""
    rows, size = matrix.shape
    if matrix.stride(1) != 1 or size % 16 or matrix.stride(0) % 16 or matrix.data_ptr() % 16:
        aligned = matrix.new_zeros(rows, -(-size // 16) * 16)
        aligned[:, :size] = matrix
        matrix = aligned
    # Triton's interpreter would multiply the bit patterns of bfloat16; in float32 the products are the same.
    return matrix.float() if interpreted() else matrix


def copies_tiles(matrix: Tensor) -> bool:
    """Whether the matrix is on a Hopper GPU, which has an engine that copies tiles, and takes larger ones.

    Later GPUs have such an engine too, but nobody has measured there.
    """
    real = matrix.is_cuda and not matrix.is_meta and torch.version.hip is None
    return real and torch.cuda.get_device_capability(matrix.device)[0] == 9


def source(matrix: Tensor, copied: bool) -> Tensor | TensorDescriptor:
    """The matrix itself, or a description of it for the engine that copies tiles."""
    if not copied:
        return matrix
    shape_of_a_tile = [1, 1]  # `_shape_tiles` sets it
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], shape_of_a_tile)


def _shape_tiles(arguments: dict[str, Any]) -> None:
    """Tells the engine how large a configuration's tiles are, before each launch."""
    for name, given in arguments.items():
        if isinstance(given, TensorDescriptor):
            rows = "BLOCK_N" if name.endswith("weight_pointer") else "BLOCK_M"
            given.block_shape = [arguments[rows], arguments["BLOCK_K"]]


def configurations(tiles: dict[str, tuple[Tile, ...]], kind: str) -> list[triton.Config]:
    """What the tuner tries on a device of this kind. The interpreter, which cannot tell which is faster, tries one."""
    return [
        triton.Config(
            {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, pre_hook=_shape_tiles, **DEVICE_OPTIONS[kind]
        )
        for m, n, k, warps in tiles[kind][: 1 if interpreted() else None]
    ]


#: The kind of the devices that this torch is built for.
_BACKEND = "cuda" if torch.version.hip is None else "hip"


def choices(tiles: dict[str, tuple[Tile, ...]]) -> dict[str, Any]:
    """Arguments of `triton.autotune`: the configurations for all kinds of device, and how to pick this one's."""
    copied, others = configurations(tiles, "hopper"), configurations(tiles, _BACKEND)

    def of_this_device(configs: list[triton.Config], *_: Any, COPIED: bool, **__: Any) -> list[triton.Config]:
        ours = copied if COPIED else others
        return [config for config in configs if config in ours]

    configs = others if interpreted() else copied + others
    return {"configs": configs, "prune_configs_by": {"early_config_prune": of_this_device}}
