"""The settings of a call of the loss: one object from the public function to the operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sdft_kernels import arguments
from sdft_kernels.backends.select import BACKENDS
from sdft_kernels.divergences import DIVERGENCES, LogitOptions, Objective, is_mixture


@dataclass(frozen=True)
class LossOptions:
    """The settings of `fused_linear_divergence`, which says what each means. They are checked when they are made."""

    divergence: str
    beta: float
    temperature: float
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    importance_clip: float | None
    reduction: str
    vocab_size: int | None
    max_chunk_bytes: int | None
    backend: str

    def __post_init__(self) -> None:
        """Refuses settings that no tensors could make right."""
        arguments.one_of("divergence", self.divergence, DIVERGENCES)
        arguments.one_of("reduction", self.reduction, arguments.REDUCTIONS)
        arguments.one_of("backend", self.backend, BACKENDS)
        if is_mixture(self.divergence):
            arguments.share("beta", self.beta, self.divergence)
        arguments.positive("temperature", self.temperature)
        for name in ("student_logit_scale", "teacher_logit_scale"):
            arguments.nonzero(name, getattr(self, name))
            arguments.slope(name, getattr(self, name), self.temperature)
        for name in ("student_softcap", "teacher_softcap", "importance_clip"):
            if getattr(self, name) is not None:
                arguments.positive(name, getattr(self, name))
        arguments.workspace(self.max_chunk_bytes)

    def compared(self, student_weight: Tensor, teacher_weight: Tensor) -> int:
        """The number of vocabulary entries that are compared: the first ones of both heads."""
        return self.vocab_size or min(student_weight.shape[0], teacher_weight.shape[0])

    @property
    def objective(self) -> Objective:
        """What is computed for each token."""
        return Objective(
            self.divergence,
            self.beta,
            LogitOptions(self.student_logit_scale, self.student_softcap, self.temperature),
            LogitOptions(self.teacher_logit_scale, self.teacher_softcap, self.temperature),
            self.importance_clip,
        )
