"""Long sequences through MLPs and norms, a tile of tokens at a time.

An MLP or a norm treats every token alone, so a sequence can go through it in tiles, with the same result. Nothing
inside it is kept for the backward pass, which makes each tile again: of all that a layer keeps for a token, MLP and
norms have four fifths (SmolLM2 in float32). Attention, which sees the whole sequence, is left as it is.

A module is given a class that works so, in place of its own: its parameters, their names and copies of it stay as they
were.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.forward import evaluating


class Tiled(nn.Module):
    """Takes more than `tile_tokens` tokens a tile at a time. It comes before a module's own class."""

    tile_tokens: int

    def forward(self, hidden: Tensor) -> Tensor:
        """The module's output for hidden states (..., H)."""
        own = super().forward
        if hidden.shape[:-1].numel() <= self.tile_tokens:
            return own(hidden)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not (torch.is_grad_enabled() and (hidden.requires_grad or parameters)):
            return _forward(own, hidden, self.tile_tokens)
        return _ByTiles.apply(own, self.tile_tokens, _Kept.apply(hidden), *parameters)


class _Kept(torch.autograd.Function):
    """Keeps hidden states for `_ByTiles`, whose backward pass finds them here.

    Were they kept by that itself, they would be there only after its forward pass. Activation checkpointing makes
    things again until all that was kept is there, and so need not make this forward pass again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], tile: int, hidden: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.function, ctx.tile, ctx.parameters = function, tile, parameters
        ctx.precision = _precision(hidden.device.type)
        if not hidden.requires_grad:  # then `_Kept` is not in the graph
            ctx.save_for_backward(hidden)
        return _forward(function, hidden, tile)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2]
        hidden = (ctx.next_functions[0][0] if wanted else ctx).saved_tensors[0]
        of_hidden = hidden.new_empty(hidden.shape) if wanted else None
        of_parameters: list[Tensor | None] = [None] * len(ctx.parameters)
        for part, rows in _tiles(hidden, ctx.tile):
            given = rows.detach().requires_grad_(wanted)
            with torch.enable_grad(), torch.autocast(hidden.device.type, **ctx.precision):
                out = ctx.function(given)
            inputs = (*([given] if wanted else []), *ctx.parameters)
            of_tile = gradient.reshape(1, -1, gradient.shape[-1])[:, part]
            # A tile may have no use for a parameter: that of an expert, or of an adapter that is switched off.
            found = list(torch.autograd.grad(out, inputs, of_tile, allow_unused=True))
            if of_hidden is not None:
                of_hidden.view(1, -1, hidden.shape[-1])[:, part] = cast(Tensor, found.pop(0))
            of_parameters = [_sum(total, more) for total, more in zip(of_parameters, found, strict=True)]
        return None, None, of_hidden, *of_parameters


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more


def _forward(function: Callable[[Tensor], Tensor], hidden: Tensor, tile: int) -> Tensor:
    out: Tensor | None = None
    with torch.no_grad():
        for part, rows in _tiles(hidden, tile):
            made = function(rows)
            if out is None:
                out = made.new_empty(*hidden.shape[:-1], made.shape[-1])
            out.view(1, -1, made.shape[-1])[:, part] = made
    assert out is not None
    return out


def _tiles(hidden: Tensor, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Each tile's place among all tokens, and its hidden states (1, tokens, H)."""
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    for start in range(0, rows.shape[1], tile):
        part = slice(start, min(start + tile, rows.shape[1]))
        yield part, rows[:, part]


def _precision(device: str) -> dict[str, Any]:
    return {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}


def tile(model: PreTrainedModel, tokens: int | None) -> list[str]:
    """Have the MLPs and norms of the model's layers take sequences in tiles of `tokens` tokens; returns their names.

    A module is one of these if its layer holds it, if it takes and gives hidden states alone, and if tiles of random
    ones give what the whole gives. With None, modules take sequences whole again.
    """
    size = model.config.get_text_config().hidden_size
    tiled = []
    for layer in layers_of(model):
        for name, module in layer.named_children():
            if isinstance(module, Tiled):
                module.tile_tokens = tokens or sys.maxsize
            elif tokens is not None and _treats_tokens_alone(module, size, model.dtype):
                kind = type(module)
                module.__class__ = _tiled(kind)
                cast(Tiled, module).tile_tokens = tokens
            if isinstance(module, Tiled):
                tiled.append(name)
    return list(dict.fromkeys(tiled))


#: Classes with tiles, by the class that they stand for.
_WITH_TILES: dict[type, type] = {}


def _tiled(kind: type) -> type:
    """The class, which keeps its name, with tiles."""
    if kind not in _WITH_TILES:
        _WITH_TILES[kind] = type(kind.__name__, (Tiled, kind), {"__module__": kind.__module__})
    return _WITH_TILES[kind]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """A model's layers: the largest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()), default=nn.ModuleList())


@torch.no_grad()
def _treats_tokens_alone(module: nn.Module, hidden_size: int, dtype: torch.dtype) -> bool:
    parameter = next(module.parameters(), None)
    if parameter is None:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 6, hidden_size, generator=generator).to(parameter.device, dtype)
    with evaluating(module), contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError):
        whole = module(hidden)
        if not isinstance(whole, Tensor) or whole.shape != hidden.shape:
            return False
        parts = torch.cat([module(part) for part in hidden.split(2, dim=1)], dim=1)
        rounding = max(1e-4, 4 * torch.finfo(dtype).eps)
        return bool((whole - parts).abs().max() <= rounding * whole.abs().max())
    return False
