"""Scoring tokens without gradients: the kernels that hold no logits, beside logits in chunks and plain torch.

`linear_token_stats` is one product, a divergence without gradient two. The logits path is what those would be without
their own kernel: the device's product into a chunk of float32 logits, and one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Call, free_bytes, mebibytes, median_milliseconds, most_memory, release, wall_seconds
from benchmarks.gpu_report.cases import guarded, models, notes, token_rows, why_not
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from benchmarks.methods import Inputs, make_inputs
from benchmarks.roofline import Model
from sdft_kernels import fused_linear_divergence, linear_token_stats
from sdft_kernels.backends import products
from sdft_kernels.backends.interface import HeadOperands
from sdft_kernels.chunking import Held, plan_chunks
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.reference import divergence_per_token
from sdft_kernels.tokens import TokenRows, TokenScores

TOKENS, TOY_TOKENS = 8192, 6
#: Tokens of a chunk in plain torch.
PLAIN_ROWS = 1024
#: Bytes that plain torch holds for a logit, and the share of free memory that it may take.
PLAIN_BYTES, PLAIN_SHARE = {"scores": 20, "reverse_kl": 28}, 0.6

OURS, LOGITS, PLAIN, PLAIN_CHUNKS = "ours", "logits in chunks", "plain torch", "plain torch, chunks"


def run(settings: Settings) -> Iterator[Row]:
    for model in models(settings):
        for what in ("scores", "reverse_kl"):
            case = f"{what}, {model.name}"
            yield from guarded(settings, case, 4, partial(measure, settings, case, model, what))
    first = models(settings)[0]
    case = f"scores by chunk, {first.name}"
    yield from guarded(settings, case, 4, partial(by_chunk, settings, case, first), ours=True)


def measure(settings: Settings, case: str, model: Model, what: str) -> Iterator[Row]:
    """Every way of computing the tokens' scores, or their divergence."""
    tokens = TOY_TOKENS if settings.toy else TOKENS
    inputs = make_inputs(model.at(tokens), trainable_head=False, dtype=torch.bfloat16, device=settings.device)
    inputs.student_hidden.requires_grad_(False)
    of_this = scores if what == "scores" else divergence
    for method, call in of_this(inputs, settings.device).items():
        needed = PLAIN_BYTES[what] * tokens * model.vocab
        if method == PLAIN and needed > PLAIN_SHARE * free_bytes(settings.device):
            yield {**skipped(case, f"would take about {needed / 2**30:.0f} GiB"), "method": method}
            continue
        try:
            yield row_of(settings, case, model, what, method, tokens, call)
        except Exception as error:  # told in the report; the others go on
            yield {"case": case, "method": method, **why_not(error, ours=method == OURS)}
        release(settings.device)


def row_of(settings: Settings, case: str, model: Model, what: str, method: str, tokens: int, call: Call) -> Row:
    from sdft_kernels.backends.gpu import linear as triton_linear

    with torch.no_grad():
        first = wall_seconds(call, settings.device)
        peak = most_memory(call, settings.device)
        ms = median_milliseconds(call, settings.device)
    flops = (1 if what == "scores" else 2) * 2 * tokens * model.hidden * model.vocab
    kernel = triton_linear.score_hidden_kernel if what == "scores" else triton_linear.process_hidden_kernel
    return {
        "case": case,
        "model": model.name,
        "tokens": tokens,
        "method": method,
        "ms": ms,
        "first_call_s": first,
        "tokens_per_s": tokens / ms * 1e3,
        "tflops": flops / ms / 1e9,
        "peak_mib": mebibytes(peak),
        "tile": tile_of(kernel) if method.startswith(OURS) else None,
    }


