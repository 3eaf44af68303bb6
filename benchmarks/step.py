"""One optimizer step of our trainer and of TRL's SDFTTrainer: its time, its generation's, its memory, and its loss.

`python -m benchmarks.step` runs both in turns in one process (reverse KL over the full vocabulary, frozen teacher,
float32, no gradient checkpointing), and each in a process of its own for its memory. Both are given all prompts as one
batch; ours is told to go through at most 2,048 tokens at once (`max_forward_tokens`), which theirs cannot be told.
With `--accumulation` the user splits the batch for both, and ours is told nothing more.

It prints a table with ratios to TRL's and writes it as CSV and as a plot. The floor is the time of our step's matrix
products and attention alone, done again in each turn with nothing around them (`benchmarks.bare_products`). Peaks are
of resident memory in a whole step that is not the first, above what the process held before it loaded a model; and the
same above both copies' weights, the gradients and the optimizer's state, which no method does without.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.bare_products import BareProducts
from benchmarks.ledger import OURS
from benchmarks.memory import resident
from benchmarks.trainers import TRAINERS, Case, Measured, Taken
from sdft.data import encode_prompt, load_rows
from sdft.memory.peaks import Peaks
from sdft.models.load import load_model
from sdft.rollouts.generate import generate, seeded

ROWS = Path(__file__).parent.parent / "examples" / "tool_calls_train.jsonl"
GIBIBYTE = 2**30
#: Losses on the same completions that differ by more are not of the same step.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Step:
    """One row of the table; seconds are medians over rounds, `seconds` those outside generation, and `floor` those of
    our step's matrix products and attention alone."""

    tokens: int
    method: str
    seconds: float
    floor: float
    generation: float
    loss: float
    peak_gib: float
    working_gib: float
    seconds_to_trl: float
    seconds_to_floor: float
    generation_to_trl: float
    working_to_trl: float


def prepare(model_name: str, prompts: int, tokens: list[int], folder: Path, accumulation: int = 1) -> list[Case]:
    """A case for each length: the first rows of the demo's data, and the starts of one sampled completion of each."""
    model, tokenizer = load_model(model_name)
    rows = [{"prompt": row["prompt"], "demonstration": row["demonstration"]} for row in load_rows(ROWS)[:prompts]]
    with seeded(torch.device("cpu"), 0):
        completions = generate(
            model,
            [encode_prompt(row["prompt"], tokenizer) for row in rows],
            max_new_tokens=max(tokens),
            eos_ids=frozenset(),
            temperature=1.0,
        )
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    starts = {count: [completion[:count] for completion in completions] for count in tokens}
    return [Case(str(folder), rows, starts[count], accumulation) for count in tokens]


@dataclass(frozen=True)
class Compared:
    """What each trainer's measured steps took, and the seconds of our step's bare products, one for each round."""

    taken: dict[str, list[Taken]]
    floor: list[float]


def compare(case: Case, rounds: int, done: Callable[[], object] = lambda: None) -> Compared:
    """Both trainers in turns, `rounds` times after one unmeasured turn, in this process."""
    trainers: dict[str, Any] = {name: load()(case) for name, load in TRAINERS.items()}
    products = trainers[OURS].products = BareProducts()
    compared = Compared({name: [] for name in trainers}, [])
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            gc.collect()
            step = trainer.step()
            if turn:
                compared.taken[name].append(step)
            done()
        if turn:
            compared.floor.append(products.seconds())
        trainers[OURS].products = None  # noted in the unmeasured turn
    mine, theirs = (compared.taken[name][0].loss for name in (OURS, "TRL"))
    if not abs(mine - theirs) <= AGREEMENT:
        raise RuntimeError(f"the losses on the same completions are {mine} (ours) and {theirs} (TRL's)")
    return compared


def peak(path: str, method: str) -> tuple[int, int]:
    """Bytes at a step's peak above what this process held before it loaded a model, and above what outlives steps."""
    case, make = Case.load(path), TRAINERS[method]()
    start = resident("VmRSS")
    trainer: Measured = make(case)
    trainer.step()  # makes the optimizer's state, and everything that is made once
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    with mock.patch.object(Peaks, "note"):  # which resets the same mark at each phase
        trainer.step()
    above = resident("VmHWM") - start
    return above, above - trainer.held_bytes()


