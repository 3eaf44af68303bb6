"""Self-distillation fine-tuning (arXiv 2601.19897) on the fused losses of `sdft_kernels`.

`SDFTTrainer` and `SDFTConfig` are here once asked for, so that `import sdft` stays quick.
"""

from typing import Any

__all__ = ["SDFTConfig", "SDFTTrainer"]


def __getattr__(name: str) -> Any:
    if name == "SDFTConfig":
        from sdft.config import SDFTConfig

        return SDFTConfig
    if name == "SDFTTrainer":
        from sdft.trainer import SDFTTrainer

        return SDFTTrainer
    raise AttributeError(f"module 'sdft' has no attribute {name!r}")
