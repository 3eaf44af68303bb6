"""Self-distillation fine-tuning (arXiv 2601.19897) on the fused losses of `sdft_kernels`.

What is named here is imported once it is asked for, so that `import sdft` stays quick.
"""

import importlib
from typing import Any

__all__ = ["SDFTConfig", "SDFTTrainer", "load_model"]

WHERE = {"SDFTConfig": "sdft.settings.arguments", "SDFTTrainer": "sdft.trainer", "load_model": "sdft.models.load"}


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})


def __getattr__(name: str) -> Any:
    if name in WHERE:
        return getattr(importlib.import_module(WHERE[name]), name)
    raise AttributeError(f"module 'sdft' has no attribute {name!r}")
