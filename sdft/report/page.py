"""The report as one HTML page, with all that it takes in it: no network is asked when it is opened.

Everything that comes from a run is data in one JSON element, in which no "<" is left; the scripts show it as text.
"""

from __future__ import annotations

import datetime
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdft.report.continual import Continual
from sdft.report.rollouts import samples
from sdft.report.run_folder import RunFolder, is_number, read_run, series, significant
from sdft.report.what_ran import NUMBERS, bars, beside, differing, facts, headline, numbers, settings
from sdft.run_files import REPORT_FILE
from sdft.version import OURS, version_of

#: What the page has of each run over its steps.
CURVES = (
    "loss",
    "student_entropy",
    "teacher_entropy",
    "completion_length",
    "finished",
    "out_of_reach",
    "eval_accuracy",
    "eval_forgetting",
    "tokens_per_second",
    "rollout_tokens_per_second",
)
PHASES = ("rollout", "feedback", "score", "learn", "save", "eval")
SCRIPTS = ("chart.umd.min.js", "plots.js", "rollouts.js", "report.js")


def page(folders: Sequence[str | Path]) -> str:
    """The report of one run, or of several beside each other. UsageError where a folder is no run's."""
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    title = f"{', '.join(run.name for run in runs)}: sdft report"
    assets = files("sdft.report") / "assets"
    parts = {
        "title": html.escape(title),
        "style": (assets / "report.css").read_text("utf-8"),
        "data": as_json(data(runs)),
        "scripts": "".join(
            f"<script>{(assets / name).read_text('utf-8').partition('//# sourceMappingURL')[0]}</script>\n"
            for name in SCRIPTS
        ),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], (assets / "page.html").read_text("utf-8"))


def default_file(folders: Sequence[str | Path]) -> Path:
    """Where a report is written unless it is said: in the run's folder; of several runs, here."""
    return Path(folders[0]) / REPORT_FILE if len(folders) == 1 else Path(REPORT_FILE)


def as_json(value: Any) -> str:
    """JSON that can stand in a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half of a surrogate pair is no character, and no file in UTF-8 can have it.
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def data(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """All that the scripts show."""
    shown = [samples(run, 1 / len(runs)) for run in runs]  # which may add to a run's notes
    recipes = beside([settings(run) for run in runs])
    return {
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "version": version_of(OURS) or "of a checkout",
        "runs": [
            {
                "name": run.name,
                "headline": headline(run) if run.lines or run.continual else "",
                "notes": run.notes,
                "curves": curves(run),
                "step_seconds": series(step_seconds(run.lines)),
                "seconds": seconds(run.lines),
                "samples": sampled,
            }
            for run, sampled in zip(runs, shown, strict=True)
        ],
        "numbers": beside([numbers(run) for run in runs], [label for label, _ in NUMBERS.values()]),
        "bars": bars(runs),
        "facts": beside([facts(run) for run in runs]),
        "differing": differing(recipes) if len(runs) > 1 else [],
        "settings": recipes,
        "continual": [{"run": run.name, **continual(run.continual)} for run in runs if run.continual is not None],
    }


def curves(run: RunFolder) -> dict[str, list[list[float]]]:
    """The curves by name; those of evaluation begin before the first step, where that was measured."""
    found = {name: curve for name, curve in series(run.lines).items() if name in CURVES}
    before = {"eval_accuracy": run.summary.get("accuracy_before"), "eval_forgetting": 0.0}
    for name, value in before.items():
        if name in found and is_number(value):
            steps, values = found[name]
            found[name] = [[0, *steps], [value, *values]]
    return found


def step_seconds(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The seconds of a step by phase, from those of the steps between two lines; without saving and evaluation."""
    found, before = list[dict[str, Any]](), 0
    for line in (line for line in lines if "loss" in line):
        steps = max(1, line["step"] - before)
        before = line["step"]
        spent = {phase: line.get(f"{phase}_seconds") for phase in PHASES[:4]}
        found.append(
            {"step": line["step"], **{phase: each / steps for phase, each in spent.items() if is_number(each)}}
        )
    return found


def seconds(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """All seconds by phase that were logged."""
    logged = {phase: [line.get(f"{phase}_seconds") for line in lines] for phase in PHASES}
    totals = [(phase, sum(each for each in values if is_number(each))) for phase, values in logged.items()]
    return [(phase, significant(total)) for phase, total in totals if total]


def continual(measured: Continual) -> dict[str, Any]:
    """The accuracies of each method as a table of stages and sets, and its forgetting after its last stage.

    `after` names that stage where it is not yet the last of the experiment.
    """
    tables = []
    for method in measured.methods:
        of = measured.of(method)
        rows = [
            [stage, [_spread(each.accuracy.get(name) for each in found) for name in measured.evaluated]]
            for stage, found in of.items()
        ]
        stage, last = list(of.items())[-1]
        after = stage if stage in measured.skills[:-1] else None
        forgetting = _spread(each.forgetting for each in last)
        tables.append({"method": method, "rows": rows, "after": after, "forgetting": forgetting})
    return {"evaluated": measured.evaluated, "tables": tables}


def _spread(values: Any) -> dict[str, Any]:
    """The mean over seeds, None where nothing was measured, and each seed's."""
    found = [value for value in values if value is not None]
    return {"mean": sum(found) / len(found) if found else None, "seeds": found}
