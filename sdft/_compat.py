"""Interfaces of transformers that have other names in other releases, each with its reason."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import ContinuousBatchingConfig

#: Before 5.18 a page of the cache was called a block, and flash attention was looked for in any case. GPU machines that
#: only have 5.17 measure rollouts too (docs/gpu.md).
_PAGES_ARE_BLOCKS = "page_size" not in {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}


def batching_config(*, page_size: int, auto_switch_to_flash: bool, **options: Any) -> ContinuousBatchingConfig:
    """transformers' ContinuousBatchingConfig by its newest names."""
    if _PAGES_ARE_BLOCKS:
        return ContinuousBatchingConfig(block_size=page_size, **options)
    return ContinuousBatchingConfig(page_size=page_size, auto_switch_to_flash=auto_switch_to_flash, **options)
