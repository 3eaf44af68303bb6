"""Memory and time of one long rollout: teacher's scoring, student's forward pass, loss and backward pass.

`python -m benchmarks.long_rollouts` takes SmolLM2 in float32 with a LoRA adapter on a CPU, and one completion. Each
case has a process of its own, and its time is the median of `--rounds` of them, which alternate with other cases'.
Memory is the most that was resident above the loaded model; it is the kernel's own high-water mark, reset after a short
warm-up. It prints a table and writes it as CSV and as a plot.

The model was trained on 8,192 positions. Its rotations go on beyond them, so a longer completion costs what it would
cost with positions of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine, plots
from benchmarks import rows as files
from benchmarks.memory import MEBIBYTE, resident

PROMPT = 64

#: What checkpointing keeps of a token: the input of each of SmolLM2's 30 layers, 576 numbers in float32.
KEPT_BYTES = 30 * 576 * 4

#: A length that is computed, by the line through the two longest that were measured.
FURTHER = 32_768

#: What is compared: whether the loss is ours, layers are checkpointed, and the tokens of a tile (0: no tiles).
WAYS: dict[str, tuple[bool, bool, int]] = {
    "full logits, checkpointed": (False, True, 0),
    "as it is": (True, False, 0),
    "checkpointed": (True, True, 0),
    "checkpointed, tiles of 1,024": (True, True, 1024),
}


@dataclass(frozen=True)
class LongRollout:
    """One row of the table."""

    tokens: int
    way: str
    mebibytes: float
    seconds: float
    rounds: int = 1
    cpu_seconds: float = 0.0


def measure(way: str, tokens: int) -> tuple[float, float, float]:
    """Peak mebibytes above the loaded model, seconds, and seconds of all threads together, in this process.

    The last say more where others use the machine too.
    """
    from peft import LoraConfig, get_peft_model

    from sdft.batch import Sample, lay_out
    from sdft.loss import divergence, teacher_view
    from sdft.memory.host import give_back_at_once
    from sdft.memory.tiles import tile
    from sdft.models.load import load_model
    from sdft.teacher import AdapterOffTeacher

    ours, checkpointed, tile_tokens = WAYS[way]
    torch.manual_seed(0)
    model, _ = load_model("smollm2-135m-instruct")
    model.requires_grad_(False)
    learner = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tile(model, tile_tokens or None)
    give_back_at_once()
    teacher = AdapterOffTeacher(learner)

    def step(count: int) -> None:
        ids = torch.randint(0, 49_152, (2 * PROMPT + count,)).tolist()
        prompt, teacher_prompt, completion = ids[:PROMPT], ids[: 2 * PROMPT], ids[2 * PROMPT :]
        batch = lay_out([Sample(prompt, completion, teacher_prompt)], 0)
        with teacher.scoring() as scorer:
            seen: Any = teacher_view(scorer, batch) if ours else full_logits(scorer, batch, "teacher_")
        if ours:
            loss = divergence(model, seen, batch, divergence="reverse_kl").loss
        else:
            log_q = seen.log_softmax(-1)
            log_p = full_logits(model, batch, "").log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()

    def full_logits(scorer: Any, batch: dict[str, Any], side: str) -> Any:
        with torch.set_grad_enabled(not side):
            logits = scorer(input_ids=batch[f"{side}input_ids"], use_cache=False).logits
            return logits.flatten(0, 1).index_select(0, batch[f"{side}positions"])

    step(16)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    started, cpu_started = time.perf_counter(), time.process_time()
    step(tokens)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return (resident("VmHWM") - before) / MEBIBYTE, seconds, cpu_seconds


def measure_apart(way: str, tokens: int, threads: int) -> LongRollout:
    """The same in a fresh process, with the environment that `sdft train` gives itself."""
    code = (
        "import json, torch; from benchmarks.long_rollouts import measure; "
        f"torch.set_num_threads({threads}); print(json.dumps(measure({way!r}, {tokens})))"
    )
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} with {tokens} tokens failed: {done.stderr[-2000:]}")
    mebibytes, seconds, cpu_seconds = json.loads(done.stdout.splitlines()[-1])
    return LongRollout(tokens, way, mebibytes, seconds, cpu_seconds=cpu_seconds)


def together(rounds: list[LongRollout]) -> LongRollout:
    """Several rounds of a case as one: the largest memory, the median time."""
    mebibytes = max(row.mebibytes for row in rounds)
    seconds = statistics.median(row.seconds for row in rounds)
    cpu = statistics.median(row.cpu_seconds for row in rounds)
    of_case = rounds[0].tokens, rounds[0].way
    return LongRollout(*of_case, round(mebibytes, 1), round(seconds, 2), len(rounds), round(cpu, 2))


def along_the_line(rows: list[LongRollout], way: str, tokens: int = FURTHER) -> float | None:
    """The mebibytes of `tokens` by the line through a way's two longest rows; None where it has but one, or has so
    many tokens.

    Short rows would bend it: what is smaller than 4 MiB the C library keeps for itself (sdft.memory.host).
    """
    of_way = sorted((row.tokens, row.mebibytes) for row in rows if row.way == way)
    if len(of_way) < 2 or of_way[-1][0] >= tokens:
        return None
    (shorter, less), (longer, more) = of_way[-2:]
    return more + (more - less) / (longer - shorter) * (tokens - longer)


def table(rows: list[LongRollout]) -> str:
    lines = [f"{'tokens':>6} {'way':29} {'MiB above the model':>19} {'seconds':>8} {'of CPUs':>8}"]
    lines += [
        f"{row.tokens:6} {row.way:29} {row.mebibytes:19.0f} {row.seconds:8.1f} {row.cpu_seconds:8.1f}" for row in rows
    ]
    for way in dict.fromkeys(row.way for row in rows):
        if (mebibytes := along_the_line(rows, way)) is not None:
            lines.append(f"{FURTHER:6} {way:29} {mebibytes:19.0f} computed, by the line through the two longest")
    return "\n".join(lines)


def draw(rows: list[LongRollout], path: Path) -> None:
    with plots.panels(path, 1, 1, (9.5, 4)) as axes:
        axis = axes[0][0]
        for way in dict.fromkeys(row.way for row in rows):
            of_way = sorted((row.tokens, row.mebibytes / 1024) for row in rows if row.way == way)
            axis.plot(*zip(*of_way, strict=True), marker="o", label=way)
        ends = [0, max(row.tokens for row in rows)]
        kept = [KEPT_BYTES * tokens / 2**30 for tokens in ends]
        axis.plot(ends, kept, color="grey", linestyle="--", label="inputs of the layers alone (computed)")
        axis.set_xlabel("tokens of the completion")
        axis.set_ylabel("GiB above the model")
        axis.set_ylim(bottom=0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_rollouts", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="completion lengths")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=1, help="processes for each case (default 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    files.add_arguments(parser, "long_rollouts")
    given = parser.parse_args(argv)
    cases = [(way, tokens) for tokens in given.tokens for way in given.ways]
    rounds: dict[tuple[str, int], list[LongRollout]] = {case: [] for case in cases}
    for tokens in given.tokens:  # a length's ways in turn, so that what else the machine does meets all of them
        for way in tqdm(given.ways * given.rounds, desc=f"{tokens} tokens", unit="process"):
            row = measure_apart(way, tokens, given.threads)
            rounds[way, tokens].append(row)
            tqdm.write(f"{row}")  # a long run that is cut short has said something
    rows = [together(of_case) for of_case in rounds.values()]
    print(machine.heading(), table(rows), sep="\n")
    files.write(rows, given)
    draw(rows, given.plot)


if __name__ == "__main__":
    main()
