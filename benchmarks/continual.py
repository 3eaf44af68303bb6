"""Learning without forgetting: what each method learns and what it forgets, over learning rates.

`python -m benchmarks.continual` trains SmolLM2-135M-Instruct, or another model, on skills of `examples/skills/`, one
after the other, by self-distillation (sdft), supervised fine-tuning (sft), supervised fine-tuning with a penalty on the
divergence from the model that a stage began with (sft-kl), and self-distillation on rollouts that the teacher writes
(sdft-teacher), each with the same steps and with every learning rate; --methods chooses. After each stage it measures
accuracy on held-out prompts of every skill, and on general prompts, of whose kinds none is trained on: their accuracy,
and the divergence from the base model. It is `sdft continual` with a recipe that it writes; a run that was interrupted
goes on with its next stage. It prints a table, and writes it as CSV and as a plot.

A trial is a learning rate and a number of steps. By the accuracy on other rows than those held out (SKILL_choose.jsonl,
the mean over seeds and skills after the last stage) a trial of each method is chosen: the best one, and the one that is
nearest to what the weakest method's best has, with the lower learning rate where two are as near.

On two cores a stage of 40 steps takes 2 minutes by sft and 5 by sdft, and its exams one more. With --from it trains
nothing, and shows rows of CSV files that it wrote before.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine, plots
from benchmarks import rows as files
from sdft.cli import main as sdft

SKILLS = Path(__file__).parent.parent / "examples" / "skills"

#: Each skill's scorer, and the form in which the teacher is shown its demonstrations (examples/skills/README.md).
LEARNED = {
    "science": {"scorer": "choice", "teacher_template": "paper"},
    "tools": {"scorer": "json", "teacher_template": "turn"},
    "triage": {"scorer": "contains", "teacher_template": "turn"},
}

METHODS: dict[str, dict[str, Any]] = {
    "sdft": {"method": "sdft"},
    "sft": {"method": "sft"},
    "sft-kl": {"method": "sft", "base_kl_weight": 1.0},
    "sdft-teacher": {"method": "sdft", "rollout_from": "teacher"},
}

LEARNING_RATES = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4)

#: What all methods share.
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "general_file": str(SKILLS / "general.jsonl"),
    "general_scorer": "examples.skills.scoring:plainly",
    "divergence": "forward_kl",
    "teacher": "base",
    "freeze_embeddings": True,
    "rollout_temperature": 0.3,
    "max_completion_length": 48,
    "eval_completion_length": 64,
    "general_completion_length": 32,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 60,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
}

#: The columns of a CSV that are text, and those that are whole numbers.
WORDS, COUNTS = ("method", "skill"), ("seed", "steps", "stage")

COLOURS = {"sdft": "sdft-kernels", "sft": "TRL", "sft-kl": "teacher", "sdft-teacher": "forward"}


@dataclass(frozen=True)
class Point:
    """A stage of a run: shares are from 0 to 1, `forgetting` is in nats a token on the general prompts."""

    method: str
    learning_rate: float
    seed: int
    steps: int
    stage: int
    skill: str
    choose_accuracy: float | None
    accuracy: float
    earlier_accuracy: float | None
    general_accuracy: float
    forgetting: float
    weights_moved: float
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A way to learn with its learning rate and its steps."""

    method: str
    learning_rate: float
    steps: int

    @property
    def name(self) -> str:
        """What its runs are called, and their folders."""
        return f"{self.method}-{self.learning_rate:g}-{self.steps}"

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings of `sdft train`."""
        return {**METHODS[self.method], "learning_rate": self.learning_rate, "max_steps": self.steps}


def trials_of(methods: Mapping[str, Sequence[float]], steps: Sequence[int]) -> list[Trial]:
    return [Trial(name, rate, count) for name, rates in methods.items() for rate in rates for count in steps]


def recipe(
    skills: Sequence[str],
    trials: Sequence[Trial],
    seeds: Sequence[int],
    folder: Path,
    **settings: Any,
) -> dict[str, Any]:
    """What `sdft continual` is told: a method for each trial."""
    return {
        **SETTINGS,
        **settings,
        "skills": {
            name: {
                "train_file": str(SKILLS / f"{name}_train.jsonl"),
                "eval_file": str(SKILLS / f"{name}_heldout.jsonl"),
                "choose_file": str(SKILLS / f"{name}_choose.jsonl"),
                **LEARNED[name],
            }
            for name in skills
        },
        "methods": {trial.name: trial.settings for trial in trials},
        "seeds": list(seeds),
        "output_dir": str(folder),
    }


def points(report: dict[str, Any], trials: Sequence[Trial]) -> list[Point]:
    """The stages of a report (continual.json)."""
    found, of_name = [], {trial.name: trial for trial in trials}
    for run in report["runs"]:
        trial = of_name[run["method"]]
        for number, stage in enumerate(run["stages"], start=1):
            (skill,) = stage["learned"]
            earlier = [stage["accuracy"][name] for name in report["skills"][: number - 1]]
            found.append(
                Point(
                    method=trial.method,
                    learning_rate=trial.learning_rate,
                    seed=run["seed"],
                    steps=trial.steps,
                    stage=number,
                    skill=skill,
                    choose_accuracy=_choosing(stage, report["skills"][:number]),
                    accuracy=round(stage["accuracy"][skill], 4),
                    earlier_accuracy=round(sum(earlier) / len(earlier), 4) if earlier else None,
                    general_accuracy=round(stage["general_accuracy"], 4),
                    forgetting=round(stage["forgetting"], 4),
                    weights_moved=round(stage["weights_moved"], 4),
                    seconds=round(stage["seconds"], 1),
                )
            )
    return found


def _choosing(stage: dict[str, Any], skills: Sequence[str]) -> float | None:
    """The mean accuracy on the rows to choose by, of the skills that were learned so far."""
    of_skill = stage.get("choose_accuracy", {})
    return round(sum(of_skill[name] for name in skills) / len(skills), 9) if of_skill else None


def _last(found: Sequence[Point]) -> dict[Trial, list[Point]]:
    """The last stage of every run, by trial."""
    of_trial: dict[Trial, list[Point]] = {}
    for point in found:
        if point.stage == max(each.stage for each in found):
            of_trial.setdefault(Trial(point.method, point.learning_rate, point.steps), []).append(point)
    return of_trial


def _mean(rows: Sequence[Point], name: str) -> float:
    return float(sum(getattr(row, name) for row in rows) / len(rows))


def _held_out(rows: Sequence[Point]) -> float:
    """The mean accuracy on the held-out rows of all skills that were learned, over the seeds."""
    return sum((row.accuracy + (row.stage - 1) * (row.earlier_accuracy or 0.0)) / row.stage for row in rows) / len(rows)


def chosen(found: Sequence[Point]) -> dict[str, tuple[Trial, Trial]]:
    """For each method, the trial with the best accuracy on the rows to choose by, and the one that is matched: whose
    accuracy there is nearest to the least of those bests.
    """
    scores = {trial: round(_mean(rows, "choose_accuracy"), 7) for trial, rows in _last(found).items()}
    methods = dict.fromkeys(trial.method for trial in scores)
    in_turn = sorted(scores, key=lambda trial: (trial.learning_rate, trial.steps))  # the first of equals is taken
    best = {m: max((t for t in in_turn if t.method == m), key=lambda t: scores[t]) for m in methods}
    target = min(scores[trial] for trial in best.values())
    return {
        m: (best[m], min((t for t in in_turn if t.method == m), key=lambda t: round(abs(scores[t] - target), 6)))
        for m in methods
    }


def verdict(found: Sequence[Point], base: dict[str, Any]) -> str:
    """What was chosen, as means over seeds, and what the matched trials have forgotten beside sft's."""
    if any(point.choose_accuracy is None for point in found):
        return "nothing is chosen: some stages were not measured on the rows to choose by"
    picked, runs = chosen(found), _last(found)

    def lost(trial: Trial) -> tuple[float, float]:
        """Its share of the general prompts, and its nats."""
        return base["general_accuracy"] - _mean(runs[trial], "general_accuracy"), _mean(runs[trial], "forgetting")

    lines = ["", "chosen by the rows for choosing, means of the seeds after the last stage:"]
    for place, said in enumerate(("best", "matched")):
        for method, pair in picked.items():
            trial = pair[place]
            general, nats = lost(trial)
            lines.append(
                f"{said:8} {method:7} {trial.learning_rate:g} in {trial.steps} steps: "
                f"{_mean(runs[trial], 'choose_accuracy'):.1%} on rows to choose by, {_held_out(runs[trial]):.1%} held "
                f"out, {100 * general:.1f} points of general prompts lost, {nats:.3f} nats"
            )
    for method in (name for name in picked if name != "sft" and "sft" in picked):
        pairs = zip(lost(picked[method][1]), lost(picked["sft"][1]), strict=True)
        ratios = [f"{own / other:.2f}" if other > 0 else "-" for own, other in pairs]
        lines.append(f"matched, {method} has forgotten {ratios[0]} of sft's points and {ratios[1]} of its nats")
    return "\n".join(lines)


