"""How long a ledger should take on a GPU: every launch waits for its operations or for its bytes, whichever is more.

A prediction, not a measurement: matrix products reach one share of the peak, everything else the memory's full
bandwidth, and launches overlap with what was launched before them. The same for every package. How many instructions
and resident warps the compiled kernels have is not in the times: gpu_static prints them beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import plots
from benchmarks.ledger import COMPARED, OURS, Ledger, count
from benchmarks.methods import Shape
from benchmarks.recorder import Op

LABEL = "predicted from compiled code and the ledger, not measured"


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 operations, and bytes of device memory, a second."""

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
    """A language model's head. The caps change no entry of the ledger, and Liger leaves them out."""

    name: str
    hidden: int
    vocab: int
    softcap: float | None = None

    def at(self, tokens: int) -> Shape:
        return Shape(self.name, tokens, self.hidden, self.vocab)


#: From the models' own config.json: hidden_size, vocab_size, final_logit_softcapping.
MODELS = {
    model.name: model
    for model in (
        Model("Qwen2.5-0.5B", 896, 151_936),
        Model("Qwen2.5-7B", 3584, 152_064),
        Model("Qwen3-4B", 2560, 151_936),
        Model("Llama-3.1-8B", 4096, 128_256),
        Model("Gemma-2-9B", 3584, 256_000, softcap=30.0),
    )
}

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


@dataclass(frozen=True)
class Prediction:
    """One method on one GPU."""

    gpu: str
    model: str
    head: str
    tokens: int
    method: str
    seconds: float
    microseconds_per_token: float
    waiting_for_memory: float  # share of the time in matrix products


#: Most that our predicted time may be of TRL's.
BARS = {"trainable": 0.72, "frozen": 0.65}


def predict(model: Model, tokens: int, *, trainable_head: bool) -> list[Prediction]:
    """Every method on every GPU."""
    head = "trainable" if trainable_head else "frozen"
    ledgers = [count(method, model.at(tokens), trainable_head=trainable_head) for method in COMPARED]
    return [
        Prediction(gpu.name, model.name, head, tokens, ledger.method, time, time / tokens * 1e6, waiting)
        for gpu in GPUS
        for ledger in ledgers
        for time, waiting in [(seconds(ledger, gpu), share_waiting_for_memory(ledger, gpu))]
    ]


def ratios(predictions: list[Prediction]) -> dict[tuple[str, str, int, str, str], float]:
    """Ours over each peer's, by model, head, tokens, GPU and peer."""
    ours = {(p.model, p.head, p.tokens, p.gpu): p.seconds for p in predictions if p.method == OURS}
    return {
        (p.model, p.head, p.tokens, p.gpu, p.method): ours[p.model, p.head, p.tokens, p.gpu] / p.seconds
        for p in predictions
        if p.method != OURS
    }


def broken_bars(predictions: list[Prediction]) -> list[str]:
    return [
        f"{ratio:.3f} × the time of TRL predicted on {gpu} for {tokens} tokens of {model} with a {head} head"
        for (model, head, tokens, gpu, peer), ratio in ratios(predictions).items()
        if peer == "TRL" and ratio > BARS[head]
    ]


def table(predictions: list[Prediction]) -> str:
    peers = [method for method in COMPARED if method != OURS]
    found = ratios(predictions)
    ours = {(p.model, p.head, p.tokens, p.gpu): p.microseconds_per_token for p in predictions if p.method == OURS}
    lines = [
        f"{LABEL}. Products at {PRODUCT_EFFICIENCY:.0%} of the peak, for all; {LAUNCH_SECONDS * 1e6:g} µs a launch.",
        "On each GPU: our µs a token, then our time over that of " + ", ".join(peers) + ".",
        f"{'model':14} {'head':9} {'tokens':>6}" + "".join(f" | {gpu.name:>7}{'':15}" for gpu in GPUS),
    ]
    for model, head, tokens in dict.fromkeys(key[:3] for key in ours):
        cells = [
            f" | {ours[model, head, tokens, gpu.name]:7.3f}"
            + "".join(f" {found[model, head, tokens, gpu.name, peer]:4.2f}" for peer in peers)
            for gpu in GPUS
        ]
        lines.append(f"{model:14} {head:9} {tokens:6}" + "".join(cells))
    return "\n".join(lines)


def draw(predictions: list[Prediction], path: Path) -> None:
    """Time a token by model, at the number of tokens nearest to 16k: a row for each head, a column for each GPU."""
    tokens = min({p.tokens for p in predictions}, key=lambda number: abs(number - 16_384))
    models = list(dict.fromkeys(p.model for p in predictions))
    with plots.panels(path, len(BARS), len(GPUS), (15, 7), sharey="col") as axes:
        for line, head in enumerate(BARS):
            for axis, gpu in zip(axes[line], GPUS, strict=True):
                here = [p for p in predictions if (p.gpu, p.head, p.tokens) == (gpu.name, head, tokens)]
                plots.bars(
                    axis,
                    models,
                    {m: {p.model: p.microseconds_per_token for p in here if p.method == m} for m in COMPARED},
                )
                axis.set_title(f"{gpu.name}, {head} head")
                axis.tick_params("x", rotation=30)
            axes[line][0].set_ylabel("µs a token, predicted")
        axes[0][0].figure.suptitle(f"Loss and gradients, {tokens} tokens: {LABEL}")
