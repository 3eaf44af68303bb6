"""The numbers of `benchmarks.speed` and `benchmarks.memory` as pytest-benchmark tests.

`pytest benchmarks --benchmark-only` times every method on every shape; `-k "SmolLM2 and trainable"` picks. The peak of
memory stands in each test's extra_info. Nothing here is a bar: a run beside others on the machine proves nothing.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from benchmarks.memory import measure_apart
from benchmarks.methods import METHODS, SHAPES, Floor, Method, Shape, make_inputs, offers
from benchmarks.speed import FLOOR
from sdft_kernels.divergences import DIVERGENCES

pytest.importorskip("liger_kernel")
pytest.importorskip("trl")

CASES = [
    pytest.param(shape, head, method, "reverse_kl", id=f"{shape.name}-{head}-{method}-reverse_kl")
    for shape in SHAPES
    for head in ("trainable", "frozen")
    for method in (FLOOR, *METHODS)
] + [
    pytest.param(SHAPES[0], "trainable", method, divergence, id=f"{SHAPES[0].name}-trainable-{method}-{divergence}")
    for divergence in DIVERGENCES
    if divergence != "reverse_kl"
    for method in METHODS
    if offers(method, divergence)
]


@pytest.mark.parametrize(("shape", "head", "method", "divergence"), CASES)
def test_loss_and_gradients(benchmark: Any, shape: Shape, head: str, method: str, divergence: str) -> None:
    trainable_head = head == "trainable"
    inputs = make_inputs(shape, trainable_head=trainable_head)
    run: Method = Floor(inputs) if method == FLOOR else METHODS[method]
    benchmark.group = f"{shape.name}, {head} head, {divergence}"

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs.clear()
        gc.collect()
        return (inputs, divergence), {}

    benchmark.pedantic(run, setup=fresh, rounds=5, warmup_rounds=1)
    if method != FLOOR and divergence == "reverse_kl":
        benchmark.extra_info["peak_mebibytes"] = measure_apart(
            shape, method, trainable_head=trainable_head, threads=torch.get_num_threads()
        )
