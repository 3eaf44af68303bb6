"""`sdft continual`: skills learned one after the other, by several methods, and what is left of each after every stage.

In output_dir, `resolved_recipe.yaml` has all settings, `base.json` the scores of the model before training,
`METHOD/seed-N/stage-K-SKILL/` a training run of `sdft train` with `scores.json` beside its summary, and
`continual.json` all numbers. A stage whose folder has `summary.json` is not trained again, unless one before it was,
and is refused where it was trained in another way. A model whose scores are there is not measured again, unless the
rows that it is measured on are others, or how.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sdft.checkpoints.claim import alone_in
from sdft.checkpoints.files import failing_clearly, write_json, write_text
from sdft.commands.shared import accuracy_of, device_here, quiet
from sdft.commands.stages import Stage, digest, place_of, read_kept, stages_of
from sdft.commands.train import exam_of, train, trainer_of
from sdft.data import Row
from sdft.environment import made_with
from sdft.errors import Diverged, TrainingError, counted
from sdft.evaluation.continual import distance, report_of_run
from sdft.evaluation.exam import Exam
from sdft.models.files import model_digest
from sdft.models.load import load_model
from sdft.named_functions import source_digest
from sdft.report.page import page
from sdft.rows import Rows, can_ask_teacher, kept_as
from sdft.run_files import BASE_FILE, CONTINUAL_FILE, REPORT_FILE, RESOLVED_FILE, SCORES_FILE
from sdft.settings.commands import ContinualCommand
from sdft.settings.config import EvalSettings, MethodSettings, SDFTConfig
from sdft.settings.continual import Plan, Skill
from sdft.settings.inputs import ColumnArguments, EvalArguments, LoraArguments, ModelArguments
from sdft.teacher import Teacher
from sdft.templates import Message

STOPPED = 128 + 15  # the exit code where a stage was ended by SIGTERM, which is no failure of its own
TEACHER = "teacher_accuracy"  # by skill, of a model that is shown the demonstrations
CHOOSING = "choose_accuracy"  # by skill, on the rows of choose_file
MEASURED = "measured_on"  # a digest of the rows and settings that scores are made by


def continual(plan: Plan) -> int:
    """`sdft continual`: every stage that is not there yet, and the report after each; the exit code."""
    quiet()
    folder = Path(str(plan.settings.output_dir))
    with alone_in(folder):
        return _continual(plan, folder)


def _continual(plan: Plan, folder: Path) -> int:
    runs = [
        Run(method.name, seed, list(stages_of(plan, method, seed))) for method in plan.methods for seed in plan.seeds
    ]
    for run in runs:
        check_run(run.stages)
    check_with_model(plan)
    known = {
        "model": plan.model.model,
        "made_with": made_with(),
        "skills": [skill.name for skill in plan.skills],
        "general_prompts": len(plan.general),
    }
    parts = (ContinualCommand, ModelArguments, ColumnArguments, EvalArguments, MethodSettings, SDFTConfig)
    resolved = plan.given.resolved(*parts)
    measure = Measure(plan)
    for run in runs:
        run.read_lines(measure)
    known["base"] = base = measure.base()
    diverged = 0
    for run in runs:
        for stage in run.stages:
            try:
                code = run.go_through(stage, measure, base)
            except Diverged as error:
                diverged += 1
                print(f"{stage.folder}/: {run.method}, seed {run.seed}, ends here: {error}", flush=True)
                break
            if code is not None:
                print(f"stopped in {stage.folder}/: the same command goes on from the stages before it")
                return code
            write_report(folder, resolved, {**known, "runs": reports_of(plan, runs)})
    reports = reports_of(plan, runs)
    write_report(folder, resolved, {**known, "runs": reports})
    with failing_clearly("the report", str(folder)):
        write_text(folder / REPORT_FILE, page([folder]))
    left = f"{folder / CONTINUAL_FILE} has all numbers, and {folder / REPORT_FILE} shows them"
    print("", table(plan, base, reports), "", left, sep="\n")
    if diverged:
        raise TrainingError(f"{counted(diverged, 'run')} of {len(runs)} came to no end, as is said above")
    return 0


@dataclass
class Run:
    """A method with a seed: its stages, and in turn what is known of those that are there and measured."""

    method: str
    seed: int
    stages: list[Stage]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def read_lines(self, measure: Measure) -> None:
        """Begin with what an earlier call has left and still holds, so that no report has less of it."""
        for stage in self.stages:
            scores = measure.known_of(stage, self.taught_after(stage)) if stage.is_there else None
            if scores is None:
                break
            self.lines.append(_line(stage, scores))

    def go_through(self, stage: Stage, measure: Measure, base: dict[str, Any]) -> int | None:
        """Train and measure a stage, unless that was done; the exit code where training was stopped."""
        if stage.is_there:
            print(f"{stage.folder}/ is there: it is not trained again")
        else:
            names = ", ".join(skill.name for skill in stage.learned)
            print(f"\n{stage.folder}/: {self.method}, seed {self.seed}, learns {names}", flush=True)
            for line in what_teaches(stage, self.lines[-1] if self.lines else base):
                print(line, flush=True)
            for later in reversed(self.stages[stage.number :]):  # before this one, so that none is taken for another
                later.forget()
            code = train_stage(stage)
            if not stage.is_there:
                return code or STOPPED
        if stage.number > len(self.lines):
            self.lines.append(_line(stage, measure.stage(stage, self.taught_after(stage))))
        return None

    def taught_after(self, stage: Stage) -> Skill | None:
        """The skill that the model of a stage is to teach itself next, if it is."""
        following = self.stages[stage.number : stage.number + 1]
        return following[0].learned[0] if following and following[0].teaches_itself else None


def what_teaches(stage: Stage, before: dict[str, Any]) -> Iterator[str]:
    """What the model that begins a stage answers as its own teacher: it can teach no more than that."""
    if not stage.teaches_itself:
        return
    for name in (skill.name for skill in stage.learned if skill.name in before.get(TEACHER, {})):
        shown, alone = before[TEACHER][name], before["accuracy"][name]
        line = f"{name}, held out: the model answers {_percent(shown)} as its own teacher, {_percent(alone)} alone"
        yield line + ("" if shown > alone else "; it has nothing to teach, unless by another teacher_template")


def reports_of(plan: Plan, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is known of every run of which anything is."""
    skills = [skill.name for skill in plan.skills]
    return [report_of_run(skills, run.method, run.seed, run.lines) for run in runs if run.lines]


