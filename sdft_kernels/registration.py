"""Puts an operator of this package into torch's library.

`torch.library.custom_op` would do the same, but the first call of what it makes imports torch's compiler, and that
takes seconds and 150 MiB in programs that compile nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdft_kernels._compat import leave_uncompiled

#: It holds the operators for as long as the package is imported.
LIBRARY = torch.library.Library("sdft_kernels", "FRAGMENT")


def operator(name: str, function: Callable[..., Any], *, mutates_args: Sequence[str] = ()) -> Any:
    """The operator `sdft_kernels::name`, which runs `function` on every device; its schema is the function's."""
    schema = torch.library.infer_schema(function, mutates_args=mutates_args)
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    leave_uncompiled(function)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.sdft_kernels, name).default
