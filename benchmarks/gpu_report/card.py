"""What the card is and what it reaches: its copy's bandwidth, and the rate of the loss's own matrix products.

The roofline takes one rate for all products and the datasheet's bandwidth. Here are those of this card, at the very
shapes: float32 logits, the hidden states' gradient, and the head's, added up in float32.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch

from benchmarks.gpu import median_milliseconds
from benchmarks.gpu_report.cases import guarded, models, notes, predicted_gpu
from benchmarks.gpu_report.stage import Row, Settings, markdown
from benchmarks.roofline import PRODUCT_EFFICIENCY, Model
from sdft_kernels.backends import products

TOKENS, TOY_TOKENS = (8192, 1024), (32, 16)
COPIED_BYTES, TOY_COPIED_BYTES = 4 << 30, 1 << 20
LARGE, TOY_LARGE = 8192, 128


def run(settings: Settings) -> Iterator[Row]:
    yield from guarded(settings, "card", 0, partial(describe, settings))
    yield from guarded(settings, "copy", 1, partial(copy, settings))
    yield from guarded(settings, "large product", 1, partial(large_product, settings))
    for tokens in TOY_TOKENS if settings.toy else TOKENS:
        for model in models(settings):
            case = f"products, {model.name}, {tokens} tokens"
            yield from guarded(settings, case, 2, partial(loss_products, settings, case, model, tokens))


def describe(settings: Settings) -> Iterator[Row]:
    gpu = predicted_gpu(settings)
    row: Row = {
        "case": "card",
        "name": "CPU",
        "driver": driver(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "assumed_tflops": None if gpu is None else PRODUCT_EFFICIENCY * gpu.flops / 1e12,
        "assumed_gb_per_s": None if gpu is None else gpu.bandwidth / 1e9,
    }
    if settings.device == "cuda":
        properties = torch.cuda.get_device_properties()
        row |= {
            "name": properties.name,
            "gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    yield row


def driver() -> str | None:
    """Its version, as nvidia-smi has it; None where that is not there or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def copy(settings: Settings) -> Iterator[Row]:
    """Device to device; bytes read and bytes written both count."""
    nbytes = TOY_COPIED_BYTES if settings.toy else COPIED_BYTES
    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=settings.device)
    target = torch.empty_like(source)
    ms = median_milliseconds(lambda: target.copy_(source), settings.device)
    yield {"case": "copy", "gib": nbytes / 2**30, "ms": ms, "gb_per_s": 2 * nbytes / ms / 1e6}


def large_product(settings: Settings) -> Iterator[Row]:
    """A square one, bfloat16 throughout: about the best that the card does."""
    size = TOY_LARGE if settings.toy else LARGE
    left, right = (torch.randn(size, size, device=settings.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    ms = median_milliseconds(lambda: torch.mm(left, right, out=out), settings.device, seconds=0.4)
    yield product_row("large product", f"{size}³", "bfloat16 square", size, ms, 2 * size**3)


def loss_products(settings: Settings, case: str, model: Model, tokens: int) -> Iterator[Row]:
    """The three kinds of the loss's products, all of the tokens at once."""
    from sdft_kernels.backends.gpu.backend import empty_logits

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=settings.device, dtype=torch.bfloat16)

    hidden, weight = normal(tokens, model.hidden), normal(model.vocab, model.hidden)
    logits = empty_logits(hidden, tokens, model.vocab, torch.float32)
    gradient = empty_logits(hidden, tokens, model.vocab, products.gradient_dtype(hidden.dtype, hidden.device))
    gradient.normal_()  # what a product's operands hold decides the clock of a card at its power limit
    out, total = torch.empty_like(hidden), weight.new_zeros(weight.shape, dtype=torch.float32)
    calls = {
        "logits, float32 out": partial(products.logits, hidden, weight, logits),
        "hidden gradient": partial(products.hidden_gradient, gradient, weight, out),
        "weight gradient, added in float32": partial(
            products.add_weight_gradient, gradient, hidden, total, first=False
        ),
    }
    for product, call in calls.items():
        ms = median_milliseconds(call, settings.device)
        yield product_row(case, model.name, product, tokens, ms, 2 * tokens * model.hidden * model.vocab)


def product_row(case: str, model: str, product: str, tokens: int, ms: float, flops: int) -> Row:
    return {"case": case, "model": model, "product": product, "tokens": tokens, "ms": ms, "tflops": flops / ms / 1e9}


def table(rows: list[Row]) -> str:
    parts = [
        "What the card is; assumed_tflops and assumed_gb_per_s are the rate of products (TFLOP/s) and the memory's "
        "bandwidth (GB/s) by which the report predicts for it."
    ]
    for card in (row for row in rows if "name" in row):
        found = {key: value for key, value in card.items() if key != "case" and value is not None}
        parts.append("\n".join(f"- {k}: {v:.4g}" if isinstance(v, float) else f"- {k}: {v}" for k, v in found.items()))
    parts += [
        f"Copy of {row['gib']:.3g} GiB, device to device: {row['gb_per_s']:.0f} GB/s read and written."
        for row in rows
        if row["case"] == "copy" and "ms" in row
    ]
    columns = [
        ("model", "model", ""),
        ("product", "product", ""),
        ("tokens", "tokens", ""),
        ("ms", "ms", ".3f"),
        ("TFLOP/s", "tflops", ".0f"),
    ]
    parts.append(
        "The loss's three kinds of matrix product, at the model's hidden size and vocabulary and with so many tokens: "
        "ms is the median of a call, TFLOP/s its operations over that."
    )
    parts.append(markdown((row for row in rows if "product" in row), columns))
    return "\n\n".join(parts) + notes(rows)
