"""The teacher: the model as it was before training, a slow average of the student, the student itself, or another one.

Whoever it is, `with teacher.scoring() as model` lends a model to score rollouts with, in evaluation mode, and
afterwards everything is as it was. What is kept beside the student depends on what trains:

- all or most weights: a copy, which shares with the student the parameters that do not train;
- an adapter (peft): no second model. The base is the student with its adapter switched off; the average is a second
  set of the adapter's weights, put in place of the first while it scores;
- nothing for a live teacher.

Another model (`sdft.teacher_model`) is there in whole, and frozen.

Arithmetic of the average: average += rate * (student - average), in float32 whatever the student's type. In
bfloat16, with 8 bits of mantissa, a rate of 0.01 would round to no movement at all.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft._compat import CHECKPOINTED
from sdft.errors import TrainingError, UsageError
from sdft.forward import evaluating
from sdft.memory.tiles import layers_of
from sdft.models.adapters import causal_lm, has_adapter

AVERAGE_FILE = "teacher_average.safetensors"


class Teacher:
    """The student itself, as it is: the live teacher, and what the others start from."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    @contextlib.contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        """The model that scores rollouts; it is to be used, and its head read, before the block ends."""
        with evaluating(self.student):
            yield causal_lm(self.student)

    def check_reads(self, tokens: Sequence[int]) -> None:
        """TrainingError for a completion with a token that the teacher, or the student, does not have."""

    def update(self, student: nn.Module) -> None:
        """Follow the student after an optimizer step."""

    def save(self, folder: str) -> None:
        """Put into a checkpoint what cannot be had again; the model that training started from comes with the run."""

    def load(self, folder: str) -> None:
        """Take back from a checkpoint what `save` put there."""


class BaseTeacher(Teacher):
    """A frozen copy of the model that training started from; `offload` keeps its layers on the CPU (see `stream`)."""

    def __init__(self, student: nn.Module, *, offload: bool = False) -> None:
        super().__init__(student)
        self.model = frozen_copy(causal_lm(student))
        if offload:
            stream(self.model, causal_lm(student))

    @contextlib.contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        yield self.model


class ModelTeacher(Teacher):
    """Another model, which is frozen and put where the student is; `offload` keeps its layers on the CPU."""

    def __init__(self, student: nn.Module, model: PreTrainedModel, *, offload: bool = False) -> None:
        super().__init__(student)
        self.model = model.eval().requires_grad_(False)
        self.tokens = min(len(cast(Tensor, each.get_input_embeddings().weight)) for each in (model, causal_lm(student)))
        if not offload:
            nn.Module.to(self.model, causal_lm(student).device)
            return
        if getattr(model.config, "quantization_config", None) is not None:
            raise UsageError("teacher_offload is True, and teacher_model is quantised; it must be False")
        stream(self.model, causal_lm(student))
        _move_all_but_layers(self.model, causal_lm(student).device)

    @contextlib.contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        yield self.model

    def check_reads(self, tokens: Sequence[int]) -> None:
        if (largest := max(tokens, default=0)) >= self.tokens:
            raise TrainingError(
                f"a rollout has token {largest}, which is in the padding of one vocabulary: the model and "
                f"teacher_model have {self.tokens} tokens in common"
            )


class AdapterOffTeacher(Teacher):
    """The model that training started from where an adapter is all that trains: the student without its adapter."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        if (other := trains_beside_adapter(student)) is not None:
            raise UsageError(
                f"the model has an adapter, and {other} trains beside it; with teacher 'base' it must not (LoraConfig: "
                "bias must be 'none'), for the model without its adapter would not be the one that training started "
                "from"
            )

    @contextlib.contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        without_adapter = self.student.disable_adapter()  # type: ignore[operator]  # peft's own, unknown to nn.Module
        with without_adapter, super().scoring() as model:
            yield model


