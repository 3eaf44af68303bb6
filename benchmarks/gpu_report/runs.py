"""`sdft train` as users start it: what it planned to take of the GPU, what it took, and the seconds of its phases.

The command runs in a process of its own, on a folder with a model of random weights that has been saved there. The
model never ends an answer, so that every rollout has the most tokens that it may have. Long ones are demonstrations,
which are given: writing 16,384 tokens would take minutes.
"""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report.cases import described, notes
from benchmarks.gpu_report.models import character_tokenizer, random_model
from benchmarks.gpu_report.paths import ROOT
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from sdft.planning.devices import RESERVED

GIBIBYTE = 2**30
#: The line in which `sdft train` says what it has planned; the CUDA context's share is in it.
PLANNED = re.compile(r"a step is planned to take ([\d.]+) GiB")
#: Seconds that a run takes at most before one was made.
ASSUMED_SECONDS = 45.0
SAMPLES, STEPS = 8, 2
PHASES = ("rollout", "score", "learn")
SAVINGS = {"activation_checkpointing": True, "activation_offload": True}


@dataclass(frozen=True)
class Case:
    """One run: its name, the most tokens of a completion, and the fields that it gives to the command."""

    name: str
    tokens: int
    given: dict[str, Any]


def cases(settings: Settings) -> list[Case]:
    """What matters most comes first."""
    short, long, longest = (8, 64, 128) if settings.toy else (128, 16_384, 65_536)
    lora = {"lora_rank": 16, "rollout_batch_size": "auto", "per_device_train_batch_size": SAMPLES}
    one = {"method": "sft", "per_device_train_batch_size": 1}
    return [
        Case(
            f"sdft, LoRA, averaged teacher, {SAMPLES} × {short} tokens",
            short,
            {**lora, "teacher": "ema"},
        ),
        Case(f"sft, LoRA, 1 × {long} tokens", long, {**one, "lora_rank": 16, "activation_checkpointing": True}),
        Case(
            f"sdft, LoRA, averaged teacher, {SAMPLES} × {short} tokens, rollouts compiled",
            short,
            {**lora, "teacher": "ema", "rollout_compile": True, "rollout_batch_size": SAMPLES},
        ),
        Case(
            f"sft, all weights, 1 × {long} tokens, layer inputs on the host",
            long,
            {**one, **SAVINGS, "max_forward_tokens": long // 8, "optim": "adamw_torch_fused"},
        ),
        Case(
            f"sft, LoRA, 1 × {longest} tokens, layer inputs on the host",
            longest,
            {**one, **SAVINGS, "lora_rank": 16, "max_forward_tokens": long // 8},
        ),
        Case(
            f"sdft, all weights, averaged teacher on the host, {SAMPLES} × {short} tokens",
            short,
            {"teacher": "ema", "teacher_offload": True, "per_device_train_batch_size": SAMPLES},
        ),
    ]


def rows_of(case: Case) -> list[dict[str, str]]:
    """Prompts of 64 tokens; the demonstration is what `sft` learns, and for `sdft` has as many."""
    letters = string.ascii_letters
    answer = (letters * (case.tokens // len(letters) + 1))[: case.tokens - 1]
    shown = answer if case.given.get("method") == "sft" else answer[:64]
    return [{"prompt": letters[n % 52] * 64, "demonstration": shown} for n in range(2 * SAMPLES)]


def run(settings: Settings) -> Iterator[Row]:
    expected = ASSUMED_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        for number, case in enumerate(cases(settings)):
            if settings.left() <= (0 if settings.toy else expected):
                yield skipped(case.name, "no time left")
                continue
            began = time.monotonic()
            row: Row = {"case": case.name, "tokens": case.tokens}
            try:
                if not model.exists():
                    save(model, settings)
                row |= measure(case, model, Path(folder) / str(number), settings)
            except Exception as error:  # told in the report; the others go on
                row["error"] = described(error)
            yield row
            expected = 1.2 * (time.monotonic() - began)


def save(folder: Path, settings: Settings) -> None:
    """A model, on whose memory the command then has no claim."""
    name = "toy" if settings.toy else "Qwen2.5-1.5B"
    model = random_model(name, settings.device, torch.float32 if settings.toy else torch.bfloat16)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    del model
    if settings.device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, model: Path, folder: Path, settings: Settings) -> Row:
    folder.mkdir()
    train_file, output = folder / "train.jsonl", folder / "run"
    train_file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(case)))
    given = {
        "model": model,
        "train_file": train_file,
        "output_dir": output,
        "max_completion_length": case.tokens,
        "max_steps": STEPS,
        "dtype": "float32" if settings.toy else "bfloat16",
        "save_strategy": "no",
        "use_cpu": settings.device == "cpu",
        **case.given,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sdft", "train", *words],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=max(30.0, settings.left()),
    )
    seconds = time.monotonic() - began
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    summary = json.loads((output / "summary.json").read_text())
    planned = PLANNED.search(done.stdout)
    row: Row = {"seconds": seconds, "training_seconds": summary["training_seconds"]}
    row["planned_gib"] = None if planned is None else float(planned[1]) - RESERVED / GIBIBYTE
    row["peak_gib"] = summary["peak_memory_mib"] / 1024 if settings.device == "cuda" else None
    if row["planned_gib"] is not None:
        row["planned_over_measured"] = row["planned_gib"] / row["peak_gib"]
    row["tokens_per_second"] = summary["tokens_per_second"]
    for phase in PHASES:
        row[f"{phase}_seconds"] = summary[f"{phase}_seconds"]
        peak = summary[f"{phase}_peak_memory_mib"]
        row[f"{phase}_gib"] = None if peak is None or settings.device == "cpu" else peak / 1024
    return row


def table(rows: list[Row]) -> str:
    columns = [
        ("run", "case", ""),
        ("s, the command", "seconds", ".1f"),
        ("s, training", "training_seconds", ".1f"),
        *((f"{phase} s", f"{phase}_seconds", ".2f") for phase in PHASES),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("planned GiB", "planned_gib", ".1f"),
        ("peak GiB", "peak_gib", ".2f"),
        ("planned/measured", "planned_over_measured", ".2f"),
        *((f"{phase} GiB", f"{phase}_gib", ".2f") for phase in PHASES),
    ]
    lines = [
        f"`sdft train`, {STEPS} steps on a model of Qwen2.5-1.5B's size with random weights, in bfloat16. s, the "
        "command: from its start to its end, models loaded and reports written; of the phases, those of all steps. "
        "planned GiB: what the command said before its first step, without the gibibyte for the CUDA context; peak "
        "GiB: the most that torch had allocated.",
        "",
        markdown([row for row in rows if "seconds" in row], columns),
    ]
    return "\n".join(lines) + notes(rows)
