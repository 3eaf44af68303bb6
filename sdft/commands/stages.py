"""The training runs of `sdft continual`: where each goes and what it learns; whether one that is there is the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sdft.checkpoints.files import write_json
from sdft.data import WHERE, Row
from sdft.errors import UsageError, shown
from sdft.models.files import model_digest
from sdft.named_functions import source_digest
from sdft.run_files import RESOLVED_FILE, SCORES_FILE, STAGE_FILE, SUMMARY_FILE
from sdft.settings.config import MethodSettings, SDFTConfig
from sdft.settings.continual import OF_EXAMS, Method, Plan, Skill
from sdft.settings.idle import OF_TRAINING, idle
from sdft.settings.inputs import ModelArguments
from sdft.settings.recipe import Given
from sdft.settings.teachers import BASE

#: Settings of places, memory, speed and logs. They, and those of evaluation, may change between stages.
FREE = frozenset(
    """
    rollout_backend rollout_server vllm_memory_share rollout_batch_size rollout_draft rollout_compile teacher_offload
    teacher_cache_gib max_forward_tokens activation_offload max_chunk_bytes log_completions rows_on_disk
    output_dir logging_steps logging_nan_inf_filter dataloader_pin_memory remove_unused_columns
    """.split()  # noqa: SIM905  (words are read more easily than quoted)
)
#: The Trainer's settings that decide what a stage learns.
OF_THE_TRAINER = frozenset(
    """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_steps num_train_epochs optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha
    per_device_train_batch_size gradient_accumulation_steps average_tokens_across_devices train_sampling_strategy
    dataloader_drop_last bf16 fp16 seed data_seed
    """.split()  # noqa: SIM905  (words are read more easily than quoted)
)
DECIDES = ({"model", "dtype"} | OF_THE_TRAINER | {f.name for f in fields(MethodSettings)}) - OF_EXAMS - FREE


@dataclass(frozen=True)
class Stage:
    """A training run of the experiment: where it goes, what it learns, and all its settings."""

    number: int
    folder: Path
    learned: list[Skill]
    given: Given

    @property
    def is_there(self) -> bool:
        """Whether it was trained to its end."""
        return (self.folder / SUMMARY_FILE).is_file()

    @property
    def teaches_itself(self) -> bool:
        """Whether the model that begins it is its teacher, and sees no feedback."""
        return teaches_itself(self.given.make(MethodSettings))

    def summary(self) -> dict[str, Any]:
        """What `sdft train` wrote at its end."""
        return self._read(SUMMARY_FILE, "steps", "loss_last", "training_seconds")

    @property
    def recipe(self) -> str:
        """Its resolved recipe."""
        return self.given.resolved(ModelArguments, MethodSettings, SDFTConfig)

    def begin(self) -> None:
        """Leave nothing of an earlier run that could pass for this one's, and say what it learns from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (SUMMARY_FILE, SCORES_FILE, STAGE_FILE):
            (self.folder / name).unlink(missing_ok=True)
        learns_from = {"train_rows": self._rows(), "begins_with": self._begins_with(), "functions": self._functions()}
        write_json(self.folder / STAGE_FILE, learns_from)

    def forget(self) -> None:
        """Take it for one that is not there, as it learned from a model that is no more."""
        (self.folder / SUMMARY_FILE).unlink(missing_ok=True)

    def check(self) -> None:
        """UsageError where it was trained in another way than it would be now, or cannot be read."""
        before, now = self._decided(self._read(RESOLVED_FILE)), self._decided(yaml.safe_load(self.recipe))
        there = (self.folder / STAGE_FILE).is_file()  # else it was trained before such files were written
        learned_from = self._read(STAGE_FILE, "train_rows") if there else {}
        models = learned_from.get("begins_with"), self._begins_with()
        if all(models) and models[0] == models[1]:
            now["model"] = before.get("model")  # the same one, wherever it is by now
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                self._refuse(f"with {name} {shown(before[name])}, and the recipe has {shown(now[name])}")
        if there and learned_from["train_rows"] != self._rows():
            names = ", ".join(skill.name for skill in self.learned)
            self._refuse(f"on other rows than train_file of {names} has")
        if all(models) and models[0] != models[1]:
            self._refuse(
                f"from another model than {self.given.values['model']} is by now (its weights, its configuration or "
                "its tokenizer)"
            )
        functions = self._functions()
        for name, code in learned_from.get("functions", {}).items():
            if code and functions.get(name) not in (code, None):
                self._refuse(f"with another {name}: the file of {self.given.values[name]} has changed")
        self.summary()

    def _refuse(self, how: str) -> NoReturn:
        raise UsageError(
            f"output_dir has {self.folder}, which was trained {how}; that folder must be removed, or output_dir be "
            "another"
        )

    def _read(self, name: str, *needed: str) -> dict[str, Any]:
        return read_kept(self.folder / name, *needed, remove=self.folder)

    def _rows(self) -> list[str]:
        return [digest(skill.rows.train) for skill in self.learned]

    def _begins_with(self) -> str | None:
        return model_digest(str(self.given.values["model"]))

    def _functions(self) -> dict[str, str | None]:
        """Digests of the code of functions that are the user's own."""
        return {name: source_digest(str(self.given.values.get(name))) for name in ("feedback", "token_weighting")}

    def _decided(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Of a resolved recipe what decides what is learned, in one spelling, without what has no bearing on it."""
        meant = {name: _one_spelling(value) for name, value in recipe.items()}
        meant["teacher"] = meant.get("teacher") or BASE
        if meant.get("data_seed") is None:
            meant["data_seed"] = meant.get("seed")
        model = str(recipe.get("model"))  # that of a later stage is the folder before it, wherever output_dir is by now
        meant["model"] = place_of(model) if self.number == 1 else Path(model).name
        without = idle(OF_TRAINING, meant)
        without |= {"num_train_epochs"} if meant.get("max_steps", -1) > 0 else set()
        without |= {"teacher_template", "teacher_chat_template_kwargs"} if meant.get("method") == "sft" else set()
        return {name: meant[name] for name in DECIDES & meant.keys() - without}


def teaches_itself(settings: MethodSettings) -> bool:
    """Whether a model is taught by itself, shown demonstrations."""
    return settings.method == "sdft" and settings.feedback is None


def _one_spelling(value: Any) -> Any:
    """A word as settings take it, in which case and hyphens do not count."""
    word = isinstance(value, str) and re.fullmatch(r"[\w-]+", value)
    return value.lower().replace("-", "_") if word else value


def place_of(model: str) -> str:
    """A model's name; of a folder or a file, where it is."""
    return os.path.realpath(model) if os.path.exists(model) else model


def read_kept(path: Path, *needed: str, remove: Path) -> dict[str, Any]:
    """What a file of an experiment has, with the names that it needs; UsageError where it has something else.

    `remove` is what has to go before the command can make it again.
    """
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        found = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict) or not set(needed) <= found.keys():
        raise UsageError(f"{path} is not as this command left it; {remove} must be removed")
    return found