class _Average:
    """The exponential moving average of a model's trained parameters, by name, in float32; on their device, or on the
    CPU if `offload`."""

    def __init__(self, student: nn.Module, rate: float, *, offload: bool = False) -> None:
        self.rate = rate
        self.average = {
            name: parameter.detach().to("cpu" if offload else parameter.device, torch.float32, copy=True)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        for name, parameter in self.followed(student).items():
            average = self.average[name]
            average.lerp_(whole(parameter).to(average.device, torch.float32), self.rate)

    def followed(self, student: nn.Module) -> dict[str, nn.Parameter]:
        """The student's parameters that are averaged, by the names that they had before anything was wrapped."""
        named = {name.replace(CHECKPOINTED, ""): parameter for name, parameter in student.named_parameters()}
        return {name: named[name] for name in self.average}

    def save(self, folder: str) -> None:
        save_file(self.average, os.path.join(folder, AVERAGE_FILE), metadata={"format": "pt"})

    def load(self, folder: str) -> None:
        path = os.path.join(folder, AVERAGE_FILE)
        if not os.path.isfile(path):
            raise UsageError(f"{folder} has no {AVERAGE_FILE}: it was not saved by a run with teacher 'ema'")
        for name, tensor in load_file(path).items():
            self.average[name].copy_(tensor)


class AverageTeacher(BaseTeacher):
    """An exponential moving average of the student's trained parameters, in a copy of its own; `offload` keeps the
    average and the layers of the copy that scores on the CPU (see `stream`)."""

    def __init__(self, student: nn.Module, rate: float, *, offload: bool = False) -> None:
        super().__init__(student)
        self._average = _Average(causal_lm(student), rate, offload=offload)
        self.parameters = {n: p for n, p in self.model.named_parameters() if n in self.average}
        for name, parameter in self.parameters.items():
            average = self.average[name]
            if (parameter.dtype, parameter.device) == (average.dtype, average.device):
                parameter.data = average  # its own average; otherwise there is a float32 average beside it
        if offload:
            stream(self.model, causal_lm(student))

    @property
    def average(self) -> dict[str, Tensor]:
        return self._average.average

    def update(self, student: nn.Module) -> None:
        self._average.follow(causal_lm(student))
        self._use_average()

    def save(self, folder: str) -> None:
        self._average.save(folder)

    def load(self, folder: str) -> None:
        self._average.load(folder)
        self._use_average()

    def _use_average(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.average[name].data_ptr():
                parameter.data.copy_(self.average[name])


class AdapterAverageTeacher(Teacher):
    """An exponential moving average of the adapter's weights, which a fresh adapter starts as nothing: as the base."""

    def __init__(self, student: nn.Module, rate: float) -> None:
        super().__init__(student)
        self._average = _Average(student, rate)
        self.average = self._average.average
        head = causal_lm(student).get_output_embeddings()
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise UsageError(
                "teacher is 'ema', and the adapter trains the output head (modules_to_save); the average of an adapter "
                "can be the teacher only where the head stays as it is: teacher may be base or live"
            )

    @contextlib.contextmanager
    def scoring(self) -> Iterator[PreTrainedModel]:
        trained = {name: parameter.detach() for name, parameter in self._average.followed(self.student).items()}
        weights = [part(parameter, parameter) for parameter in trained.values()]
        own = [weight.clone() for weight in weights]
        for weight, (name, parameter) in zip(weights, trained.items(), strict=True):
            weight.copy_(part(self.average[name], parameter))
        try:
            with super().scoring() as model:
                yield model
        finally:
            for weight, before in zip(weights, own, strict=True):
                weight.copy_(before)

    def update(self, student: nn.Module) -> None:
        self._average.follow(student)

    def save(self, folder: str) -> None:
        self._average.save(folder)

    def load(self, folder: str) -> None:
        self._average.load(folder)


def trains_beside_adapter(student: nn.Module) -> str | None:
    """The first parameter that trains and is none of the adapter's."""
    adapters = set(cast(Any, student).peft_config)  # whose names are in those of their parameters
    trained = (name for name, parameter in student.named_parameters() if parameter.requires_grad)
    return next((name for name in trained if adapters.isdisjoint(name.split("."))), None)


def whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered from all processes where each has a shard of it (FSDP2)."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a tensor like the parameter, what this process has of that: its shard, or all where it is not sharded."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy for evaluation that shares the parameters which do not train."""
    shared: dict[int, nn.Parameter] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)


def stream(model: PreTrainedModel, student: PreTrainedModel) -> None:
    """Keep the model's layers on the CPU, and bring each to the student's device for just as long as it computes.

    What a layer shares with the student's is there anyway and stays.
    """
    device, shared = student.device, {id(parameter) for parameter in student.parameters()}
    for layer in layers_of(model):
        own = [parameter for parameter in layer.parameters() if id(parameter) not in shared]
        kept = [parameter.detach().to("cpu") for parameter in own]
        if device.type == "cuda":
            kept = [tensor.pin_memory() for tensor in kept]  # so that the next copy need not wait for the last product
        _move(own, kept)
        layer.register_forward_pre_hook(lambda *_, own=own, kept=kept: _move(own, kept, device))
        layer.register_forward_hook(lambda *_, own=own, kept=kept: _move(own, kept), always_call=True)


def _move_all_but_layers(model: PreTrainedModel, device: torch.device) -> None:
    of_layers = {id(parameter) for layer in layers_of(model) for parameter in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in of_layers:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _move(parameters: list[nn.Parameter], tensors: list[Tensor], device: torch.device | None = None) -> None:
    """Give parameters the tensors for their data, on a device if one is named."""
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor if device is None else tensor.to(device, non_blocking=True)


def make_teacher(kind: str, student: nn.Module, ema_rate: float, *, offload: bool = False) -> Teacher:
    """The teacher called `kind`: base, ema or live, which are made of the student."""
    if kind == "live":
        return Teacher(student)
    if has_adapter(student):
        if offload:
            raise UsageError(
                "teacher_offload is True, and the teacher of a model with an adapter has no weights to keep elsewhere; "
                "it must be False"
            )
        return AdapterAverageTeacher(student, ema_rate) if kind == "ema" else AdapterOffTeacher(student)
    if kind == "ema":
        return AverageTeacher(student, ema_rate, offload=offload)
    return BaseTeacher(student, offload=offload)


class TeacherFollows(TrainerCallback):
    """Lets the teacher follow the student, every `interval` optimizer steps."""

    def __init__(self, teacher: Teacher, interval: int) -> None:
        self.teacher, self.interval = teacher, interval

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.global_step + 1) % self.interval == 0:  # the step is counted only after this
            self.teacher.update(kwargs["model"])
