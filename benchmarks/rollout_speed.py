"""Tokens a second of the rollout back-ends: transformers' `generate`, its continuous batching, vLLM where installed.

`python -m benchmarks.rollout_speed` has SmolLM2 answer 16 prompts with 64 tokens each, drawn at temperature 1 by seeds
of their own, with their log-probabilities. Back-ends take turns, and a row has the median of `--rounds` after one that
does not count. For vLLM each round begins with a push of the model's weights, as a training step does.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks import machine, rows
from sdft.models.load import load_model
from sdft.rollouts.generate import BACKENDS, write
from sdft.rollouts.interface import Backend, Request, Sampling
from sdft.rollouts.vllm import VllmRollouts

Make = Callable[[], AbstractContextManager[str | Backend]]


@dataclass(frozen=True)
class RolloutSpeed:
    """One row of the table."""

    dtype: str
    backend: str
    rollouts: int
    tokens: int
    seconds: float
    tokens_per_second: float


def compare(
    model: PreTrainedModel, backends: dict[str, Make], requests: Sequence[Request], tokens: int, rounds: int
) -> list[RolloutSpeed]:
    """Each back-end's time for the same requests, none of which ends before it has so many tokens."""
    sampling = Sampling(tokens, temperature=1.0, logprobs=True)
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    for number in range(rounds + 1):
        for name, make in backends.items():
            began = time.perf_counter()
            with make() as backend:
                written = write(model, requests, sampling, backend=backend)
            if number:
                seconds[name].append(time.perf_counter() - began)
            assert all(len(completion.tokens) == tokens for completion in written)
    dtype, total = str(model.dtype).removeprefix("torch."), len(requests) * tokens
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [RolloutSpeed(dtype, name, len(requests), tokens, took, total / took) for name, took in median.items()]


def backends_of(model: PreTrainedModel, requests: Sequence[Request], tokens: int) -> dict[str, Make]:
    """Every back-end that is here, as what makes it ready for a step."""
    found: dict[str, Make] = {name: lambda name=name: nullcontext(name) for name in BACKENDS}  # type: ignore[misc]
    if importlib.util.find_spec("vllm") is not None:
        longest = max(len(request.prompt) for request in requests) + tokens
        engine = VllmRollouts(
            model, longest=longest, dtype=model.dtype, memory_share=0.1, probe=list(requests[0].prompt)[:16]
        )
        found["vllm"] = lambda: engine.serving(model)
    return found


def table(found: Sequence[RolloutSpeed]) -> str:
    lines = ["| type | back-end | seconds | tokens a second |", "|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {row.dtype} | {row.backend} | {row.seconds:.1f} | {row.tokens_per_second:.0f} |" for row in found]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    rows.add_arguments(parser)
    given = parser.parse_args()
    found: list[RolloutSpeed] = []
    for dtype in ("float32", "bfloat16"):
        model, tokenizer = load_model("smollm2-135m-instruct", dtype)
        texts = [f"Name {number} rivers of Europe, and say where they end." for number in range(3, 3 + given.rollouts)]
        requests = [Request(tokenizer.encode(text), seed) for seed, text in enumerate(texts)]
        backends = backends_of(model, requests, given.tokens)
        found += compare(model, backends, requests, given.tokens, given.rounds)
    print(machine.heading(), "", table(found), sep="\n")
    rows.write(found, given)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
