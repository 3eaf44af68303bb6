"""How long a ledger should take on a GPU: every launch waits for its operations or for its bytes, whichever is more.

A prediction, not a measurement: matrix products reach one share of the peak, everything else the memory's full
bandwidth, and launches overlap with what was launched before them. The same for every package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.ledger import Ledger
from benchmarks.methods import Shape
from benchmarks.recorder import Op

LABEL = "predicted from compiled code and the ledger, not measured"


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 operations and bytes of device memory a second, and multiprocessors."""

    name: str
    flops: float
    bandwidth: float


GPUS = (
    Gpu("A100", 312e12, 2.039e12),  # A100 80GB SXM, NVIDIA A100 datasheet
    Gpu("H100", 989e12, 3.35e12),  # H100 SXM, NVIDIA H100 datasheet, without sparsity
    Gpu("H200", 989e12, 4.8e12),  # H200 SXM, NVIDIA H200 datasheet, without sparsity
    Gpu("B200", 2250e12, 8.0e12),  # one GPU of an HGX B200, NVIDIA Blackwell datasheet, without sparsity
)

#: Share of the peak that large bfloat16 products reach: about 700 of an H100's 989 TFLOP/s.
PRODUCT_EFFICIENCY = 0.7

#: Seconds of the host's time that one launch from Python takes.
LAUNCH_SECONDS = 3e-6


@dataclass(frozen=True)
class Model:
    """A language model's head; the tokens of a shape are filled in."""

    shape: Shape
    softcap: float | None = None


#: From the models' own config.json: hidden_size, vocab_size, final_logit_softcapping.
MODELS = (
    Model(Shape("Qwen2.5-0.5B", 0, 896, 151_936)),
    Model(Shape("Qwen2.5-7B", 0, 3584, 152_064)),
    Model(Shape("Qwen3-4B", 0, 2560, 151_936)),
    Model(Shape("Llama-3.1-8B", 0, 4096, 128_256)),
    Model(Shape("Gemma-2-9B", 0, 3584, 256_000), softcap=30.0),
)

TOKENS = tuple(1024 << power for power in range(8))  # 1k to 128k


def product_seconds(op: Op, gpu: Gpu) -> float:
    """What a matrix product's operations alone take; 0 for everything else."""
    return op.flops / (PRODUCT_EFFICIENCY * gpu.flops)


def memory_seconds(op: Op, gpu: Gpu) -> float:
    """What its bytes alone take."""
    return op.nbytes / gpu.bandwidth


def seconds(ledger: Ledger, gpu: Gpu) -> float:
    """The whole loss with its gradients."""
    busy = sum(max(product_seconds(op, gpu), memory_seconds(op, gpu)) for op in ledger.ops)
    return max(busy, ledger.launches * LAUNCH_SECONDS)


def share_waiting_for_memory(ledger: Ledger, gpu: Gpu) -> float:
    """Of the time in matrix products, the part that they spend waiting for memory."""
    products = [op for op in ledger.ops if op.flops]
    operations = sum(product_seconds(op, gpu) for op in products)
    whole = sum(max(product_seconds(op, gpu), memory_seconds(op, gpu)) for op in products)
    return 1 - operations / whole


def at(model: Model, tokens: int) -> Shape:
    return replace(model.shape, tokens=tokens)
