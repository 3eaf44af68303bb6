"""Our trainer and TRL's, told to do the same optimizer step: same weights, prompts, completions, divergence, optimizer.

Each generates for itself, as it would, exactly as many tokens as the given completions have, and then both score the
given completions, so that losses can be compared. The learning rate is 0: the optimizer does all of its work, and every
step starts from the same weights. A step is timed from the trainer's asking for its batch to its `on_step_end`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from benchmarks.bare_products import BareProducts
from benchmarks.ledger import OURS
from sdft.batch import Sample
from sdft.settings.config import SDFTConfig
from sdft.templates import TEMPLATES
from sdft.trainer import SDFTTrainer

DIVERGENCE = "reverse_kl"

#: Of ours, where the batch is one micro-batch: its `max_forward_tokens`. TRL's trainer has no such setting.
FORWARD_TOKENS = 2048


@dataclass(frozen=True)
class Case:
    """What one step is made of: a folder with model and tokenizer, rows, and a completion (token ids) for each; and in
    how many micro-batches the user says that the rows are to be taken."""

    folder: str
    rows: list[dict[str, str]]
    completions: list[list[int]]
    accumulation: int = 1

    @property
    def tokens(self) -> int:
        return len(self.completions[0])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def load(path: str | Path) -> Case:
        return Case(**json.loads(Path(path).read_text()))


@dataclass(frozen=True)
class Taken:
    """What one step took: seconds outside generation, seconds of generation; and its loss."""

    seconds: float
    generation: float
    loss: float


class Clock(TrainerCallback):
    """Stops when a step is done, the optimizer's update and the clearing of gradients included."""

    ended = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()


class Measured:
    """Before a trainer in the order of bases: its clock, and the completions that are scored for those generated."""

    injected: list[list[int]]
    generation: float
    clock: Clock

    def get_batch_samples(self, *arguments: Any) -> Any:
        self.began = time.perf_counter()
        return super().get_batch_samples(*arguments)  # type: ignore[misc]  # of the trainer, the next base

    def given(self, count: int, generated: list[list[int]]) -> list[list[int]]:
        """The completions of a batch whose rows come in the dataset's order."""
        lengths, expected = sorted(map(len, generated)), sorted(map(len, self.injected))
        if count != len(self.injected) or lengths != expected:
            raise RuntimeError(f"{count} completions of {lengths} tokens were generated; expected {expected}")
        return self.injected

    def step(self) -> Taken:
        trainer: Any = self
        loss = trainer.train().training_loss
        return Taken(self.clock.ended - self.began - self.generation, self.generation, loss)

    def measure(self, case: Case) -> None:
        trainer: Any = self
        self.injected, self.generation, self.clock = case.completions, 0.0, Clock()
        trainer.add_callback(self.clock)
        trainer.remove_callback(PrinterCallback)

    def held_bytes(self) -> int:
        """What no method does without: both copies' weights, the gradients and the optimizer's state."""
        trainer: Any = self
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        weights = {p.data_ptr(): p for model in (trainer.model, self.teacher_copy()) for p in model.parameters()}
        states = [
            value
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(t.numel() * t.element_size() for t in (*weights.values(), *trained, *states))

    def teacher_copy(self) -> nn.Module:
        """The frozen copy that scores; where it is kept, each trainer says."""
        raise NotImplementedError


def ours() -> Callable[[Case], OurTrainer]:
    return OurTrainer


class OurTrainer(Measured, SDFTTrainer):
    #: Where the products of forward and backward passes are noted, if they are.
    products: BareProducts | None = None

    def __init__(self, case: Case) -> None:
        tokenizer = AutoTokenizer.from_pretrained(case.folder)
        tokenizer.eos_token = None  # with no end declared anywhere, completions are as long as they may be
        super().__init__(
            AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32),
            SDFTConfig(
                divergence=DIVERGENCE,
                teacher="base",
                teacher_template="paper",
                max_completion_length=case.tokens,
                max_forward_tokens=FORWARD_TOKENS if case.accumulation == 1 else None,
                **_common(case),
            ),
            train_dataset=case.rows,
            processing_class=tokenizer,
        )
        self.measure(case)

    def samples(self, rows: list[dict[str, Any]]) -> list[Sample]:
        started = time.perf_counter()
        found = super().samples(rows)
        self.generation = time.perf_counter() - started
        completions = self.given(len(rows), [sample.completion for sample in found])
        return [dataclasses.replace(s, completion=c) for s, c in zip(found, completions, strict=True)]

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        with self.products or contextlib.nullcontext():
            return super().training_step(*arguments, **options)

    def teacher_copy(self) -> nn.Module:
        teacher: Any = self.teacher
        return cast(nn.Module, teacher.model)


def trl() -> Callable[[Case], Measured]:
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig as TheirConfig
    from trl.experimental.sdft import SDFTTrainer as TheirTrainer

    (template,) = TEMPLATES["paper"]

    class TRLTrainer(Measured, TheirTrainer):
        def __init__(self, case: Case) -> None:
            rows = [
                {"prompt": [{"role": "user", "content": row["prompt"]}], "privileged_context": row["demonstration"]}
                for row in case.rows
            ]
            tokenizer = AutoTokenizer.from_pretrained(case.folder)
            super().__init__(
                case.folder,
                TheirConfig(
                    distillation_mode="full_logits",
                    distillation_alpha={"forward_kl": 0.0, "reverse_kl": 1.0}[DIVERGENCE],
                    teacher_model_kind="base",
                    teacher_prompt_template=template["content"].replace("{demonstration}", "{privileged_context}"),
                    num_generations=1,
                    shuffle_dataset=False,
                    max_prompt_length=None,
                    max_completion_length=case.tokens,
                    bf16=False,
                    gradient_checkpointing=False,
                    **_common(case),
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            never = 2**31 - 1  # a token that no completion ends with
            self.eos_token_ids = [never]
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = [never]
            self.measure(case)

        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            started = time.perf_counter()
            prompts, completions = super()._generate(prompt_ids)
            self.generation = time.perf_counter() - started
            return prompts, self.given(len(prompts), completions)

        def teacher_copy(self) -> nn.Module:
            return cast(nn.Module, self.teacher_model)

    return TRLTrainer


def _common(case: Case) -> dict[str, Any]:
    """Settings that both take from transformers: one step over all rows at a time, and no files but the folder's."""
    return {
        "output_dir": f"{case.folder}/run",
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": len(case.rows) // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


#: By name as plots know it: a function that imports what the trainer needs and gives its class.
TRAINERS: dict[str, Callable[[], Callable[[Case], Measured]]] = {OURS: ours, "TRL": trl}
