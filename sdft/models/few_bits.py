"""Weights that are rounded to 4 or 8 bits as a model is loaded, by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from sdft.errors import UsageError


def rounding(
    bits: int, name: str, source: str, dtype: str, device: torch.device | str, *, trust_remote_code: bool
) -> dict[str, Any]:
    """What `from_pretrained` is to be told, so that the linear layers but the head keep so many bits of each weight.

    In 4 bits they are NormalFloats (arXiv 2305.14314), whose scales are rounded too, and products are computed in
    `dtype`, or in the stored type where that is "auto". UsageError where the stored weights have few bits already.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"model is {name!r}, whose weights are quantised already; no bits may be asked for")
    products = (config.get_text_config().dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=products,
    )
    return {"quantization_config": how, "device_map": {"": device}}
