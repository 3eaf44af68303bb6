"""What a run leaves to look at: metrics.jsonl while it runs, then summary.json, curves.png and a table.

metrics.jsonl has one line for each log of the Trainer: step, loss, gradient norm, learning rate, entropies, completion
lengths, time and memory. summary.json has the table's numbers, and time and memory of the whole. curves.png shows them.
docs/outputs.md has every name and its unit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft.checkpoints.files import failing_clearly, in_one_move, write_json
from sdft.data import WHERE, Row
from sdft.errors import counted
from sdft.evaluation.completion_log import forget_after
from sdft.run_files import CURVES_FILE, METRICS_FILE
from sdft.templates import as_messages

ANSWERED = {  # by scorer
    "exact": "answered exactly",
    "contains": "answered",
    "choice": "answered with the right letter",
    "json": "answered with the right JSON",
}


def answered(scorer: str) -> str:
    """What prompts are that a scorer calls right."""
    return ANSWERED.get(scorer, f"right by {scorer}")


@dataclass
class Summary:
    """The numbers of a run's table; None where the run had nothing to measure it on."""

    model: str
    method: str
    divergence: str | None
    teacher: str | None
    steps: int
    loss_first: float | None
    loss_last: float | None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_teacher: float | None = None
    held_out_prompts: int = 0
    general_accuracy_before: float | None = None
    general_accuracy_after: float | None = None
    forgetting: float | None = None
    general_prompts: int = 0
    training_seconds: float = 0.0
    total_seconds: float = 0.0
    rollout_seconds: float = 0.0
    feedback_seconds: float = 0.0
    score_seconds: float = 0.0
    learn_seconds: float = 0.0
    save_seconds: float = 0.0
    eval_seconds: float = 0.0
    tokens_per_second: float | None = None
    teacher_model: str | None = None
    rollout_tokens_per_second: float | None = None
    peak_memory_mib: float | None = None
    rollout_peak_memory_mib: float | None = None
    feedback_peak_memory_mib: float | None = None
    score_peak_memory_mib: float | None = None
    learn_peak_memory_mib: float | None = None
    save_peak_memory_mib: float | None = None
    eval_peak_memory_mib: float | None = None
    scorer: str = "exact"
    general_scorer: str = "contains"


@dataclass
class Scores:
    """The numbers of `sdft eval`; None where there was nothing to measure them on."""

    model: str
    accuracy: float | None
    accuracy_by_template: dict[str, float | None]  # of the teacher
    held_out_prompts: int
    scorer: str
    general_accuracy: float | None
    general_prompts: int  # those that have an answer
    general_scorer: str
    base_model: str | None
    forgetting: float | None
    teacher_model: str | None = None


