"""The teacher: the model as it was before training, or a slow average of the student.

Arithmetic of the average: each step, average += rate * (student - average), in float32 whatever the student's type.
In bfloat16, with 8 bits of mantissa, a rate of 0.01 would round to no movement at all.

Parameters that do not train are the student's own tensors, shared; only what trains is copied.
"""

from __future__ import annotations

import copy
import os

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from sdft.errors import UsageError

AVERAGE_FILE = "teacher_average.safetensors"


class Teacher:
    """The frozen base model: what scores the rollouts, and what forgetting is measured against."""

    def __init__(self, student: PreTrainedModel) -> None:
        self.model = frozen_copy(student)

    def update(self, student: PreTrainedModel) -> None:
        """Follow the student after an optimizer step; the base model stays where it is."""

    def save(self, folder: str) -> None:
        """Put into a checkpoint what cannot be had again; the base model comes with the run itself."""

    def load(self, folder: str) -> None:
        """Take back from a checkpoint what `save` put there."""


class AverageTeacher(Teacher):
    """An exponential moving average of the student's trained parameters."""

    def __init__(self, student: PreTrainedModel, rate: float) -> None:
        super().__init__(student)
        self.rate = rate
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.parameters = {name: p for name, p in self.model.named_parameters() if name in trained}
        # A float32 parameter is its own average; a shorter one keeps a float32 average beside it.
        self.average = {name: p.data.float() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, student: PreTrainedModel) -> None:
        for name, parameter in student.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter.float(), self.rate)
        self._use_average()

    def save(self, folder: str) -> None:
        save_file(self.average, os.path.join(folder, AVERAGE_FILE), metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, folder: str) -> None:
        path = os.path.join(folder, AVERAGE_FILE)
        if not os.path.isfile(path):
            raise UsageError(f"{folder} has no {AVERAGE_FILE}: it was not saved by a run with teacher 'ema'")
        for name, tensor in load_file(path).items():
            self.average[name].copy_(tensor)
        self._use_average()

    def _use_average(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.average[name].data_ptr():
                parameter.data.copy_(self.average[name])


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for evaluation that shares the parameters which do not train."""
    shared: dict[int, nn.Parameter] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def make_teacher(kind: str, student: PreTrainedModel, ema_rate: float) -> Teacher:
    return AverageTeacher(student, ema_rate) if kind == "ema" else Teacher(student)
