"""What an optimizer keeps for the parameters that train: made by torch where it has the optimizer, else computed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from sdft.errors import UsageError
from sdft.planning.pretend import Device
from sdft.settings.config import SDFTConfig

#: Optimizers that run as they are, so that what they make on the way is seen as well.
RUN = ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop")
#: That of these whose step is one kernel, which makes nothing on the way.
FUSED = "adamw_torch_fused"

#: Parameters of fewer numbers are left in whole numbers by bitsandbytes (float32) and torchao (the parameter's type).
LEAST = 4096


@dataclass(frozen=True)
class State:
    """An optimizer's state: so many numbers of `bits` for each parameter, with a float32 scale for each block of them.

    bitsandbytes keeps embeddings in 32 bits, as the Trainer tells it to. What is paged goes to host memory where the
    GPU has no room.
    """

    numbers: int
    bits: int
    block: int = 256
    bitsandbytes: bool = True
    paged: bool = False

    def bytes_of(self, parameter: nn.Parameter, *, embedding: bool) -> int:
        """The bytes of the state of one parameter."""
        count = parameter.numel()
        if self.bits == 32 or (self.bitsandbytes and (embedding or count < LEAST)):
            return 4 * self.numbers * count
        if not self.bitsandbytes and (count < LEAST or count % self.block):
            return parameter.element_size() * self.numbers * count
        return self.numbers * (self.bits * count // 8 + 4 * -(-count // self.block))


#: AdamW keeps two averages, AdEMAMix three, Lion and RMSprop one.
COMPUTED = {
    "adamw_8bit": State(2, 8),
    "adamw_bnb_8bit": State(2, 8),
    "adamw_torch_8bit": State(2, 8, bitsandbytes=False),
    "adamw_torch_4bit": State(2, 4, block=128, bitsandbytes=False),
    "paged_adamw_8bit": State(2, 8, paged=True),
    "paged_adamw_32bit": State(2, 32, paged=True),
    "ademamix": State(3, 32),
    "ademamix_8bit": State(3, 8),
    "paged_ademamix_8bit": State(3, 8, paged=True),
    "paged_ademamix_32bit": State(3, 32, paged=True),
    "lion_8bit": State(1, 8),
    "lion_32bit": State(1, 32),
    "paged_lion_8bit": State(1, 8, paged=True),
    "paged_lion_32bit": State(1, 32, paged=True),
    "rmsprop_bnb": State(1, 32),
    "rmsprop_bnb_8bit": State(1, 8),
    "rmsprop_bnb_32bit": State(1, 32),
}


def state_of(optimizer: Any) -> State | None:
    """The state of an optimizer for which it is computed."""
    return COMPUTED.get(OptimizerNames(optimizer).value)


def is_in_8_bits(optimizer: Any) -> bool:
    """Whether an optimizer's state has at most 8 bits a number."""
    state = state_of(optimizer)
    return state is not None and state.bits <= 8


def check_known(optimizer: Any) -> None:
    """UsageError for an optimizer that is not planned."""
    name = OptimizerNames(optimizer).value
    if name not in RUN and name not in COMPUTED:
        *others, last = (*RUN, *COMPUTED)
        raise UsageError(f"optim is {name!r}; of optimizers sdft plan knows {', '.join(others)} and {last}")


class StepsOf:
    """The optimizer of a run's settings, with the state that it has after its first step."""

    def __init__(
        self, config: SDFTConfig, trained: Sequence[nn.Parameter], embeddings: set[int], device: Device
    ) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        if (state := state_of(config.optim)) is not None:
            sizes = [state.bytes_of(each, embedding=id(each) in embeddings) for each in trained]
            with device.tracker.in_host_memory() if state.paged else contextlib.nullcontext():
                self._state = [torch.empty(size, dtype=torch.uint8, device=device.tensors) for size in sizes]
            return
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
        options.pop("fused", None)
        optimizer = kind(trained, **options)
        for group in optimizer.param_groups:
            group["weight_decay"] = config.weight_decay
            group["foreach"] = False
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["foreach"] = device.kind == "cuda"
        self._state = [each for kept in optimizer.state.values() for each in kept.values()]
        if OptimizerNames(config.optim).value != FUSED:
            self._optimizer = optimizer

    def step(self) -> None:
        """An optimizer's step, for what it makes on the way."""
        if self._optimizer is not None:
            self._optimizer.step()
