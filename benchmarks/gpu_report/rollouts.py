"""Rollouts: tokens a second of each back-end, from a model of 1.5B with random weights, as training asks for them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import torch

from benchmarks.gpu_report.models import character_tokenizer, random_model
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from sdft.rollout import BACKENDS, Sampling, sample

PROMPT_TOKENS, NEW_TOKENS = 64, 128


def run(settings: Settings) -> Iterator[Row]:
    cuda = settings.device == "cuda"
    new_tokens = 8 if settings.toy else NEW_TOKENS
    model = random_model("toy" if settings.toy else "Qwen2.5-1.5B", settings.device)
    if settings.toy:
        model = model.float()  # sampling in bfloat16 is not what a CPU is for
    tokenizer = character_tokenizer()

    def take(backend: str, prompts: int, tokens: int, seeded: bool) -> float:
        """Seconds for as many rollouts."""
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        completions = sample(
            model,
            [[5 + (row + place) % 90 for place in range(PROMPT_TOKENS)] for row in range(prompts)],
            Sampling(max_new_tokens=tokens, temperature=1.0),
            tokenizer=tokenizer,
            seeds=list(range(prompts)) if seeded else None,
            backend=backend,
        )
        if any(len(completion) != tokens for completion in completions):
            raise RuntimeError(f"completions of {sorted(set(map(len, completions)))} tokens, and {tokens} were to come")
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    warm: set[str] = set()
    for seeded in (True, False):
        for backend in BACKENDS:
            for prompts in (4, 8) if settings.toy else (8, 64):
                case = f"{backend}, {prompts} prompts, {'seeded' if seeded else 'unseeded'}"
                if settings.left() < (0 if settings.toy else 5):
                    yield skipped(case, "no time left")
                    continue
                try:
                    if backend not in warm:
                        take(backend, prompts, 4, seeded)
                        warm.add(backend)
                    if cuda:
                        torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated() if cuda else 0
                    seconds = take(backend, prompts, new_tokens, seeded)
                    row: Row = {"case": case, "backend": backend, "prompts": prompts, "seeded": seeded}
                    row |= {
                        "tokens": new_tokens,
                        "seconds": seconds,
                        "tokens_per_second": prompts * new_tokens / seconds,
                    }
                    row["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
                except Exception as error:
                    row = {"case": case}
                    row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
                yield row
                gc.collect()


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
        "training.",
        "",
        markdown([row for row in rows if "seconds" in row], columns),
    ]
    lines += [f"\n{row['case']}: {row.get('error') or row.get('skipped')}" for row in rows if "seconds" not in row]
    return "\n".join(lines)
