"""The peers that ours is measured beside: whether they are here. One that is not is skipped, and nothing else is."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from benchmarks.gpu_report.cases import described

#: What is imported of each peer, and is not there in its older versions.
OF_THE_LOSS: dict[str, tuple[str, ...]] = {
    "TRL": ("trl.kernels.chunked_divergence",),
    "Liger": ("liger_kernel.chunked_loss", "liger_kernel.ops.fused_linear_jsd"),
    "Liger CuTe": ("cutlass", "liger_kernel.ops.fused_linear_jsd"),
}
OF_TRAINING = {"TRL": ("datasets", "trl.experimental.sdft")}


def absent(needed: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Why each peer that is not here cannot be measured."""
    found = {}
    for peer, modules in needed.items():
        try:
            for module in modules:
                importlib.import_module(module)
        except Exception as error:  # whatever a peer's own import runs into
            found[peer] = described(error)
    return found


def of(method: str) -> str:
    """The peer that a method needs: Liger's are of one package, but for the one that needs a second."""
    return "Liger" if method.startswith("Liger") and method != "Liger CuTe" else method
