"""How much sooner rollouts are written with drafts (`rollout_draft`), step by step of the demo's training.

`python -m benchmarks.drafts` trains SmolLM2-135M-Instruct as `examples/demo.yaml` says, over several epochs of a part
of its rows. The rollouts of every step are written twice, with drafts and without; which comes first takes turns. Their
tokens are compared, and training goes on with them. It prints the medians of each epoch, and writes every step's speed
as CSV and as a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from sdft import SDFTConfig, SDFTTrainer
from sdft.data import load_rows
from sdft.models.load import load_model
from sdft.rollouts import generate
from sdft.rollouts.interface import Completion, Request
from sdft.settings.fields import training_fields
from sdft.settings.recipe import read

RECIPE = Path(__file__).parent.parent / "examples" / "demo.yaml"
SOURCES = ("history", "demonstration")


@dataclass(frozen=True)
class Step:
    """One row of the table: tokens a second, by epoch and step, each from 1."""

    draft: str
    epoch: int
    step: int
    without: float
    with_drafts: float
    accepted: float
    tokens_per_pass: float
    same: bool

    @property
    def gain(self) -> float:
        return self.with_drafts / self.without


class Twice:
    """Stands in for `write`: writes with drafts and without, and remembers how long each took."""

    def __init__(self, draft: str, steps: int) -> None:
        self.draft, self.steps, self.found = draft, steps, list[Step]()

    def __call__(self, model: Any, requests: Sequence[Request], sampling: Any, **options: Any) -> list[Completion]:
        bare = [dataclasses.replace(request, draft=()) for request in requests]
        ways = [("with", requests), ("without", bare)]
        written: dict[str, list[Completion]] = {}
        seconds: dict[str, float] = {}
        for way, asked in ways[:: -1 if len(self.found) % 2 else 1]:
            started = time.perf_counter()
            written[way] = generate.write(model, asked, sampling, **options)
            seconds[way] = time.perf_counter() - started
        helped, plain = written["with"], written["without"]
        tokens, number = sum(len(completion.tokens) for completion in plain), len(self.found)
        passes = sum(completion.passes for completion in helped)
        self.found.append(
            Step(
                draft=self.draft,
                epoch=1 + number // self.steps,
                step=1 + number,
                without=round(tokens / seconds["without"], 2),
                with_drafts=round(tokens / seconds["with"], 2),
                accepted=round(sum(c.accepted for c in helped) / max(sum(c.drafted for c in helped), 1), 3),
                tokens_per_pass=round(tokens / passes, 2) if passes else 1.0,
                same=[c.tokens for c in helped] == [c.tokens for c in plain],
            )
        )
        return helped


def train(draft: str, rows: int, epochs: int, temperature: float) -> list[Step]:
    """A run of the demo on so many rows, and what each of its steps took."""
    recipe = yaml.safe_load(RECIPE.read_text())
    told = read([str(RECIPE)], training_fields(), command="sdft train", ignored=recipe).values | {
        "rollout_draft": draft,
        "rollout_temperature": temperature,
        "num_train_epochs": epochs,
        "max_steps": -1,
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    data = load_rows(RECIPE.parent.parent / recipe["train_file"])[:rows]
    model, tokenizer = load_model(recipe["model"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SDFTTrainer(
            model, SDFTConfig(**{**told, "output_dir": folder}), train_dataset=data, processing_class=tokenizer
        )
        steps = -(-rows // trainer.args.train_batch_size)
        twice = Twice(draft, steps)
        trainer.write = twice
        trainer.train()
    return twice.found


def table(rows: list[Step]) -> str:
    lines = [
        f"{'drafts':14} {'epoch':>5} {'tokens/s without':>16} {'with':>8} {'gain':>6} {'accepted':>8} "
        f"{'tokens/pass':>11}"
    ]
    for draft, epoch in dict.fromkeys((row.draft, row.epoch) for row in rows):
        of_epoch = [row for row in rows if (row.draft, row.epoch) == (draft, epoch)]
        without, with_, gain, accepted, per_pass = (
            statistics.median(getattr(row, name) for row in of_epoch)
            for name in ("without", "with_drafts", "gain", "accepted", "tokens_per_pass")
        )
        lines.append(f"{draft:14} {epoch:5} {without:16.1f} {with_:8.1f} {gain:6.2f} {accepted:8.2f} {per_pass:11.2f}")
    others = sum(not row.same for row in rows)
    lines.append(f"medians of steps; the tokens were the same in {len(rows) - others} of {len(rows)} steps")
    return "\n".join(lines)


def draw(rows: list[Step], path: Path) -> None:
    drafts = list(dict.fromkeys(row.draft for row in rows))
    with plots.panels(path, 1, len(drafts), (5.5 * len(drafts), 4)) as axes:
        for axis, draft in zip(axes[0], drafts, strict=True):
            of_draft = [row for row in rows if row.draft == draft]
            for name, label in (("without", "without"), ("with_drafts", f"with {draft}")):
                axis.plot([row.step for row in of_draft], [getattr(row, name) for row in of_draft], label=label)
            axis.set(xlabel="step", ylabel="tokens a second", title=f"rollout_draft: {draft}")
            axis.set_ylim(bottom=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description=__doc__)
    parser.add_argument("--drafts", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rows", type=int, default=128, help="rows of the demo that are trained on (default 128)")
    parser.add_argument("--epochs", type=int, default=3, help="times that they are gone through (default 3)")
    parser.add_argument("--temperature", type=float, default=0.3, help="of the rollouts (default 0.3, the demo's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "drafts")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    rows = [
        row
        for draft in tqdm(given.drafts, desc="trainings", unit="run")
        for row in train(draft, given.rows, given.epochs, given.temperature)
    ]
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)
    draw(rows, given.plot)


if __name__ == "__main__":
    main()
