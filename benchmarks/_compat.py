"""Every private or unstable interface of torch, triton, Liger and TRL that the benchmarks use, each with its reason.

tests/test_compat.py says in a sentence which of them a new release has moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# There is no public module for trees of tensors.
from torch.utils._pytree import tree_map as tree_map

# What planning uses too.
from sdft._compat import READ_NUMBER as READ_NUMBER
from sdft._compat import TorchDispatchMode as TorchDispatchMode
from sdft._compat import storage_number as storage_number
from sdft._compat import tree_leaves as tree_leaves

aten = torch.ops.aten

#: What `scaled_dot_product_attention` runs on a CPU: a mode sees this alone.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

#: Methods of TRL's trainer that a subclass here replaces: its completions and its teacher cannot be given otherwise.
TRL_OVERRIDES = {"_generate": ("prompt_ids",), "_setup_teacher_model": ()}


def arguments_of(operator: Any) -> Any:
    """An operator's arguments, with what is written of them: only its schema says."""
    return operator._schema.arguments


def specialised(kernel: Any, arguments: Any, options: dict[str, Any], backend: Any) -> tuple[Any, Any, Any, Any]:
    """A kernel's compile options, signature, constants and attributes for a launch, as triton finds them just before it
    compiles: it has no way to compile for a GPU that is not there."""
    from triton.runtime.jit import create_function_from_signature

    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*arguments, **options)
    return kernel._pack_args(backend, options, bound, specialization, None)


def liger_jsd() -> Callable[..., Any]:
    """Liger's JSD kernel on whole logits; its public function takes whichever back-end it finds best."""
    from liger_kernel.ops.backends._triton.jsd import jsd_loss_and_grad_triton

    return jsd_loss_and_grad_triton
