"""`sdft continual`: skills learned one after the other, by several methods, and what is left of each after every stage.

In output_dir, `base.json` has the scores of the model before training, `METHOD/seed-N/stage-K-SKILL/` a training run of
`sdft train` with `scores.json` beside its summary, and `continual.json` all of it. A stage whose folder has
`summary.json` is not trained again, and one that has `scores.json` is not measured again, unless there are new rows to
choose by.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdft.checkpoints.files import failing_clearly, write_text
from sdft.commands.shared import accuracy_of, device_here, quiet
from sdft.commands.train import train
from sdft.evaluation.continual import distance, report_of_run
from sdft.evaluation.exam import Exam
from sdft.models.load import load_model
from sdft.report.page import page
from sdft.rows import Rows, kept_as
from sdft.run_files import CONTINUAL_FILE, REPORT_FILE, SUMMARY_FILE
from sdft.settings.config import MethodSettings, SDFTConfig
from sdft.settings.continual import Method, Plan, Skill
from sdft.settings.inputs import LoraArguments, ModelArguments
from sdft.teacher import Teacher

BASE_FILE, SCORES_FILE = "base.json", "scores.json"
CHOOSING = "choose_accuracy"  # by skill, on the rows of choose_file


def continual(plan: Plan) -> int:
    """`sdft continual`: every stage that is not there yet, and the report after each; the exit code."""
    quiet()
    folder = Path(str(plan.settings.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    measure = Measure(plan)
    base = _kept(folder / BASE_FILE, measure, measure.base)
    runs: list[dict[str, Any]] = []
    for method in plan.methods:
        for seed in plan.seeds:
            stages: list[dict[str, Any]] = []
            for number, learned in enumerate(plan.stages(method), start=1):
                name = f"stage-{number}-{'all' if method.joint else learned[0].name}"
                stage = folder / method.name / f"seed-{seed}" / name
                before = plan.model.model if number == 1 else str(stages[-1]["folder"])
                code = train_stage(plan, method, seed, learned, before, stage)
                if not (stage / SUMMARY_FILE).is_file():
                    print(f"stopped in {stage}/: the same command goes on from the stages before it")
                    return code
                stages.append(_scores_of(stage, learned, measure))
                report = [*runs, report_of_run([skill.name for skill in plan.skills], method.name, seed, stages)]
                write_report(folder, plan, base, report)
            runs = report
    with failing_clearly("the report", str(folder)):
        write_text(folder / REPORT_FILE, page([folder]))
    left = f"{folder / CONTINUAL_FILE} has all numbers, and {folder / REPORT_FILE} shows them"
    print("", table(plan, base, runs), "", left, sep="\n")
    return 0


def train_stage(plan: Plan, method: Method, seed: int, learned: list[Skill], model: str, folder: Path) -> int:
    """Train `model` on some of the skills into `folder`, unless that was done; the exit code of the run."""
    if (folder / SUMMARY_FILE).is_file():
        print(f"{folder}/ is there: it is not trained again")
        return 0
    print(f"\n{folder}/: {method.name}, seed {seed}, learns {', '.join(skill.name for skill in learned)}", flush=True)
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
    given = replace(method.given, values=values)
    first, *others = (skill.rows.train for skill in learned)
    keep = kept_as(learned[0].settings)
    rows = Rows(train=keep(itertools.chain(first, *others)) if others else first)
    recipe = given.resolved(ModelArguments, MethodSettings, SDFTConfig)
    return train(
        given.make(ModelArguments),
        LoraArguments(),
        rows,
        given.make(SDFTConfig),
        started=time.perf_counter(),
        recipe=recipe,
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

    def base(self) -> dict[str, Any]:
        """The scores of the model before training, and of the same model shown the demonstrations."""
        model, tokenizer = self._load(self.plan.model.model)
        teacher = {}
        for skill in self.plan.skills:
            exam, template = self.skills[skill.name], skill.settings.template
            exam.check(model, tokenizer, [template] if exam.has_demonstrations else [])
            if skill.name in self.choosing:
                self.choosing[skill.name].check(model, tokenizer)
            if exam.has_demonstrations:
                teacher[skill.name] = accuracy_of(exam.held_out(model, tokenizer, f"teacher, {skill.name}", template))
        return {**self._scores(model, tokenizer), "teacher_accuracy": teacher}

    def trained(self, folder: Path) -> dict[str, Any]:
        """The scores of a trained model, and its distance from the base model in nats a token and in weights."""
        model, tokenizer = self._load(str(folder))
        scores = self._scores(model, tokenizer)
        base, _ = self._load(self.plan.model.model)
        forgetting = self.on_general.forgetting(model, tokenizer, Teacher(base), shown=True)
        moved, share = distance(model, base)
        return {**scores, "forgetting": forgetting, "weights_moved": moved, "weights_moved_share": share}

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


def _kept(path: Path, measure: Measure, scores: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file of numbers has; measured and written the first time, and once there are more rows to choose by."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not found or measure.choosing.keys() - found.get(CHOOSING, {}).keys():
        found = scores()
        write_text(path, json.dumps(found, indent=2) + "\n")
    return found


def _scores_of(stage: Path, learned: list[Skill], measure: Measure) -> dict[str, Any]:
    """A stage's line in the report: what was learned, its scores, and the numbers of its training."""
    summary = json.loads((stage / SUMMARY_FILE).read_text(encoding="utf-8"))
    scores = _kept(stage / SCORES_FILE, measure, lambda: measure.trained(stage))
    return {
        "folder": str(stage),
        "learned": [skill.name for skill in learned],
        **scores,
        "steps": summary["steps"],
        "loss_last": summary["loss_last"],
        "seconds": summary["training_seconds"],
    }


def write_report(folder: Path, plan: Plan, base: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """continual.json as far as it is known."""
    skills = [skill.name for skill in plan.skills]
    report = {"model": plan.model.model, "skills": skills, "general_prompts": len(plan.general), "base": base}
    write_text(folder / CONTINUAL_FILE, json.dumps({**report, "runs": runs}, indent=2, ensure_ascii=False) + "\n")


def table(plan: Plan, base: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Accuracy on every skill and on the general prompts before training, and after the last stage of each run."""
    lines = [["", *(skill.name for skill in plan.skills), "general", "nats a token", "weights moved"]]
    lines.append(["base", *map(_percent, base["accuracy"].values()), _percent(base["general_accuracy"]), "", ""])
    for run in runs:
        last = run["stages"][-1]
        nats = "" if last["forgetting"] is None else f"{last['forgetting']:.3f}"
        lines.append(
            [
                f"{run['method']}, seed {run['seed']}",
                *map(_percent, last["accuracy"].values()),
                _percent(last["general_accuracy"]),
                nats,
                f"{last['weights_moved']:.3f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
