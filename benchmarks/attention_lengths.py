"""What attention costs on a GPU at a length that is new to the process, and at the same length again.

    python -m benchmarks.attention_lengths
    python -m benchmarks.attention_lengths --device cpu     # whether its code runs, at sizes of no interest

With and without cuDNN, which torch prefers on newer GPUs: a rollout has a new length with each token, and a training
step often has one that no step had before. Masks as padding needs them, bfloat16, Qwen2.5-1.5B's heads. It takes half a
minute, and prints a table. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import machine
from benchmarks.gpu import wall_seconds
from sdft.attention import of_any_length

HEADS, HEAD_SIZE = 12, 128
TIMES = 5


@dataclass(frozen=True)
class Case:
    """Passes of `rows` rows whose lengths are those given: of one token, or of all with their gradient."""

    name: str
    rows: int
    lengths: tuple[int, ...]
    of_a_token: bool = False
    masked: bool = True


CASES = (
    Case("a token of a rollout, 8 rows", 8, tuple(range(300, 340)), of_a_token=True),
    Case("a step, 8 x 300 tokens", 8, tuple(range(300, 320))),
    Case("a step, 8 x 1,000 tokens", 8, tuple(range(1000, 1010))),
    Case("a step, 2 x 4,000 tokens", 2, (4000, 4001, 4002)),
    Case("a step, 1 x 16,000 tokens", 1, (16_000, 16_001, 16_002)),
    Case("a step, 1 x 16,000 tokens, no mask", 1, (16_000, 16_001, 16_002), masked=False),
)


def toy(case: Case) -> Case:
    """The same at three lengths of no interest."""
    return replace(case, name=f"{case.name}: 20 instead", lengths=(20, 21, 22))


def inputs(case: Case, length: int, device: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Queries, keys and values, and the mask: the first row begins with a tenth of padding."""

    def values(tokens: int) -> Tensor:
        shape = (case.rows, HEADS, tokens, HEAD_SIZE)
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=not case.of_a_token)

    queries = 1 if case.of_a_token else length
    tensors = values(queries), values(length), values(length)
    if not case.masked:
        return tensors, {"is_causal": True}
    places = torch.arange(length, device=device)
    mask = (places[None] <= places[:, None])[-queries:].expand(case.rows, 1, queries, length).clone()
    mask[0, ..., : length // 10] = False
    mask[0, :, : max(0, queries - length + length // 10 + 1), 0] = True  # a row of no keys has no softmax
    return tensors, {"attn_mask": mask}


def measure(case: Case, device: str) -> tuple[float, float]:
    """Milliseconds of a pass at a new length, and at the same once more: medians over all lengths but the first."""
    first, again = [], []
    for length in case.lengths:
        tensors, settings = inputs(case, length, device)

        def call(tensors: tuple[Tensor, Tensor, Tensor] = tensors, settings: dict[str, Any] = settings) -> None:
            out = scaled_dot_product_attention(*tensors, **settings)
            if not case.of_a_token:
                out.backward(out.detach())

        wall_seconds(lambda: None, device)  # the inputs are made
        first.append(wall_seconds(call, device))
        again.append(statistics.median(wall_seconds(call, device) for _ in range(TIMES)))
    return 1e3 * statistics.median(first[1:]), 1e3 * statistics.median(again[1:])


def lines(cases: Sequence[Case], device: str) -> Iterator[str]:
    yield "| | with cuDNN: new length, ms | again, ms | without: new length, ms | again, ms |"
    yield "|---|---|---|---|---|"
    for case in cases:
        with of_any_length(torch.device(device)):
            without = measure(case, device)
        numbers = " | ".join(f"{number:,.3f}" for number in (*measure(case, device), *without))
        yield f"| {case.name} | {numbers} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_lengths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default cuda)")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("attention_lengths: it needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    print(machine.heading())
    for line in lines(CASES if given.device == "cuda" else [toy(case) for case in CASES], given.device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
