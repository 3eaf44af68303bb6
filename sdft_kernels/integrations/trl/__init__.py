"""TRL's distillation trainers with the fused loss: the same losses, gradients and metrics, and no logits in memory.

    from sdft_kernels.integrations.trl import FusedGKDTrainer as GKDTrainer

Each is a subclass of TRL's trainer of the same name and takes the same arguments. `apply_to_trl()` has TRL's own
classes construct them. A teacher that is not here, and the top-k of IW-OPD's JSD, are refused before training starts.
"""

from sdft_kernels.integrations._compat import warn_of_untried

warn_of_untried("trl")

from sdft_kernels.integrations.trl.apply import apply_to_trl  # noqa: E402  # the warning comes before an import fails
from sdft_kernels.integrations.trl.distillation import FusedDistillationTrainer  # noqa: E402
from sdft_kernels.integrations.trl.labelled import FusedGKDTrainer, FusedGOLDTrainer, FusedIWOPDTrainer  # noqa: E402
from sdft_kernels.integrations.trl.self_distillation import FusedSDFTTrainer, FusedSDPOTrainer  # noqa: E402

__all__ = [
    "FusedDistillationTrainer",
    "FusedGKDTrainer",
    "FusedGOLDTrainer",
    "FusedIWOPDTrainer",
    "FusedSDFTTrainer",
    "FusedSDPOTrainer",
    "apply_to_trl",
]
