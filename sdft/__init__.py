"""Self-distillation fine-tuning (arXiv 2601.19897) on the fused losses of `sdft_kernels`.

`SDFTTrainer` and `SDFTConfig` are here once asked for, so that `import sdft` stays quick.
"""

from typing import Any

__all__ = ["SDFTConfig", "SDFTTrainer"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "SDFTConfig":
        from sdft.arguments import SDFTConfig

        return SDFTConfig
    if name == "SDFTTrainer":
        from sdft.trainer import SDFTTrainer

        return SDFTTrainer
    raise AttributeError(f"module 'sdft' has no attribute {name!r}")
