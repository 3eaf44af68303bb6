"""TRL's own classes, made to construct the trainers here: for those whose trainers are constructed elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from trl import DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.sdpo import SDPOTrainer
from trl.experimental.server_distillation import ServerDistillationTrainer

from sdft_kernels.integrations._compat import construct_instead
from sdft_kernels.integrations.trl.distillation import FusedDistillationTrainer
from sdft_kernels.integrations.trl.labelled import FusedGKDTrainer, FusedGOLDTrainer, FusedIWOPDTrainer
from sdft_kernels.integrations.trl.self_distillation import FusedSDFTTrainer, FusedSDPOTrainer

FUSED: dict[type, type] = {
    DistillationTrainer: FusedDistillationTrainer,
    GKDTrainer: FusedGKDTrainer,
    GOLDTrainer: FusedGOLDTrainer,
    IWOPDTrainer: FusedIWOPDTrainer,
    SDFTTrainer: FusedSDFTTrainer,
    SDPOTrainer: FusedSDPOTrainer,
}


def apply_to_trl() -> Callable[[], None]:
    """Have TRL's trainers, wherever they were imported, construct the fused ones. Returns a function that undoes it.

    A subclass of yours gets the fused methods as well, below its own. TRL's ServerDistillationTrainer, whose teacher is
    a server, stays as it is.

    Example:
        >>> from sdft_kernels.integrations.trl import apply_to_trl
        >>> undo = apply_to_trl()
        >>> undo()
    """
    undone = [construct_instead(base, fused, partial(_with, fused)) for base, fused in FUSED.items()]

    def undo() -> None:
        while undone:
            undone.pop()()

    return undo


@cache
def _with(fused: type, kind: type) -> type:
    """A class of TRL's, or a subclass of one, with the methods of the fused trainer below its own."""
    if issubclass(kind, (fused, ServerDistillationTrainer)):
        return kind
    return fused if kind in FUSED else type(kind.__name__, (kind, fused), {"__module__": kind.__module__})
