"""`sdft continual`: skills learned one after the other, by several methods, and what is left of each after every stage.

In output_dir, `resolved_recipe.yaml` has all settings, `base.json` the scores of the model before training,
`METHOD/seed-N/stage-K-SKILL/` a training run of `sdft train` with `scores.json` beside its summary, and
`continual.json` all numbers. A stage whose folder has `summary.json` is not trained again, unless one before it was,
and is refused where it was trained in another way. A model whose scores are there is not measured again, unless it
is another by now, or the rows that it is measured on are others, or how.
"""

from __future__ import annotations

import gc
import itertools
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdft.checkpoints.claim import alone_in
from sdft.checkpoints.files import failing_clearly, write_json, write_text
from sdft.commands.measured import TEACHER, Measure
from sdft.commands.shared import quiet
from sdft.commands.stages import Stage, stages_of, teaches_itself
from sdft.commands.train import exam_of, train, trainer_of
from sdft.environment import made_with
from sdft.errors import Diverged, TrainingError, UsageError, counted, shown
from sdft.evaluation.continual import report_of_run
from sdft.models.load import load_model
from sdft.report.page import page
from sdft.rows import Rows, can_ask_teacher, kept_as
from sdft.run_files import CONTINUAL_FILE, REPORT_FILE, RESOLVED_FILE
from sdft.settings.commands import ContinualCommand
from sdft.settings.config import MethodSettings, SDFTConfig
from sdft.settings.continual import Plan, Skill
from sdft.settings.idle import OF_TRAINING, idle
from sdft.settings.inputs import ColumnArguments, EvalArguments, LoraArguments, ModelArguments

OF_MEASURING = ("dtype", "per_device_eval_batch_size")  # which the command reads too, whatever methods have
STOPPED = 128 + 15  # the exit code where a stage was ended by SIGTERM, which is no failure of its own


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
    check_kept([run.stages for run in runs])
    check_with_model(plan, runs)
    for sentence in notices(plan):
        print(sentence)
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
    folders = [stage.folder for run in runs for stage in run.stages]
    for run in runs:
        for stage in run.stages:
            place = f"{1 + folders.index(stage.folder)} of {len(folders)}"
            try:
                code = run.go_through(stage, measure, base, place)
            except Diverged as error:
                diverged += 1
                print(f"{stage.folder}/: {run.method}, seed {run.seed}, ends here: {error}", flush=True)
                break
            if code is not None:
                print(f"stopped in {stage.folder}/: the same command begins that stage anew and keeps those before it")
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

    def go_through(self, stage: Stage, measure: Measure, base: dict[str, Any], place: str) -> int | None:
        """Train and measure a stage, unless that was done; the exit code where training was stopped.

        `place` is where the stage stands among all of them.
        """
        if stage.is_there:
            print(f"{stage.folder}/ is there: it is not trained again")
        else:
            names = ", ".join(skill.name for skill in stage.learned)
            print(f"\n{stage.folder}/: {self.method}, seed {self.seed}, learns {names} (stage {place})", flush=True)
            for line in what_teaches(stage, self.lines[-1] if self.lines else base):
                print(line, flush=True)
            for later in reversed(self.stages[stage.number :]):  # before this one, so that none is taken for another
                later.forget()
            code = train_stage(stage)
            if not stage.is_there:
                return code or STOPPED
        if stage.number > len(self.lines):
            self.lines.append(_line(stage, measure.stage(stage, self.taught_after(stage))))
        print(f"{stage.folder}/: {scored(self.lines[stage.number - 1])}", flush=True)
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


def check_kept(runs: Sequence[Sequence[Stage]]) -> None:
    """UsageError where a stage that would be kept was trained in another way, or where one cannot be trained."""
    for stage in itertools.chain(*runs):
        with stage.given.located():
            stage.given.make(SDFTConfig)
    refused: dict[str, str] = {}
    for stages in runs:
        for stage in itertools.takewhile(lambda stage: stage.is_there, stages):
            try:
                stage.check()
            except UsageError as error:
                refused[str(stage.folder)] = str(error)
                break  # what comes after it began with its model
    if refused:
        first, *others = refused
        raise UsageError(refused[first] + (f"; {', '.join(others)} cannot be kept either" if others else ""))


