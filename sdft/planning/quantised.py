"""Weights in 4 or 8 bits, as bitsandbytes keeps them: packed, and unpacked for each product with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft.errors import UsageError

#: Numbers that share a scale in 4 bits, and scales that share one where they are quantised too.
BLOCK, SCALES = 64, 256


@dataclass(frozen=True)
class Quantisation:
    """How linear layers keep their weights; `products` is the type that a layer computes in, its input's if None."""

    bits: int
    scales_quantised: bool = False
    products: torch.dtype | None = None
    left_out: tuple[str, ...] = ()

    def bytes_of(self, rows: int, columns: int) -> int:
        """The bytes of a weight with its scales."""
        count = rows * columns
        if self.bits == 8:
            return count + 4 * rows
        blocks = -(-count // BLOCK)
        scales = blocks + 4 * -(-blocks // SCALES) if self.scales_quantised else 4 * blocks
        return -(-count // 2) + scales


def quantisation_of(model_config: Any) -> Quantisation | None:
    """What a model's configuration says of it; UsageError for a way that is not planned."""
    given = getattr(model_config, "quantization_config", None)
    if given is None:
        return None
    told: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    in_4_bits = told.get("load_in_4bit") or told.get("_load_in_4bit")
    in_8_bits = told.get("load_in_8bit") or told.get("_load_in_8bit")
    method = str(getattr(told.get("quant_method"), "value", told.get("quant_method") or "bitsandbytes"))
    if method != "bitsandbytes" or not (in_4_bits or in_8_bits):
        raise UsageError(
            f"model has a quantization_config of {method}; sdft plan knows that of bitsandbytes with load_in_4bit or "
            "load_in_8bit"
        )
    left_out = tuple(told.get("llm_int8_skip_modules") or ())
    if in_8_bits:
        return Quantisation(8, left_out=left_out)
    products = str(told.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    return Quantisation(4, bool(told.get("bnb_4bit_use_double_quant")), getattr(torch, products), left_out)


def quantise(model: PreTrainedModel, how: Quantisation) -> None:
    """Have the model's linear layers keep their weights in few bits, but for its head and what is left out."""
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        left_out = any(f".{part}." in f".{name}." for part in how.left_out)
        if type(layer) is nn.Linear and layer is not head and not left_out:
            size = how.bytes_of(*layer.weight.shape)
            packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.__class__ = QuantisedLinear
            cast(QuantisedLinear, layer).quantisation = how
    model.requires_grad_(False)


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is in few bits and does not train."""

    quantisation: Quantisation

    def forward(self, input: Tensor) -> Tensor:
        """The product, in the type of what it is given."""
        how = self.quantisation
        given = input.to(how.products or input.dtype)
        return _Product.apply(given, self.weight, self.bias, self.out_features, how).to(input.dtype)


class _Product(torch.autograd.Function):
    """What a product takes and keeps. In 4 bits the weight is unpacked; in 8 bits the input is rounded too."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, packed: Tensor, bias: Tensor | None, features: int, how: Quantisation
    ) -> Tensor:
        ctx.shape = (features, input.shape[-1])
        ctx.save_for_backward(packed, *([input] if how.bits == 8 else []))
        if how.bits == 4:
            weight = input.new_empty(ctx.shape)
            return nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))
        rounded = input.to(torch.int8)
        product = rounded.new_empty(*input.shape[:-1], features, dtype=torch.int32)
        return product.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = gradient.new_empty(ctx.shape)
        return gradient @ weight, None, None, None, None
