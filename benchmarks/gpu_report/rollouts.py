"""Rollouts: tokens a second of each back-end, from a model of 1.5B with random weights, as training asks for them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import torch
from transformers import Qwen2ForCausalLM

from benchmarks.gpu_report.cases import described
from benchmarks.gpu_report.models import random_model
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from sdft.rollouts.generate import by_compiled_generate, sample
from sdft.rollouts.interface import Backend, Sampling

#: Ways to write rollouts, by their names in the table, and the seconds that the first ones may take. Compiling takes
#: most of a minute.
WAYS: tuple[tuple[str, str | Backend, float], ...] = (
    ("generate", "generate", 5.0),
    ("generate, compiled", by_compiled_generate, 40.0),
    ("continuous", "continuous", 5.0),
)
PROMPT_TOKENS, NEW_TOKENS, TOY_TOKENS = 64, 128, 8


def run(settings: Settings) -> Iterator[Row]:
    """All of `generate` comes first: should continuous batching hang on a device, no row of the other is lost."""
    new_tokens = TOY_TOKENS if settings.toy else NEW_TOKENS
    model = None
    counts = (4, 8) if settings.toy else (8, 64)
    for name, backend, expected in WAYS:
        compiles = backend is by_compiled_generate  # anew for each number of prompts
        for seeded in (True,) if compiles else (True, False):
            for prompts in counts[-1:] if compiles else counts:
                case = f"{name}, {prompts} prompts, {'seeded' if seeded else 'unseeded'}"
                if settings.left() <= (0 if settings.toy else expected):
                    yield skipped(case, "no time left")
                    continue
                row: Row = {"case": case, "backend": name, "prompts": prompts, "seeded": seeded}
                try:
                    if model is None:
                        model = make_model(settings)
                    take(model, backend, prompts, new_tokens, seeded)  # as many: each length is new to the device
                    row |= measure(model, backend, prompts, new_tokens, seeded)
                    expected = 2 + 3 * row["seconds"]  # of two turns
                except Exception as error:  # told in the report; the others go on
                    row["error"] = described(error)
                gc.collect()
                if settings.device == "cuda":
                    torch.cuda.empty_cache()
                yield row


def make_model(settings: Settings) -> Qwen2ForCausalLM:
    if settings.toy:
        return random_model("toy", settings.device, torch.float32)  # a CPU is not for sampling in bfloat16
    return random_model("Qwen2.5-1.5B", settings.device)


def take(model: Qwen2ForCausalLM, backend: str | Backend, prompts: int, tokens: int, seeded: bool) -> float:
    """Seconds for as many rollouts."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    completions = sample(
        model,
        [[5 + (row + place) % 90 for place in range(PROMPT_TOKENS)] for row in range(prompts)],
        Sampling(max_new_tokens=tokens, temperature=1.0),
        seeds=list(range(prompts)) if seeded else None,
        backend=backend,
    )
    wait()
    seconds = time.perf_counter() - started
    if any(len(completion) != tokens for completion in completions):
        raise RuntimeError(f"completions of {sorted(set(map(len, completions)))} tokens, and {tokens} were to come")
    return seconds


def measure(model: Qwen2ForCausalLM, backend: str | Backend, prompts: int, tokens: int, seeded: bool) -> Row:
    """One turn: its seconds, and the most memory that it held above the model."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    seconds = take(model, backend, prompts, tokens, seeded)
    gib = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": prompts * tokens / seconds, "gib": gib}


def table(rows: list[Row]) -> str:
    columns = [
        ("back-end", "case", ""),
        ("new tokens", "tokens", "d"),
        ("s", "seconds", ".2f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("GiB above the model", "gib", ".2f"),
    ]
    lines = [
        f"Prompts of {PROMPT_TOKENS} tokens, temperature 1; seeded: each rollout by its own random numbers, as in "
        "training. new tokens: of each prompt; s: seconds for all; tokens/s: those of all prompts together; GiB: the "
        "most memory above the model's weights.",
        "",
        markdown([row for row in rows if "seconds" in row], columns),
    ]
    lines += [
        f"\n{row['case']}: {row.get('error') or row.get('skipped')}"
        for row in rows
        if "error" in row or "skipped" in row
    ]
    return "\n".join(lines)
