"""What `sdft continual` is told: skills, methods and seeds, and the settings of each of its training runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from sdft.data import Row
from sdft.early_checks import check_package, check_rows, check_writable
from sdft.errors import UsageError, shown
from sdft.models.files import check_model
from sdft.rows import Rows, exam_rows, rows_of_train, warn_of_trained
from sdft.settings.chats import BothChatSettings
from sdft.settings.checks import check_switch
from sdft.settings.commands import ContinualCommand, SkillFiles
from sdft.settings.config import EvalSettings, MethodSettings
from sdft.settings.fields import Field, own_fields, training_fields
from sdft.settings.inherited import check_values
from sdft.settings.inputs import SEED, ColumnArguments, DataArguments, EvalArguments, LoraArguments, ModelArguments
from sdft.settings.recipe import Given, suggestion
from sdft.settings.teachers import MODEL

#: How answers are made and scored, but for the chat template's settings, which training has too.
OF_EXAMS = {each.name for each in fields(EvalSettings)} - {each.name for each in fields(BothChatSettings)}

#: What each stage is given by the command itself, or by its skill; and what all of them are measured by.
OF_THE_COMMAND = {
    *("model", "output_dir", "seed", "overwrite_output_dir", "resume_from_checkpoint", "eval_strategy"),
    *("teacher_template", "chat_template_kwargs", "teacher_chat_template_kwargs"),
    *own_fields(ContinualCommand, LoraArguments, ColumnArguments, EvalArguments),
    *OF_EXAMS,
}


@dataclass(frozen=True)
class Skill:
    """A skill to be learned: what is learned from and scored on, the recipe with the skill's own settings, and rows to
    choose settings by, if there are any.
    """

    name: str
    rows: Rows
    settings: MethodSettings
    choosing: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A way to learn: settings, the names of its own that stand in place of the recipe's, and whether all skills are
    learned at once.
    """

    name: str
    given: Given
    own: frozenset[str]
    joint: bool


@dataclass(frozen=True)
class Plan:
    """The whole experiment, read and checked before anything is loaded."""

    given: Given
    model: ModelArguments
    settings: MethodSettings
    skills: list[Skill]
    general: list[Row]
    methods: list[Method]
    seeds: list[int]

    def stages(self, method: Method) -> Iterator[list[Skill]]:
        """What is learned in each stage: one skill after the other, or all of them."""
        yield from [self.skills] if method.joint else [[skill] for skill in self.skills]


def fields_of_continual() -> dict[str, Field]:
    """Every field of the command: its own, and those of training."""
    parts = (ContinualCommand, ModelArguments, LoraArguments, ColumnArguments, EvalArguments)
    return own_fields(*parts) | training_fields()


def plan_of(given: Given, known: Mapping[str, Field]) -> Plan:
    """The experiment that a recipe describes, with all rows; UsageError for what cannot be."""
    if isinstance(folder := given.values.get("output_dir"), str):  # as the Trainer reads it
        given = replace(given, values={**given.values, "output_dir": os.path.expanduser(folder)})
    command, model, evaluation = given.make(ContinualCommand), given.make(ModelArguments), given.make(EvalArguments)
    settings, columns = given.make(MethodSettings), given.make(ColumnArguments).columns
    if evaluation.eval_file:
        raise UsageError(f"eval_file is {evaluation.eval_file!r}; it must not be set, for each of skills has its own")
    if given.make(LoraArguments).lora_rank:
        raise UsageError(f"lora_rank is {given.values['lora_rank']}; it must be 0: sdft continual trains all weights")
    for name in ("resume_from_checkpoint", "eval_strategy", "overwrite_output_dir"):
        if given.values.get(name) not in (None, False, "no"):
            raise UsageError(f"{name} is {shown(given.values[name])}; it must not be set, for sdft continual does it")
    if given.values.get("seed", SEED) != SEED:
        raise UsageError(f"seed is {shown(given.values['seed'])}; it must not be set, for seeds has that of each run")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UsageError(
            f"sdft continual was started as {processes} processes; it must be one, which trains and measures"
        )
    check_own_teacher(settings)
    check_values(given.values)
    check_writable(str(settings.output_dir))
    check_rows("general_file", evaluation.general_file)
    check_model(model.model)
    check_package("sdft train draws curves", "matplotlib")
    methods, skills = [], []
    for name, values in command.methods.items():
        with _within(given, "methods", name):
            methods.append(_method(name, values, given, known))
    for name, values in command.skills.items():
        with _within(given, "skills", name):
            skills.append(_skill(name, values, given, settings, columns))
    _check_joint(methods, skills)
    _, general = exam_rows(None, evaluation.general_file or None, settings, columns)
    for skill in skills:
        warn_of_trained(general, skill.rows.train, "general_file")
    return Plan(given, model, settings, skills, general, methods, command.seeds)


