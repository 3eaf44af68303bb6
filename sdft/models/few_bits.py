"""Weights that are rounded to 4 bits as a model is loaded, by bitsandbytes.

8 bits are not offered: bitsandbytes then rounds the inputs of products too, and chooses by all tokens of a batch which
columns it leaves whole, so that a token's hidden states depend on the tokens after it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from sdft.errors import UsageError


def rounding(source: str, dtype: str, device: torch.device | str, *, trust_remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` is to be told, so that the linear layers but the head keep 4 bits of each weight.

    They are NormalFloats (arXiv 2305.14314), whose scales are rounded too. Products are computed in `dtype`, or in the
    stored type where that is "auto".
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=stored_type(config) if dtype == "auto" else getattr(torch, dtype),
    )
    return {"quantization_config": how, "device_map": {"": device}}


def stored_type(config: Any) -> torch.dtype:
    """The type that a model's weights are stored in, by its configuration: that of its text, or of all of it."""
    return config.get_text_config().dtype or config.dtype or torch.float32


def check_rounded(name: str, model: PreTrainedModel) -> None:
    """UsageError where most of a model's weights stayed as they were: those of experts are in no linear layers."""
    ends = {
        id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    }
    weights = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in ends]
    packed = sum(2 * weight.numel() for weight in weights if not weight.is_floating_point())
    plain = sum(weight.numel() for weight in weights if weight.is_floating_point())
    if plain > packed:
        raise UsageError(
            f"model is {name!r}, of whose weights {plain:,} are in no linear layers and stay as they are stored, and "
            f"{packed:,} are rounded to 4 bits; it must be loaded without teacher_bits"
        )