def peak_apart(case: Case, method: str, threads: int) -> tuple[int, int]:
    """The same in a fresh process."""
    path = Path(case.folder) / "case.json"
    case.save(path)
    code = (
        f"import torch; torch.set_num_threads({threads}); from benchmarks.step import peak; "
        f"print(*peak({str(path)!r}, {method!r}))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} with {case.tokens} tokens failed: {done.stderr[-2000:]}")
    above, working = map(int, done.stdout.split()[-2:])
    return above, working


def to_rows(case: Case, compared: Compared, peaks: dict[str, tuple[int, int]]) -> list[Step]:
    taken, floor = compared.taken, statistics.median(compared.floor)
    seconds = {name: statistics.median(step.seconds for step in steps) for name, steps in taken.items()}
    generation = {name: statistics.median(step.generation for step in steps) for name, steps in taken.items()}
    return [
        Step(
            tokens=case.tokens,
            method=name,
            seconds=seconds[name],
            floor=floor,
            generation=generation[name],
            loss=steps[0].loss,
            peak_gib=peaks[name][0] / GIBIBYTE,
            working_gib=peaks[name][1] / GIBIBYTE,
            seconds_to_trl=seconds[name] / seconds["TRL"],
            seconds_to_floor=seconds[name] / floor,
            generation_to_trl=generation[name] / generation["TRL"],
            working_to_trl=peaks[name][1] / peaks["TRL"][1],
        )
        for name, steps in taken.items()
    ]


def table(rows: list[Step]) -> str:
    lines = [
        "s: seconds outside generation; floor: our step's matrix products and attention alone; gen s: of generation; "
        "peak: above start; work: above weights and states",
        f"{'tokens':6} {'method':12} {'s':>7} {'× TRL':>6} {'floor s':>7} {'× floor':>7} {'gen s':>7} {'× TRL':>6} "
        f"{'peak GiB':>8} {'work GiB':>8} {'× TRL':>6} {'loss':>9}",
    ]
    lines += [
        f"{row.tokens:6} {row.method:12} {row.seconds:7.2f} {row.seconds_to_trl:6.3f} {row.floor:7.2f} "
        f"{row.seconds_to_floor:7.3f} {row.generation:7.2f} {row.generation_to_trl:6.3f} {row.peak_gib:8.2f} "
        f"{row.working_gib:8.2f} {row.working_to_trl:6.3f} {row.loss:9.5f}"
        for row in rows
    ]
    return "\n".join(lines)


def draw(rows: list[Step], path: Path) -> None:
    """A panel each for time outside generation, time of generation and memory; a group of bars for each length."""
    values: list[tuple[str, Callable[[Step], float]]] = [
        ("seconds outside generation", lambda row: row.seconds),
        ("seconds of generation", lambda row: row.generation),
        ("GiB above weights, gradients, optimizer", lambda row: row.working_gib),
    ]
    names = {row.tokens: f"{row.tokens} tokens" for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    with plots.panels(path, 1, len(values), (4.2 * len(values), 4.0)) as axes:
        for axis, (title, value) in zip(axes[0], values, strict=True):
            heights = {m: {names[row.tokens]: value(row) for row in rows if row.method == m} for m in methods}
            plots.bars(axis, list(names.values()), heights)
            axis.set_title(title)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measured turns of each trainer (default 3)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 512], help="tokens of each completion")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of the step (default 8)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of the step for both (default 1)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "step")
    given = parser.parse_args(argv)
    if given.prompts % given.accumulation:
        parser.error(f"--prompts is {given.prompts}, which --accumulation {given.accumulation} does not divide")
    torch.set_num_threads(given.threads)
    rows: list[Step] = []
    total = len(given.tokens) * len(TRAINERS) * (given.rounds + 2)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="step") as progress:
        cases = prepare(given.model, given.prompts, given.tokens, Path(folder), given.accumulation)
        peaks: dict[tuple[int, str], tuple[int, int]] = {}
        for case, method in itertools.product(cases, TRAINERS):
            peaks[case.tokens, method] = peak_apart(case, method, given.threads)
            progress.update()
        for case in cases:
            compared = compare(case, given.rounds, progress.update)
            rows += to_rows(case, compared, {method: peaks[case.tokens, method] for method in TRAINERS})
            progress.write(table(rows[-len(TRAINERS) :]), file=sys.stderr)
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)
    draw(rows, given.plot)


if __name__ == "__main__":
    main()