def tile_of(kernel: Any) -> str | None:
    """What the tuner chose at the kernel's last call; None where it was not called."""
    chosen = getattr(kernel, "best_config", None)
    if chosen is None:
        return None
    sizes = "×".join(str(chosen.kwargs[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return f"{sizes}, {chosen.num_warps} warps, {chosen.num_stages} stages"


def backend(device: str) -> str:
    """On a CPU the interpreter's, so that the kernels are what is run."""
    return "auto" if device == "cuda" else "triton"


def scores(inputs: Inputs, device: str) -> dict[str, Call]:
    """A label's log-probability and the entropy of each token."""
    hidden, weight, labels = inputs.student_hidden, inputs.student_weight, inputs.labels

    def plain(rows: slice) -> tuple[Tensor, Tensor]:
        logprobs = (hidden[rows] @ weight.T).float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(1, labels[rows, None]), entropy

    return {
        OURS: lambda: linear_token_stats(hidden, weight, labels, backend=backend(device)),
        LOGITS: logits_then_scores(inputs),
        PLAIN: lambda: plain(slice(None)),
        PLAIN_CHUNKS: in_chunks(plain, len(hidden)),
    }


def divergence(inputs: Inputs, device: str) -> dict[str, Call]:
    """Reverse KL of each token, for an evaluation."""

    def fused() -> Tensor:
        return fused_linear_divergence(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            backend=backend(device),
        ).token_loss

    def plain(rows: slice) -> Tensor:
        log_p = (inputs.student_hidden[rows] @ inputs.student_weight.T).float().log_softmax(-1)
        log_q = (inputs.teacher_hidden[rows] @ inputs.teacher_weight.T).float().log_softmax(-1)
        return divergence_per_token(log_p, log_q, "reverse_kl")

    return {
        OURS: fused,
        LOGITS: logits_then_rows(inputs),
        PLAIN: lambda: plain(slice(None)),
        PLAIN_CHUNKS: in_chunks(plain, len(inputs.student_hidden)),
    }


def in_chunks(plain: Callable[[slice], object], tokens: int) -> Call:
    return lambda: [plain(slice(start, start + PLAIN_ROWS)) for start in range(0, tokens, PLAIN_ROWS)]


def empty_scores(inputs: Inputs) -> TokenScores:
    of_tokens = [inputs.student_hidden.new_empty(len(inputs.labels), dtype=torch.float32) for _ in range(3)]
    top1 = torch.empty_like(inputs.labels, dtype=torch.bool)
    return TokenScores(inputs.labels, of_tokens[0], top1, *of_tokens[1:])


def logits_then_scores(inputs: Inputs) -> Call:
    from sdft_kernels.backends.gpu.backend import empty_logits
    from sdft_kernels.backends.gpu.scoring import score_rows

    tokens, vocab = len(inputs.labels), len(inputs.student_weight)
    plan = plan_chunks(tokens, vocab, Held(4), torch.device("cuda"))

    def call() -> TokenScores:
        found = empty_scores(inputs)
        logits = empty_logits(inputs.student_hidden, plan.chunk, vocab, torch.float32)
        for rows in plan.slices(tokens):
            part = logits[: rows.stop - rows.start]
            products.logits(inputs.student_hidden[rows], inputs.student_weight, part)
            score_rows(part, None, found[rows], LogitOptions())
        return found

    return call


def logits_then_rows(inputs: Inputs) -> Call:
    from sdft_kernels.backends.gpu.backend import empty_logits
    from sdft_kernels.backends.gpu.divergence import process_rows

    tokens, vocab = len(inputs.labels), len(inputs.student_weight)
    plan = plan_chunks(tokens, vocab, Held(8), torch.device("cuda"))

    def call() -> TokenRows:
        like = inputs.student_hidden
        found = token_rows(like, tokens)
        student, teacher = (empty_logits(like, plan.chunk, vocab, torch.float32) for _ in range(2))
        for rows in plan.slices(tokens):
            size = rows.stop - rows.start
            products.logits(inputs.student_hidden[rows], inputs.student_weight, student[:size])
            products.logits(inputs.teacher_hidden[rows], inputs.teacher_weight, teacher[:size])
            process_rows(student[:size], teacher[:size], found[rows], Objective(), None)
        return found

    return call


def by_chunk(settings: Settings, case: str, model: Model) -> Iterator[Row]:
    """The scoring kernel with more or fewer tokens at once than the loop over chunks gives it."""
    from sdft_kernels.backends.gpu.linear import score_hidden

    tokens = TOY_TOKENS if settings.toy else TOKENS
    inputs = make_inputs(model.at(tokens), trainable_head=False, dtype=torch.bfloat16, device=settings.device)
    hidden, head = inputs.student_hidden.detach(), HeadOperands(inputs.student_weight, None)
    for size in dict.fromkeys(min(tokens, size) for size in (tokens, 2048, 1024, 256)):

        def call(size: int = size) -> None:
            found = empty_scores(inputs)
            for start in range(0, tokens, size):
                rows = slice(start, start + size)
                score_hidden(hidden[rows], head, found[rows], LogitOptions())

        yield row_of(settings, case, model, "scores", f"{OURS}, {size} at once", tokens, call)


def table(rows: list[Row]) -> str:
    columns = [
        ("case", "case", ""),
        ("tokens", "tokens", ""),
        ("method", "method", ""),
        ("ms", "ms", ".3f"),
        ("tokens/s", "tokens_per_s", ".0f"),
        ("TFLOP/s", "tflops", ".0f"),
        ("MiB", "peak_mib", ".0f"),
        ("first call s", "first_call_s", ".2f"),
        ("tile chosen", "tile", ""),
    ]
    head = (
        "bfloat16, without gradients: scores are a label's log-probability and the entropy of each token, reverse_kl "
        "the divergence of each. ms: median of a call; TFLOP/s: operations of one product, or two, with the head, "
        "over that; MiB: the most memory above the inputs; first call s: seconds of the first one, which compiles and "
        "tunes; tile chosen: tokens × vocabulary × hidden size of the kernel's tiles.\n\n"
    )
    return head + markdown((row for row in rows if "ms" in row), columns) + notes(rows)