def before(base: dict[str, Any]) -> str:
    """The scores of the base model, and of the same model shown the demonstrations."""
    alone = ", ".join(f"{name} {share:.1%}" for name, share in base["accuracy"].items())
    shown = ", ".join(f"{name} {share:.1%}" for name, share in base["teacher_accuracy"].items())
    return f"before: {alone}, general {base['general_accuracy']:.1%}; shown the demonstration: {shown}"


def read_points(paths: Sequence[Path], skills: Sequence[str], steps: Sequence[int]) -> list[Point]:
    """Of the rows of CSV files those of these skills and steps."""
    found = []
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = {name: text for name, text in row.items() if name not in WORDS}
                values: dict[str, Any] = {name: float(text) if text else None for name, text in numbers.items()}
                values |= {name: row[name] for name in WORDS} | {name: int(row[name]) for name in COUNTS}
                found.append(Point(**values))
    return [point for point in found if point.skill in skills and point.steps in steps]


def table(found: Sequence[Point]) -> str:
    """A line for each stage."""
    lines = [
        "| method | learning rate | steps | seed | learned | to choose by | accuracy | earlier skills | general "
        "| nats a token | moved | s |",
        "|---" * 12 + "|",
    ]
    for point in found:
        earlier = "" if point.earlier_accuracy is None else f"{point.earlier_accuracy:.1%}"
        choosing = "" if point.choose_accuracy is None else f"{point.choose_accuracy:.1%}"
        cells = [
            *(point.method, f"{point.learning_rate:g}", str(point.steps), str(point.seed), point.skill),
            *(choosing, f"{point.accuracy:.1%}", earlier),
            *(f"{point.general_accuracy:.1%}", f"{point.forgetting:.3f}", f"{point.weights_moved:.2f}"),
            f"{point.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[Point], base: dict[str, Any] | None, path: Path) -> None:
    """Accuracy on the last skill against what is left of the rest, a point for each trial and seed."""
    least = min(point.steps for point in found)
    last = [point for point in found if point.stage == max(each.stage for each in found)]
    sides = [
        ("forgetting", "nats a token from the base model\non general prompts"),
        ("general_accuracy", "accuracy on general prompts"),
    ]
    if last[0].stage > 1:
        sides.append(("earlier_accuracy", "accuracy on the skills before, held out"))
    with plots.panels(path, 1, len(sides), (5 + 3 * len(sides), 4)) as axes:
        for axis, (name, label) in zip(axes[0], sides, strict=True):
            for method in dict.fromkeys(point.method for point in last):
                of_method = sorted((p for p in last if p.method == method), key=lambda p: p.learning_rate)
                colour = plots.COLOURS[COLOURS[method]]
                for seed, steps in dict.fromkeys((point.seed, point.steps) for point in of_method):
                    line = [(p.accuracy, getattr(p, name)) for p in of_method if (p.seed, p.steps) == (seed, steps)]
                    style = "-" if steps == least else "--"  # more steps are broken lines
                    axis.plot(*zip(*line, strict=True), marker="o", linestyle=style, color=colour, label=method)
                for point in of_method:
                    place = (point.accuracy, getattr(point, name))
                    said = f"{point.learning_rate:g}" + (f", {point.steps} steps" if point.steps != least else "")
                    axis.annotate(said, place, (4, 4), textcoords="offset points", fontsize=7)
            teacher = base["teacher_accuracy"].get(last[0].skill) if base else None
            if teacher is not None:
                axis.axvline(teacher, color="grey", linestyle="--", label="the teacher's accuracy")
            axis.set(xlabel=f"accuracy on {last[0].skill}, held out", ylabel=label, xlim=(-0.03, 1.03))


def method_of(text: str) -> tuple[str, Sequence[float]]:
    """A method and its learning rates, as sft:1e-5,2e-5."""
    name, _, rates = text.partition(":")
    found: Sequence[float] = ()
    with contextlib.suppress(ValueError):
        found = [float(rate) for rate in rates.split(",")] if rates else LEARNING_RATES
    once = len({f"{rate:g}" for rate in found}) == len(found)  # as Trial.name has it
    if name not in METHODS or not found or not once or not all(0 < rate < math.inf for rate in found):
        names = ", ".join(METHODS)
        raise argparse.ArgumentTypeError(f"a method is {text!r}; it may be one of {names}, or as sft:1e-5,2e-5")
    return name, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.continual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--skills", nargs="+", choices=list(LEARNED), default=list(LEARNED), help="in this order")
    rates = ",".join(f"{rate:g}" for rate in LEARNING_RATES)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_of,
        default=[(name, LEARNING_RATES) for name in ("sdft", "sft", "sft-kl")],
        metavar="METHOD[:RATE,RATE]",
        help=f"of {', '.join(METHODS)}; without learning rates with all of {rates} (default sdft sft sft-kl)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[40], help="of each stage, 8 rows each (default 40)")
    parser.add_argument("--folder", type=Path, default=Path("runs/continual-benchmark"), help="where the runs go")
    parser.add_argument("--model", default=SETTINGS["model"], help="another model than SmolLM2")
    parser.add_argument(
        "--stop", nargs="+", metavar="TEXT", help="texts that end an answer, for a model that does not end its own"
    )
    parser.add_argument(
        "--from", dest="earlier", nargs="+", type=Path, metavar="CSV", help="show these rows, of --skills and --steps"
    )
    files.add_arguments(parser, "continual")
    given = parser.parse_args(argv)
    if given.earlier:
        found = read_points(given.earlier, given.skills, given.steps)
        if not found:
            parser.error(f"--from has no row of {', '.join(given.skills)} in {given.steps} steps")
        print(table(found))
        files.write(found, given)
        draw(found, None, given.plot)
        return
    if len(dict(given.methods)) < len(given.methods):
        parser.error("--methods has a method twice; its rates stand behind one name, as sft:1e-5,2e-5")
    trials = trials_of(dict(given.methods), given.steps)
    other = {"model": given.model, "rollout_stop": given.stop, "eval_stop": given.stop}
    told = recipe(given.skills, trials, given.seeds, given.folder, **other)
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(told, sort_keys=False))
    code = sdft(["continual", str(path)])
    if code > 1:
        sys.exit(code)
    report = json.loads((given.folder / "continual.json").read_text())
    found = points(report, trials)
    print(machine.heading(), before(report["base"]), table(found), verdict(found, report["base"]), sep="\n")
    files.write(found, given)
    draw(found, report["base"], given.plot)
    if code:  # a run has diverged
        sys.exit(code)


if __name__ == "__main__":
    main()