def stages_of(plan: Plan, method: Method, seed: int) -> Iterator[Stage]:
    """The stages of a run, each of which begins with the model of the one before it.

    What all methods share and this one knows nothing of is left out.
    """
    model = plan.model.model
    without = idle(OF_TRAINING, vars(method.given.make(MethodSettings))) - method.own
    shared = {name: value for name, value in method.given.values.items() if name not in without}
    for number, learned in enumerate(plan.stages(method), start=1):
        name = f"stage-{number}-{'all' if method.joint else learned[0].name}"
        folder = Path(str(plan.settings.output_dir)) / method.name / f"seed-{seed}" / name
        values: dict[str, Any] = {
            **shared,
            "model": model,
            "seed": seed,
            "teacher_template": learned[0].settings.teacher_template,
            "output_dir": str(folder),
            "overwrite_output_dir": True,  # what a stage has left that did not end
        }
        steps = values.get("max_steps", -1)
        if method.joint and steps > 0:
            values["max_steps"] = steps * len(learned)
        yield Stage(number, folder, learned, replace(method.given, values=values))
        model = str(folder)


def digest(rows: Sequence[Row]) -> str:
    """A digest of rows, wherever they stand."""
    found = hashlib.sha256()
    for row in rows:
        plain = {name: value for name, value in row.items() if name != WHERE}
        found.update(json.dumps(plain, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()
