"""The training runs of `sdft continual`: where each goes and what it learns; whether one that is there is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from sdft.data import WHERE, Row
from sdft.errors import UsageError, shown
from sdft.run_files import RESOLVED_FILE, SUMMARY_FILE
from sdft.settings.config import EvalSettings, MethodSettings, SDFTConfig
from sdft.settings.continual import Method, Plan, Skill
from sdft.settings.inputs import ModelArguments
from sdft.settings.recipe import Given

STAGE_FILE = "stage.json"  # a digest of each skill's training rows

#: Settings of places, memory, speed and logs. They, and those of evaluation, may change between stages.
FREE = frozenset(
    """
    rollout_backend rollout_server vllm_memory_share rollout_batch_size rollout_draft rollout_compile teacher_offload
    teacher_cache_gib max_forward_tokens activation_offload max_chunk_bytes log_completions rows_on_disk
    output_dir logging_steps logging_nan_inf_filter dataloader_pin_memory remove_unused_columns
    """.split()  # noqa: SIM905
)
#: The Trainer's settings that decide what a stage learns.
OF_THE_TRAINER = frozenset(
    """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha
    per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy bf16 fp16 seed data_seed
    """.split()  # noqa: SIM905
)
DECIDES = {"dtype"} | OF_THE_TRAINER | {f.name for f in fields(MethodSettings)} - {f.name for f in fields(EvalSettings)}
DECIDES -= FREE


@dataclass(frozen=True)
class Stage:
    """A training run of the experiment: where it goes, what it learns, and all its settings."""

    folder: Path
    learned: list[Skill]
    given: Given

    @property
    def is_there(self) -> bool:
        """Whether it was trained to its end."""
        return (self.folder / SUMMARY_FILE).is_file()

    @property
    def recipe(self) -> str:
        """Its resolved recipe."""
        return self.given.resolved(ModelArguments, MethodSettings, SDFTConfig)

    @property
    def names(self) -> str:
        """The skills that it learns."""
        return ", ".join(skill.name for skill in self.learned)

    @property
    def rows(self) -> dict[str, str]:
        """A digest of each skill's training rows."""
        return {skill.name: digest(skill.rows.train) for skill in self.learned}

    def check(self) -> None:
        """UsageError where it is there, and was trained in another way than it would be now."""
        kept = self.folder / RESOLVED_FILE
        if not self.is_there or not kept.is_file():
            return
        before, now = yaml.safe_load(kept.read_text(encoding="utf-8")), yaml.safe_load(self.recipe)
        for recipe in (before, now):
            recipe["model"] = Path(recipe["model"]).name  # output_dir may be elsewhere by now
        for name in sorted({"model"} | DECIDES):
            if name in before and name in now and before[name] != now[name]:
                raise UsageError(
                    f"output_dir has {self.folder}, which was trained with {name} {shown(before[name])}, and the "
                    f"recipe has {shown(now[name])}; that folder must be removed, or output_dir another one"
                )
        rows = self.folder / STAGE_FILE
        if rows.is_file() and json.loads(rows.read_text(encoding="utf-8")) != self.rows:
            raise UsageError(
                f"output_dir has {self.folder}, which was trained on other rows than train_file of {self.names} has; "
                "that folder must be removed, or output_dir another one"
            )


def stages_of(plan: Plan, method: Method, seed: int) -> Iterator[Stage]:
    """The stages of a run, each of which begins with the model of the one before it."""
    model = plan.model.model
    for number, learned in enumerate(plan.stages(method), start=1):
        name = f"stage-{number}-{'all' if method.joint else learned[0].name}"
        folder = Path(str(plan.settings.output_dir)) / method.name / f"seed-{seed}" / name
        values: dict[str, Any] = {
            **method.given.values,
            "model": model,
            "seed": seed,
            "teacher_template": learned[0].settings.teacher_template,
            "output_dir": str(folder),
            "overwrite_output_dir": True,  # what a stage has left that did not end
        }
        steps = values.get("max_steps", -1)
        if method.joint and steps > 0:
            values["max_steps"] = steps * len(learned)
        yield Stage(folder, learned, replace(method.given, values=values))
        model = str(folder)


def digest(rows: Sequence[Row]) -> str:
    """A digest of rows, wherever they stand."""
    found = hashlib.sha256()
    for row in rows:
        plain = {name: value for name, value in row.items() if name != WHERE}
        found.update(json.dumps(plain, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()
