"""The loss by its parts, each on the workspace and the chunk that the loss itself takes, beside the roofline's times.

Each launch of the row operations is noted where the loss makes it, and then made alone. Where a part is off its
prediction by more than a little, a sentence says by what: a product by the rate it reaches here, beside the same
product with a bfloat16 result and a large square one; everything else by the bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import plots
from benchmarks.gpu import Call, median_milliseconds
from benchmarks.gpu_report.cases import guarded, models, notes, predicted_gpu, token_rows
from benchmarks.gpu_report.stage import Row, Settings, markdown
from benchmarks.ledger import MIXTURE, OURS, count
from benchmarks.methods import make_inputs
from benchmarks.recorder import Op
from benchmarks.roofline import LAUNCH_SECONDS, PRODUCT_EFFICIENCY, Gpu, Model, memory_seconds, product_seconds
from sdft_kernels.backends import products
from sdft_kernels.chunking import Held, blocks, plan_chunks
from sdft_kernels.divergences import LogitOptions, Objective

TOKENS, TOY_TOKENS = 8192, 6
#: Bytes of the workspace for a logit: float32 ones of both models and a bfloat16 gradient.
HELD = Held(2, 8)
LARGE, TOY_LARGE = 8192, 64
#: Share by which a time may be off its prediction without a word.
CLOSE = 0.15


@dataclass(frozen=True)
class Part:
    """One launch of a chunk, and the same product with a bfloat16 result, where it is one."""

    name: str
    call: Call
    alternative: Call | None = None


def run(settings: Settings) -> Iterator[Row]:
    best: list[float] = []
    yield from guarded(settings, "large product", 1, partial(large_product, settings, best))
    for model in models(settings):
        measured = partial(measure, settings, model, best)
        yield from guarded(settings, f"parts, {model.name}", 5, measured, ours=True)
    first = models(settings)[0]
    measured = partial(measure, settings, first, best, "jsd")
    yield from guarded(settings, f"parts, {first.name}, jsd", 3, measured, ours=True)
    for model in models(settings):
        if model.softcap is not None:
            measured = partial(measure, settings, model, best, softcap=model.softcap)
            yield from guarded(settings, f"parts, {model.name}, softcap", 3, measured, ours=True)


def large_product(settings: Settings, best: list[float]) -> Iterator[Row]:
    """A square one in bfloat16; its rate in TFLOP/s goes into `best`."""
    size = TOY_LARGE if settings.toy else LARGE
    left, right = (torch.randn(size, size, device=settings.device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    ms = median_milliseconds(lambda: torch.mm(left, right, out=out), settings.device)
    best.append(2 * size**3 / ms / 1e9)
    yield {"case": "large product", "part": f"{size}³", "ms": ms, "tflops": best[-1]}


def measure(
    settings: Settings, model: Model, best: list[float], divergence: str = "reverse_kl", softcap: float | None = None
) -> Iterator[Row]:
    """Each part of one chunk; of another divergence or with a soft cap, which change no product, the row operations."""
    options = LogitOptions(softcap=softcap)
    objective = Objective(divergence, student=options, teacher=options)
    chunk = chunk_of(model, TOY_TOKENS if settings.toy else TOKENS, divergence)
    parts = parts_of(model, chunk.tokens, chunk.block, objective, settings.device, alone=chunk.alone)
    as_usual = divergence == "reverse_kl" and softcap is None
    case = f"parts, {model.name}" + ("" if divergence == "reverse_kl" else f", {divergence}")
    case += "" if softcap is None else ", softcap"
    for part, op in zip(parts, chunk.ops, strict=True):
        if op.flops and not as_usual:
            continue
        ms = median_milliseconds(part.call, settings.device)
        other = None if part.alternative is None else median_milliseconds(part.alternative, settings.device)
        row = row_of(part, op, ms, other, predicted_gpu(settings), best)
        of_chunk = part.name in ("hidden gradient", "weight gradient")
        tokens = chunk.tokens if of_chunk else chunk.block
        yield {"case": case, "model": model.name, "tokens": tokens, "divergence": divergence, **row}


@dataclass(frozen=True)
class Chunk:
    """One of the chunks that the loss makes of its tokens on a GPU: the second, which adds to the head's gradient as
    all but the first do, or the only one; and the first of its blocks."""

    tokens: int
    block: int
    alone: bool
    ops: tuple[Op, ...]  # the ledger's launches of that block, and of the two products of the chunk


def chunk_of(model: Model, tokens: int, divergence: str) -> Chunk:
    added_up = 4 * model.hidden
    plan = plan_chunks(tokens, model.vocab, HELD, torch.device("cuda"), trainable_head=True, added_up=added_up)
    chunks = [part.stop - part.start for part in plan.slices(tokens)]
    number = min(1, len(chunks) - 1)
    ledger = count(MIXTURE if divergence == "jsd" else OURS, model.at(tokens), trainable_head=True)
    ops = [op for op in ledger.ops if op.flops or op.name.startswith(("statistics.", "divergence."))]
    launches = 6 if divergence == "jsd" else 5  # of a block: two products, and the kernels
    of_each = [launches * len(list(blocks(chunk))) + 2 for chunk in chunks]
    if sum(of_each) != len(ops):
        raise ValueError(f"the ledger has {len(ops)} launches for chunks of {of_each}")
    first = sum(of_each[:number])
    ops = ops[first : first + of_each[number]]
    block = next(blocks(chunks[number]))
    return Chunk(chunks[number], block.stop, len(chunks) == 1, (*ops[:launches], *ops[-2:]))


def parts_of(model: Model, tokens: int, block: int, objective: Objective, device: str, *, alone: bool) -> list[Part]:
    """In the order that a chunk makes them in, one block of it; `alone` where there is no other chunk to add to."""
    from benchmarks.compiled import record_launches
    from sdft_kernels.backends.gpu import backend as triton_backend
    from sdft_kernels.backends.gpu.divergence import process_rows

    inputs = make_inputs(model.at(tokens), trainable_head=False, dtype=torch.bfloat16, device=device)
    hidden, weight, teacher_hidden = inputs.student_hidden.detach(), inputs.student_weight, inputs.teacher_hidden
    dtypes = products.Dtypes.of(hidden.dtype, weight.dtype, hidden.device)
    held = triton_backend.loss_workspace(hidden, tokens, model.vocab, dtypes, objective, with_gradient=True)
    assert isinstance(held, triton_backend.LogitBuffers) and held.teacher is not None
    rows = token_rows(hidden, tokens)
    held.gradient.normal_()  # of the tokens that are in no block here: zeros would let a card clock higher
    student, teacher, gradient = held.student[:block], held.teacher[:block], held.gradient[:block]
    products.logits(hidden[:block], weight, student)
    products.logits(teacher_hidden[:block], weight, teacher)
    launches = record_launches(lambda: process_rows(student, teacher, rows[:block], objective, gradient))
    launched = [
        Part(
            launch.name.removesuffix("_kernel"),
            partial(launch.kernel[launch.grid], *launch.arguments, **launch.options),
        )
        for launch in launches
    ]
    for part in launched:  # each reads what those before it wrote
        part.call()
    grad_hidden = torch.empty_like(hidden)
    grad_weight = hidden.new_zeros(weight.shape, dtype=dtypes.head_gradient if alone else torch.float32)
    narrow_logits = torch.empty_like(gradient, dtype=hidden.dtype)
    narrow = torch.empty_like(weight)

    def on_a_gpu(call: Call) -> Call | None:
        return call if held.gradient.dtype == hidden.dtype else None

    return [
        Part(
            "student logits",
            lambda: products.logits(hidden[:block], weight, student),
            on_a_gpu(lambda: torch.mm(hidden[:block], weight.T, out=narrow_logits)),
        ),
        Part("teacher logits", lambda: products.logits(teacher_hidden[:block], weight, teacher)),
        *launched,
        Part("hidden gradient", lambda: products.hidden_gradient(held.gradient, weight, grad_hidden)),
        Part(
            "weight gradient",
            lambda: products.add_weight_gradient(held.gradient, hidden, grad_weight, first=alone),
            on_a_gpu(lambda: torch.mm(held.gradient.T, hidden, out=narrow)),
        ),
    ]


def row_of(part: Part, op: Op, ms: float, other_ms: float | None, gpu: Gpu | None, best: list[float]) -> Row:
    row: Row = {
        "part": part.name,
        "ms": ms,
        "tflops": op.flops / ms / 1e9 if op.flops else None,
        "gb_per_s": op.nbytes / ms / 1e6,
        "bfloat16_out_tflops": None if other_ms is None else op.flops / other_ms / 1e9,
    }
    if gpu is not None:
        predicted = max(product_seconds(op, gpu), memory_seconds(op, gpu), LAUNCH_SECONDS) * 1e3
        row |= {"predicted_ms": predicted, "measured_over_predicted": ms / predicted}
        row["diagnosis"] = diagnosis(row, op, gpu, best)
    return row


def diagnosis(row: Row, op: Op, gpu: Gpu, best: list[float]) -> str:
    """Why a part is off its prediction, from the numbers."""
    off = row["measured_over_predicted"]
    if abs(off - 1) <= CLOSE:
        return "as predicted"
    faster = "faster: " if off < 1 else ""
    if max(product_seconds(op, gpu), memory_seconds(op, gpu)) < LAUNCH_SECONDS:
        return f"{faster}a launch of {row['ms'] * 1e3:.0f} µs, where {LAUNCH_SECONDS * 1e6:.0f} were assumed"
    bandwidth = f"{row['gb_per_s'] / 1e3:.2f} of {gpu.bandwidth / 1e12:.2f} TB/s"
    if memory_seconds(op, gpu) > product_seconds(op, gpu):
        kind = "the product waits for memory" if op.flops else "reads and writes"
        return f"{faster}{kind}, at {bandwidth}"
    assumed = PRODUCT_EFFICIENCY * gpu.flops / 1e12
    words = f"{faster}the product reaches {row['tflops']:.0f} TFLOP/s where {assumed:.0f} were assumed"
    if row["bfloat16_out_tflops"] is not None:
        words += f"; with a bfloat16 result {row['bfloat16_out_tflops']:.0f} at this shape"
    if best:
        words += f"; a large square one {best[0]:.0f}"
    return f"{words}; memory at {bandwidth}"


def table(rows: list[Row]) -> str:
    columns = [
        ("case", "case", ""),
        ("tokens", "tokens", ""),
        ("part", "part", ""),
        ("ms", "ms", ".4f"),
        ("TFLOP/s", "tflops", ".0f"),
        ("bfloat16 out", "bfloat16_out_tflops", ".0f"),
        ("GB/s", "gb_per_s", ".0f"),
        ("ms predicted", "predicted_ms", ".4f"),
        ("measured/predicted", "measured_over_predicted", ".2f"),
        ("diagnosis", "diagnosis", ""),
    ]
    head = (
        "Each launch of one chunk of the loss, made alone. tokens: that it works on; ms: median of a call; TFLOP/s: a "
        "product's operations over that; bfloat16 out: TFLOP/s of the same product with a bfloat16 result; GB/s: bytes "
        "that the ledger counts, over the time; ms predicted: by the roofline, for this card; diagnosis: why a part is "
        f"more than {CLOSE:.0%} off its prediction.\n\n"
    )
    return head + markdown((row for row in rows if "ms" in row), columns) + notes(rows)


def draw(rows: list[Row], path: Path) -> None:
    """Measured and predicted milliseconds by part, a panel for each case."""
    drawn = [row for row in rows if "predicted_ms" in row]
    cases = list(dict.fromkeys(row["case"] for row in drawn))
    if not cases:
        return
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    with plots.panels(path, lines, columns, (6 * columns, 3.6 * lines)) as axes:
        for case, axis in zip(cases, axes.flat, strict=False):
            here = [row for row in drawn if row["case"] == case]
            groups = [row["part"].replace(" ", "\n") for row in here]
            plots.bars(
                axis,
                groups,
                {
                    "sdft-kernels": dict(zip(groups, (row["ms"] for row in here), strict=True)),
                    "predicted": dict(zip(groups, (row["predicted_ms"] for row in here), strict=True)),
                },
            )
            axis.set(title=case.removeprefix("parts, "), ylabel="ms")
            axis.tick_params("x", labelsize=8)
        for axis in axes.flat[len(cases) :]:
            axis.set_axis_off()