def _within(given: Given, field: str, name: str) -> AbstractContextManager[None]:
    """Have a UsageError about a skill or a method say where the recipe has them."""
    place = given.places.get(field, "--")
    where = f"{field}.{name}"
    return Given({}, {} if place.startswith("--") else {where: place, f"{where}:": place}).located()


def check_own_teacher(settings: MethodSettings) -> None:
    """UsageError where another model is to teach."""
    if settings.teacher == MODEL:
        name = "teacher" if settings.teacher_model is None else "teacher_model"
        raise UsageError(
            f"{name} is {getattr(settings, name)!r}; no other model may teach, for in sdft continual the model that "
            "learns is its own teacher, and is measured as one"
        )


def _skill(
    name: str, values: Mapping[str, Any], given: Given, settings: MethodSettings, columns: Mapping[str, str] | None
) -> Skill:
    """A skill with its rows; the settings are the recipe's, with the skill's own scorer and template."""
    files = SkillFiles.of(name, values)
    for each in ("train_file", "eval_file", "choose_file"):
        check_rows(f"skills.{name}: {each}", getattr(files, each))
    own = {name: getattr(files, name) for name in ("scorer", "teacher_template") if getattr(files, name) is not None}
    of_skill = Given({**given.values, **own}, {**given.places, **dict.fromkeys(own, f"skills.{name}")})
    with of_skill.located():
        settings = of_skill.make(MethodSettings)
    rows = rows_of_train(DataArguments(files.train_file), EvalArguments(files.eval_file), settings, columns)
    choosing, _ = exam_rows(files.choose_file, None, settings, columns)
    warn_of_trained(choosing, rows.train, "choose_file")
    return Skill(name, rows, settings, choosing)


def _method(name: str, values: Mapping[str, Any], given: Given, known: Mapping[str, Field]) -> Method:
    """The recipe with a method's own settings in their place."""
    own, where = dict(values), f"methods.{name}"
    joint = own.pop("joint", False)
    check_switch(f"{where}: joint", joint)
    read: dict[str, Any] = {}
    for setting, value in own.items():
        if setting in OF_THE_COMMAND or setting not in known:
            can = {*known, "joint"} - OF_THE_COMMAND
            raise UsageError(
                f"{where} has {setting!r}; it may have joint, and settings of training that methods can differ in"
                + suggestion(str(setting), can, "sdft continual") * (setting not in known)
            )
        with Given({}, {setting: where}).located():
            read[setting] = known[setting].read(_written(value))
    places = {**given.places, **dict.fromkeys(read, where)}
    method = Method(name, Given({**given.values, **read}, places), frozenset(read), joint)
    with method.given.located():
        check_own_teacher(method.given.make(MethodSettings))
        check_values(method.given.values)
    return method


def _check_joint(methods: Sequence[Method], skills: Sequence[Skill]) -> None:
    """Refuse self-distillation on all skills at once where their teachers are shown demonstrations in other forms."""
    templates = {skill.name: skill.settings.teacher_template for skill in skills}
    one = all(template == skills[0].settings.teacher_template for template in templates.values())
    for method in methods:
        if method.joint and not one and method.given.make(MethodSettings).method == "sdft":
            raise UsageError(
                f"methods.{method.name}: joint is True, and teacher_template is {shown(templates)}; a run has one for "
                "all its rows, so it must be the same for all skills, or method sft"
            )


def _written(value: Any) -> Any:
    """A value of a nested mapping as it would stand in a recipe: scalars as text."""
    return value if value is None or isinstance(value, list | dict) else str(value)
