"""Warnings that name the caller's line, however deep in this package their reason is found."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path

import torch

#: Between the caller and the reason lie files of this package, and of torch, which calls modules and operators.
PASSED_OVER = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warns of the line that called this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PASSED_OVER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
