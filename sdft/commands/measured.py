"""The scores of `sdft continual`: of the model before training and of each stage's, kept where they still hold."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sdft.checkpoints.files import write_json
from sdft.commands.shared import accuracy_of, device_here
from sdft.commands.stages import Stage, digest, place_of, read_kept
from sdft.data import Row
from sdft.evaluation.continual import distance
from sdft.evaluation.exam import Exam
from sdft.models.files import model_digest
from sdft.models.load import load_model
from sdft.named_functions import source_digest
from sdft.rows import can_ask_teacher
from sdft.run_files import BASE_FILE, SCORES_FILE
from sdft.settings.config import EvalSettings, MethodSettings, SDFTConfig
from sdft.settings.continual import Plan, Skill
from sdft.teacher import Teacher
from sdft.templates import Message

TEACHER = "teacher_accuracy"  # by skill, of a model that is shown the demonstrations
CHOOSING = "choose_accuracy"  # by skill, on the rows of choose_file
MEASURED = "measured_on"  # a digest of the model, the rows and the settings that scores are made by


class Measure:
    """Scores of a model on every skill and on the general prompts, and how far it is from the base model."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        size = plan.given.values.get("per_device_eval_batch_size", SDFTConfig.per_device_eval_batch_size)
        self.skills = {
            skill.name: Exam(skill.rows.held_out, None, skill.settings, batch_size=size, seed=0)
            for skill in plan.skills
        }
        self.choosing = {
            skill.name: Exam(skill.choosing, None, skill.settings, batch_size=size, seed=0)
            for skill in plan.skills
            if skill.choosing
        }
        self.on_general = Exam(None, plan.general or None, plan.settings, batch_size=size, seed=0)
        self.made_by = _exams(plan)

    def base(self) -> dict[str, Any]:
        """The scores of the model before training, and of the same model shown the demonstrations: kept, or made."""
        path = Path(str(self.plan.settings.output_dir)) / BASE_FILE
        if known := self._known(path, self.made_by):
            return known
        self._say_if_again(path)
        return self._written(path, self._of_base(), self.made_by)

    def stage(self, stage: Stage, taught: Skill | None) -> dict[str, Any]:
        """The scores of a stage's model, kept or made, and what it answers as a teacher of the skill that is next."""
        if known := self.known_of(stage, taught):
            return known
        path = stage.folder / SCORES_FILE
        self._say_if_again(path)
        return self._written(path, self._of_trained(stage.folder, taught), self._made_of(stage))

    def known_of(self, stage: Stage, taught: Skill | None) -> dict[str, Any] | None:
        """The scores of a stage's model that are there, if they have the teacher's accuracy where that is asked for."""
        found = self._known(stage.folder / SCORES_FILE, self._made_of(stage))
        teaches = taught is None or (found or {}).get(TEACHER, {}).keys() >= self._shown([taught]).keys()
        return found if teaches else None

    def _made_of(self, stage: Stage) -> str:
        return _digest([self.made_by, model_digest(str(stage.folder))])

    def _known(self, path: Path, made_by: str) -> dict[str, Any] | None:
        """The scores in a file, if they are of this exam and model."""
        found = read_kept(path, remove=path) if path.is_file() else {}
        return found if found.pop(MEASURED, None) == made_by else None

    @staticmethod
    def _say_if_again(path: Path) -> None:
        if path.is_file():
            print(f"{path} is measured again: other rows, settings or weights, or no answers of a teacher", flush=True)

    def _written(self, path: Path, scores: dict[str, Any], made_by: str) -> dict[str, Any]:
        write_json(path, {**scores, MEASURED: made_by})
        return scores

    def _of_base(self) -> dict[str, Any]:
        model, tokenizer = self._load(self.plan.model.model)
        self.on_general.check(model, tokenizer)
        for skill in self.plan.skills:
            exam = self.skills[skill.name]
            exam.check(model, tokenizer, list(self._shown([skill]).values()))
            if skill.name in self.choosing:
                self.choosing[skill.name].check(model, tokenizer)
        teacher = self._as_teacher(model, tokenizer, self.plan.skills)
        return {**self._scores(model, tokenizer), TEACHER: teacher}

    def _of_trained(self, folder: Path, taught: Skill | None) -> dict[str, Any]:
        """The scores of a trained model, and its distance from the base model in nats a token and in weights."""
        model, tokenizer = self._load(str(folder))
        scores = self._scores(model, tokenizer)
        if taught is not None:
            scores[TEACHER] = self._as_teacher(model, tokenizer, [taught])
        base, _ = self._load(self.plan.model.model)
        forgetting = self.on_general.forgetting(model, tokenizer, Teacher(base), shown=True)
        moved, share = distance(model, base)
        return {**scores, "forgetting": forgetting, "weights_moved": moved, "weights_moved_share": share}

    def _shown(self, skills: Sequence[Skill]) -> dict[str, list[Message]]:
        """What the teachers of skills see, of those that can be asked."""
        templates = {skill.name: skill.settings.template for skill in skills}
        return {name: each for name, each in templates.items() if can_ask_teacher(self.skills[name].eval_rows, each)}

    def _as_teacher(self, model: Any, tokenizer: Any, skills: Sequence[Skill]) -> dict[str, float | None]:
        """Accuracies of a model that sees what its teacher does."""
        return {
            name: accuracy_of(self.skills[name].held_out(model, tokenizer, f"teacher, {name}", template))
            for name, template in self._shown(skills).items()
        }

    def _scores(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        def accuracies(of: dict[str, Exam], said: str) -> dict[str, float | None]:
            return {name: accuracy_of(exam.held_out(model, tokenizer, f"{name}{said}")) for name, exam in of.items()}

        accuracy, choosing = accuracies(self.skills, ""), accuracies(self.choosing, ", to choose by")
        general = self.on_general.general(model, tokenizer, "general prompts")
        scores = {"accuracy": accuracy, "general_accuracy": accuracy_of(general)}
        return scores | ({CHOOSING: choosing} if choosing else {})

    def _load(self, name: str) -> tuple[Any, Any]:
        gc.collect()  # the model of the stage before
        return load_model(name, self.plan.model.dtype, device_here(), **self.plan.model.trust)


def _exams(plan: Plan) -> str:
    """A digest of what scores are made by: the model that all begin with, and every exam's rows and settings."""
    told = {each.name for each in fields(EvalSettings)} | {"teacher_template"}

    def of(settings: MethodSettings, *rows: list[Row]) -> list[Any]:
        values = {name: str(value) for name, value in asdict(settings).items() if name in told}
        return [values, *map(source_digest, (settings.scorer, settings.general_scorer)), *map(digest, rows)]

    skills = {skill.name: of(skill.settings, skill.rows.held_out, skill.choosing) for skill in plan.skills}
    begins = [model_digest(plan.model.model) or place_of(plan.model.model), plan.model.dtype]
    return _digest([begins, skills, of(plan.settings, plan.general)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