def score_lines(scores: Scores) -> list[str]:
    """The numbers of `sdft eval` as it prints them."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    lines = []
    if scores.accuracy is not None:
        how = answered(scores.scorer)
        lines.append(f"held-out prompts {how} ({scores.held_out_prompts}): {percent(scores.accuracy)}")
    if scores.accuracy_by_template:
        whose = "the same, shown the demonstration" if scores.teacher_model is None else f"by {scores.teacher_model}"
        lines.append(f"{whose} under teacher_template")
        width = max(map(len, scores.accuracy_by_template))
        lines += [f"  {name.ljust(width)}  {percent(value):>6}" for name, value in scores.accuracy_by_template.items()]
    if scores.general_accuracy is not None:
        how = answered(scores.general_scorer)
        lines.append(f"general prompts {how} ({scores.general_prompts}): {percent(scores.general_accuracy)}")
    if scores.forgetting is not None:
        lines.append(f"forgetting: {scores.forgetting:.3f} nats a token from {scores.base_model}")
    return lines


def loss_ends(history: list[dict[str, Any]], share: float = 0.1) -> tuple[float | None, float | None]:
    """The mean loss over the first and over the last tenth of the logged steps."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses:
        return None, None
    count = max(1, int(len(losses) * share))
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def table(summary: Summary) -> str:
    """The run in a few lines of text; rows that nothing was measured for are left out."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [
        (
            f"held-out prompts {answered(summary.scorer)} ({summary.held_out_prompts})",
            percent(summary.accuracy_before),
            percent(summary.accuracy_after),
            percent(summary.accuracy_teacher),
        ),
        (
            f"general prompts {answered(summary.general_scorer)} ({summary.general_prompts})",
            percent(summary.general_accuracy_before),
            percent(summary.general_accuracy_after),
            "",
        ),
        (
            "divergence from the base model (nats a token)",
            number(None if summary.forgetting is None else 0.0),
            number(summary.forgetting),
            "",
        ),
        ("training loss (first and last tenth)", number(summary.loss_first), number(summary.loss_last), ""),
    ]
    rows = [row for row in rows if any(row[1:])]
    header = ("", "before", "after", "teacher" if any(row[3] for row in rows) else "")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(4)]

    def line(row: tuple[str, str, str, str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "   ".join(cells).rstrip()

    rule = "─" * max(len(line(row)) for row in [header, *rows])
    return "\n".join([line(header), rule, *map(line, rows)])


def describe(summary: Summary) -> str:
    """One line: what was trained, how, and how long it took."""
    how = "cross-entropy on the demonstrations"
    if summary.method == "sdft":
        how = f"self-distillation ({_name(summary.divergence)}, {summary.teacher} teacher)"
        if summary.teacher_model is not None:
            how = f"distillation ({_name(summary.divergence)}, from {summary.teacher_model})"
    minutes, seconds = divmod(round(summary.total_seconds), 60)
    return f"{summary.model}: {counted(summary.steps, 'step')} of {how}, {minutes} min {seconds:02d} s in all"


def wrong_answers(
    answered: Sequence[tuple[Row, str, bool]], whose: str = "", count: int = 3, width: int = 100
) -> list[str]:
    """Lines that show the first of the wrong answers, each with its row, the prompt and what was expected."""
    wrong = [(row, text) for row, text, right in answered if not right]
    if not wrong:
        return []
    first = f", the first {count}" if len(wrong) > count else ""
    lines = [f"{counted(len(wrong), 'wrong answer')}{whose}{first}:"]
    for row, text in wrong[:count]:
        asked = as_messages(row["prompt"])[-1]["content"]
        lines.append(f"  {row[WHERE]}")
        for name, value in (("prompt", asked), ("answer", row["answer"]), ("completion", text)):
            shown = value.replace("\n", "\\n")
            lines.append(f"    {name:10}  {shown if len(shown) <= width else shown[: width - 3] + '...'}")
    return lines


def cut_answers(to: str, finished: Sequence[bool], field: str, length: int) -> list[str]:
    """A line that says how many answers are not finished, where there are any."""
    cut = len(finished) - sum(finished)
    if not cut:
        return []
    which = " ".join(filter(None, (f"{cut} of {counted(len(finished), 'answer')}", to)))
    other = "" if field == "max_completion_length" else ", or name in eval_stop what ends an answer"
    return [f"{which} {'was' if cut == 1 else 'were'} cut at {field}={length}: raise it{other}"]


def _name(divergence: str | None) -> str:
    return str(divergence).replace("_", " ").replace("kl", "KL")


def write_summary(path: str | Path, summary: Summary | Scores) -> None:
    write_json(path, asdict(summary))


def draw_curves(folder: str | Path, history: list[dict[str, Any]], summary: Summary) -> None:
    """curves.png: the loss by step, and beside it what the model gained and what it lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    blue, orange, grey = "#2a6fbb", "#e07b39", "#8a8f98"
    gained = [("before", summary.accuracy_before, grey), ("after", summary.accuracy_after, blue)]
    gained += [("shown the\ndemonstration", summary.accuracy_teacher, orange)]
    kept = [("before", summary.general_accuracy_before, grey), ("after", summary.general_accuracy_after, blue)]
    moved = "" if summary.forgetting is None else f"\n{summary.forgetting:.2f} nats a token from the base"
    panels = []
    for title, bars in (
        (f"{summary.held_out_prompts} held-out prompts\n{answered(summary.scorer)}", gained),
        (f"{summary.general_prompts} general prompts {answered(summary.general_scorer)}{moved}", kept),
    ):
        measured = [(name, 100 * value, colour) for name, value, colour in bars if value is not None]
        if measured:
            panels.append((title, measured))
    figure, axes = pyplot.subplots(
        1,
        1 + len(panels),
        figsize=(6 + 3 * len(panels), 4),
        width_ratios=[2] + [1] * len(panels),
        squeeze=False,
        layout="constrained",
    )
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    trend = [sum(window) / len(window) for window in (losses[max(0, n - 4) : n + 1] for n in range(len(losses)))]
    curve = axes[0][0]
    curve.plot(steps, losses, color=blue, alpha=0.35, marker="o", markersize=3, linewidth=1, label="each log")
    curve.plot(steps, trend, color=blue, linewidth=2.2, label="mean of the last five")
    curve.legend(frameon=False)
    what = f"{_name(summary.divergence)} to the teacher" if summary.method == "sdft" else "cross-entropy"
    curve.set(xlabel="optimizer step", ylabel="nats a token", title=f"loss: {what}", ylim=(min([0.0, *losses]), None))
    curve.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, (title, measured) in zip(axes[0][1:], panels, strict=True):
        names, heights, colours = zip(*measured, strict=True)
        axis.bar_label(axis.bar(names, heights, color=colours, width=0.6), fmt="%.0f %%", padding=2)
        axis.set(ylim=(0, 112), yticks=range(0, 101, 25), title=title)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
        axis.title.set_fontsize(11)
    with in_one_move(Path(folder) / CURVES_FILE) as beside:
        figure.savefig(beside, format="png", dpi=150)
    pyplot.close(figure)


class MetricsFile(TrainerCallback):
    """Appends each log to metrics.jsonl; a run that goes on from a checkpoint repeats the lines of later steps."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.is_file():
            forget_after(self.path, state.global_step if state.global_step else -1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with failing_clearly(METRICS_FILE, str(self.path.parent)), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **kwargs["logs"]}) + "\n")