def check_run(stages: Sequence[Stage]) -> None:
    """UsageError where a stage that would be kept was trained in another way, or where one cannot be trained."""
    for stage in stages:
        with stage.given.located():
            stage.given.make(SDFTConfig)
    for stage in itertools.takewhile(lambda stage: stage.is_there, stages):
        stage.check()


def check_with_model(plan: Plan) -> None:
    """UsageError for what only the model can tell of the stages to come, before others are trained for hours.

    Rows may not fit it, and rollouts may be such as it cannot write.
    """
    last = plan.seeds[-1]  # which is not there where any is not
    waiting = [stage for method in plan.methods for stage in stages_of(plan, method, last) if not stage.is_there]
    if not waiting:
        return
    model, tokenizer = load_model(plan.model.model, plan.model.dtype, **plan.model.trust)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what a stage warns of it says when it is trained
    try:
        with tempfile.TemporaryDirectory() as folder:
            for stage in waiting:
                given = replace(stage.given, values={**stage.given.values, "output_dir": folder})
                with given.located():
                    config, rows = given.make(SDFTConfig), rows_of(stage)
                    trainer_of(model, tokenizer, rows, exam_of(rows, config), config)
    finally:
        logging.disable(before)


def rows_of(stage: Stage) -> Rows:
    """What a stage learns from: the rows of its skills, one after the other."""
    first, *others = (skill.rows.train for skill in stage.learned)
    keep = kept_as(stage.learned[0].settings)
    return Rows(train=keep(itertools.chain(first, *others)) if others else first)


def train_stage(stage: Stage) -> int:
    """Train what a stage learns; the exit code of the run."""
    stage.begin()
    return train(
        stage.given.make(ModelArguments),
        LoraArguments(),
        rows_of(stage),
        stage.given.make(SDFTConfig),
        started=time.perf_counter(),
        recipe=stage.recipe,
    )


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
        return self._known(path, self.made_by) or self._written(path, self._of_base(), self.made_by)

    def stage(self, stage: Stage, taught: Skill | None) -> dict[str, Any]:
        """The scores of a stage's model, kept or made, and what it answers as a teacher of the skill that is next."""
        if known := self.known_of(stage, taught):
            return known
        return self._written(stage.folder / SCORES_FILE, self._of_trained(stage.folder, taught), self._made_of(stage))

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


def _line(stage: Stage, scores: dict[str, Any]) -> dict[str, Any]:
    """A stage's line in the report: what was learned, its scores, and the numbers of its training."""
    summary = stage.summary()
    return {
        "folder": str(stage.folder),
        "learned": [skill.name for skill in stage.learned],
        **scores,
        "steps": summary["steps"],
        "loss_last": summary["loss_last"],
        "seconds": summary["training_seconds"],
    }


def write_report(folder: Path, recipe: str, report: dict[str, Any]) -> None:
    """continual.json as far as it is known, and the recipe that it is of."""
    with failing_clearly("the report", str(folder)):
        write_text(folder / RESOLVED_FILE, recipe)
        write_json(folder / CONTINUAL_FILE, report)


def table(plan: Plan, base: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Accuracy on every skill and on the general prompts before training, and after the last stage of each run."""
    names = [skill.name for skill in plan.skills]
    lines = [["", *names, "general", "nats a token", "weights moved"]]
    before = [*(base["accuracy"][name] for name in names), base["general_accuracy"]]
    lines.append(["base", *map(_percent, before), "", ""])
    for run in runs:
        last = run["stages"][-1]
        lines.append(
            [
                f"{run['method']}, seed {run['seed']}",
                *(_percent(last["accuracy"][name]) for name in names),
                _percent(last["general_accuracy"]),
                *("" if last[name] is None else f"{last[name]:.3f}" for name in ("forgetting", "weights_moved")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
