"""Tokens a second of the rollout back-ends: transformers' `generate` and continuous batching, TRL's rollouts, and vLLM.

`python -m benchmarks.rollout_speed` has SmolLM2 answer 1, 8 or 64 prompts of 10 to 200 tokens at once, at temperature
1. Ours have seeds of their own and give log-probabilities. "as TRL" is what the SDFT trainer of TRL 1.16 calls:
`generate` for the padded batch, without either. vLLM has a row where it is installed; each of its rounds begins with a
push of the model's weights, as a training step does. Back-ends take turns after a short call that does not count, and
a row has the median of `--rounds`.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from benchmarks import machine, rows
from sdft.models.load import load_model
from sdft.rollouts.generate import BACKENDS, write
from sdft.rollouts.interface import Backend, Request, Sampling
from sdft.rollouts.vllm import VllmRollouts

#: Writes so many tokens for each request, and gives the number of all.
Write = Callable[[PreTrainedModel, Sequence[Request], int], int]

#: How many at once, and the tokens of each.
CASES = ("1x64", "1x512", "8x64", "8x512", "64x64")

PROMPT_TOKENS = (10, 200)


@dataclass(frozen=True)
class RolloutSpeed:
    """One row of the table."""

    dtype: str
    backend: str
    rollouts: int
    tokens: int
    seconds: float
    tokens_per_second: float


def by(make: Callable[[], AbstractContextManager[str | Backend]]) -> Write:
    """One of ours, made ready for each call."""

    def written(model: PreTrainedModel, requests: Sequence[Request], tokens: int) -> int:
        with make() as backend:
            found = write(model, requests, Sampling(tokens, temperature=1.0, logprobs=True), backend=backend)
        return sum(len(completion.tokens) for completion in found)

    return written


def own(name: str) -> Write:
    """One that draws from the model itself."""
    return by(lambda: nullcontext(name))


def as_trl(model: PreTrainedModel, requests: Sequence[Request], tokens: int) -> int:
    """`SDFTTrainer._generate_transformers` of TRL 1.16: one `generate` for prompts padded on the left."""
    width = max(len(request.prompt) for request in requests)
    padded = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, request in enumerate(requests):
        padded[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    config = GenerationConfig(max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, pad_token_id=0)
    config.eos_token_id = [2**31 - 1]  # a token that no completion ends with
    generator: Any = model
    written = generator.generate(input_ids=padded, attention_mask=mask, generation_config=config)
    return int(written[:, width:].numel())


def compare(
    model: PreTrainedModel, backends: dict[str, Write], requests: Sequence[Request], tokens: int, rounds: int
) -> list[RolloutSpeed]:
    """Each back-end's time for the same requests, none of which ends before it has so many tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    total = len(requests) * tokens
    for number in range(rounds + 1):
        for name, written in backends.items():
            if number == 0:
                written(model, requests, min(tokens, 4))
                continue
            began = time.perf_counter()
            assert written(model, requests, tokens) == total
            seconds[name].append(time.perf_counter() - began)
    dtype = str(model.dtype).removeprefix("torch.")
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [RolloutSpeed(dtype, name, len(requests), tokens, took, total / took) for name, took in median.items()]


def backends_of(model: PreTrainedModel, longest: int) -> dict[str, Write]:
    """Every back-end that is here; prompt and rollout have at most `longest` tokens together."""
    found = {name: own(name) for name in BACKENDS}
    found["as TRL"] = as_trl
    if importlib.util.find_spec("vllm") is not None:
        engine = VllmRollouts(model, longest=longest, dtype=model.dtype, memory_share=0.1, probe=range(5, 21))
        found["vllm"] = by(lambda: engine.serving(model))
    return found


def mixed(rollouts: int, vocabulary: int) -> list[Request]:
    """Requests with prompts of unlike lengths."""
    drawn = random.Random(rollouts)
    lengths = [drawn.randint(*PROMPT_TOKENS) for _ in range(rollouts)]
    return [Request([drawn.randrange(vocabulary) for _ in range(n)], seed) for seed, n in enumerate(lengths)]


def table(found: Sequence[RolloutSpeed]) -> str:
    """Tokens a second: a line for each type, batch and length, a column for each back-end."""
    names = list(dict.fromkeys(row.backend for row in found))
    lines = [f"| type | rollouts | tokens of each | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for case in dict.fromkeys((row.dtype, row.rollouts, row.tokens) for row in found):
        speeds = {row.backend: row.tokens_per_second for row in found if (row.dtype, row.rollouts, row.tokens) == case}
        cells = [*map(str, case), *(f"{speeds[name]:.0f}" if name in speeds else "" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def case_of(text: str) -> tuple[int, int]:
    rollouts, _, tokens = text.partition("x")
    if not (rollouts.isdigit() and tokens.isdigit() and int(rollouts) and int(tokens)):
        raise argparse.ArgumentTypeError(f"a case is {text!r}; it may be such as 8x512, 8 rollouts of 512 tokens")
    return int(rollouts), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_speed", description=__doc__)
    parser.add_argument("--cases", type=case_of, nargs="+", default=[case_of(text) for text in CASES])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=1, help="timed calls of each back-end and case (default 1)")
    rows.add_arguments(parser)
    given = parser.parse_args()
    found: list[RolloutSpeed] = []
    longest = PROMPT_TOKENS[1] + max(tokens for _, tokens in given.cases)
    for dtype in given.dtypes:
        model, tokenizer = load_model("smollm2-135m-instruct", dtype)
        backends = backends_of(model, longest)
        for rollouts, tokens in tqdm(given.cases, desc=dtype, unit="case"):
            of_case = compare(model, backends, mixed(rollouts, len(tokenizer)), tokens, given.rounds)
            found += of_case
            for row in of_case:
                tqdm.write(f"{row}")  # a long run that is cut short has said something
    print(machine.heading(), "", table(found), sep="\n")
    rows.write(found, given)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
