"""What `sdft train` says of a step's memory before it starts. It refuses nothing, and a run goes on without it."""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from typing import TYPE_CHECKING, Any

import torch

from sdft.planning.devices import GIB, RESERVED
from sdft.planning.pretend import Device
from sdft.planning.step import Lengths, Step
from sdft.settings.inputs import LoraArguments
from sdft.teacher import ModelTeacher

if TYPE_CHECKING:
    from sdft.trainer import SDFTTrainer

logger = logging.getLogger(__name__)

#: Seconds after which a run does not wait for its plan any longer.
PATIENCE = 20.0


def plan_ahead(
    trainer: SDFTTrainer, dtype: str, lora: LoraArguments, memory: int, *, patience: float = PATIENCE
) -> str | None:
    """A line on what the trainer's longest step takes of `memory` bytes; None where it could not be planned in time.

    Where the step does not fit, that is a warning too. The run's random numbers are left as they are.
    """
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            return _line(trainer, dtype, lora, memory, time.monotonic() + patience)
    except Exception as error:  # whatever it is, training can do without
        logger.debug("the step was not planned: %s", error)
        return None
    finally:
        random.setstate(state)


def _line(trainer: SDFTTrainer, dtype: str, lora: LoraArguments, memory: int, until: float) -> str:
    config = copy.copy(trainer.args)
    config.bf16, config.fp16 = (trainer.autocast_type == kind for kind in (torch.bfloat16, torch.float16))
    lengths = longest(trainer, until)
    teacher = trainer.teacher.model.config if isinstance(trainer.teacher, ModelTeacher) else None
    configs = copy.deepcopy((trainer.student.config, teacher))
    step = Step(configs[0], dtype, lora, config, Device(until=until), teacher_config=configs[1])
    taken, there = step.run(lengths).peak.total + RESERVED, memory / GIB
    length = lengths.rollout if config.method == "sdft" else lengths.demonstration
    said = f"{taken / GIB:.1f} GiB of {there:.1f} at most, with completions of {length} tokens"
    if taken > memory:
        logger.warning("a step is planned to take %s; sdft plan --compare shows settings that take less", said)
    return f"a step is planned to take {said}"


def longest(trainer: SDFTTrainer, until: float = math.inf) -> Lengths:
    """The longest prompt of the training data, the longest rollout that may come, and the longest demonstration.

    Raises TimeoutError where they are not found `until` then, by the monotonic clock.
    """
    rows: Any = trainer.train_dataset
    names = ("prompt_ids", "teacher_prompt_ids", "completion_ids")
    most = dict.fromkeys(names, 0)
    for row in rows:  # once, for they may lie on a disk
        if time.monotonic() > until:
            raise TimeoutError("the rows are too many to look for the longest")
        most = {name: max(most[name], len(row.get(name) or ())) for name in names}
    prompt, seen, answer = most.values()
    return Lengths(prompt, trainer.args.max_completion_length, max(seen - prompt, answer, 0))