def notices(plan: Plan) -> Iterator[str]:
    """What was set and does nothing, as every method has its own or none knows of it, and what is not measured."""
    settings = [method.given.make(MethodSettings) for method in plan.methods]
    unknown = set[str].intersection(*(idle(OF_TRAINING, vars(each)) for each in settings))
    defaults = vars(MethodSettings())
    for name, value in plan.given.values.items():
        if all(name in method.own for method in plan.methods) and name not in OF_MEASURING:
            yield f"{name} is {shown(value)} and does nothing: each of methods has its own"
        elif name in unknown and value != defaults.get(name):
            yield f"{name} is {shown(value)} and does nothing beside the settings of any of methods"
    if not plan.general:
        yield "general_file is not set: what the model forgets beside the skills is not measured"
    if any(map(teaches_itself, settings)):
        for skill in plan.skills:
            if not can_ask_teacher(skill.rows.held_out, skill.settings.template):
                yield f"{skill.name}: eval_file has rows without a demonstration, so that no teacher is measured"


def check_with_model(plan: Plan, runs: Sequence[Run]) -> None:
    """UsageError for what only the model can tell of the stages to come, before others are trained for hours.

    Rows may not fit it, and rollouts may be such as it cannot write.
    """
    waiting = {  # one seed is as good as another; what comes after a stage that is not there is trained anew
        (run.method, stage.number): stage
        for run in runs
        for stage in itertools.dropwhile(lambda stage: stage.is_there, run.stages)
    }
    if not waiting:
        return
    model, tokenizer = load_model(plan.model.model, plan.model.dtype, **plan.model.trust)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what a stage warns of it says when it is trained
    try:
        with tempfile.TemporaryDirectory() as folder:
            for stage in waiting.values():
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
    gc.collect()  # the model of the stage before
    return train(
        stage.given.make(ModelArguments),
        LoraArguments(),
        rows_of(stage),
        stage.given.make(SDFTConfig),
        started=time.perf_counter(),
        recipe=stage.recipe,
    )


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


def scored(line: dict[str, Any]) -> str:
    """What a stage's model can do, in a line."""
    shares = {**line["accuracy"], "general": line["general_accuracy"]}
    said = [f"{name} {_percent(share)}" for name, share in shares.items() if share is not None]
    nats = [] if line["forgetting"] is None else [f"{line['forgetting']:.3f} nats a token from the base model"]
    return ", ".join([*said, *nats])


def table(plan: Plan, base: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Accuracy on every skill and on the general prompts before training, and after the last stage of each run.

    Of several seeds there are means too, of the runs that came as far as any of their method.
    """
    names = [skill.name for skill in plan.skills]
    prompts = {skill.name: len(skill.rows.held_out) for skill in plan.skills} | {"general": len(plan.general)}
    lines = [["", *prompts, "nats a token", "weights moved"], ["prompts", *map(str, prompts.values()), "", ""]]
    lines.append(["base", *(_percent(base["accuracy"][name]) for name in names), _percent(base["general_accuracy"])])

    def values(run: dict[str, Any]) -> list[float | None]:
        last = run["stages"][-1]
        shares = [last["accuracy"][name] for name in names]
        return [*shares, last["general_accuracy"], last["forgetting"], last["weights_moved"]]

    def add(name: str, found: list[float | None]) -> None:
        nats_and_moved = ["" if value is None else f"{value:.3f}" for value in found[-2:]]
        lines.append([name, *map(_percent, found[:-2]), *nats_and_moved])

    for method in dict.fromkeys(run["method"] for run in runs):
        of = [run for run in runs if run["method"] == method]
        for run in of:
            add(f"{method}, seed {run['seed']}", values(run))
        most = max(len(run["stages"]) for run in of)
        as_far = [values(run) for run in of if len(run["stages"]) == most]
        if len(as_far) > 1:
            add(f"{method}, mean of {len(as_far)}", [_mean(column) for column in zip(*as_far, strict=True)])
    for line in lines:
        line += [""] * (len(lines[0]) - len(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
