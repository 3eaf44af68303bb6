"""What the stages that measure share: their models and numbers of tokens, and a case that may be skipped or break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu import release, this_gpu
from benchmarks.gpu_report.stage import Row, Settings, skipped
from benchmarks.roofline import GPUS, MODELS, Gpu, Model
from sdft_kernels.tokens import TokenRows

#: By how much they matter to the report.
ORDER = ("Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-4B", "Qwen2.5-0.5B", "Gemma-2-9B")
TOYS = (Model("toy", 48, 1003), Model("capped toy", 32, 500, softcap=30.0))


def models(settings: Settings) -> tuple[Model, ...]:
    """The most important one first."""
    return TOYS if settings.toy else tuple(MODELS[name] for name in ORDER)


def predicted_gpu(settings: Settings) -> Gpu | None:
    """The one that predictions are for: this one, where the roofline knows it. A toy predicts for an H100, so that the
    code runs."""
    if settings.device == "cuda":
        return this_gpu()
    return next(gpu for gpu in GPUS if gpu.name == "H100")


def token_rows(like: Tensor, tokens: int) -> TokenRows:
    """Of a loss without labels: each token weighs the same, and the rest is to be written."""
    loss, student_entropy, teacher_entropy = (like.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    return TokenRows(
        weight=like.new_full((tokens,), 1 / tokens, dtype=torch.float32),
        labels=None,
        old_logprobs=None,
        loss=loss,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        student_logprob=None,
        teacher_logprob=None,
    )


class DoesNotFit(Exception):
    """A method that would need more memory than is free, by what is known of it before its call."""


def guarded(
    settings: Settings, case: str, seconds: float, measure: Callable[[], Iterator[Row]], *, ours: bool = False
) -> Iterator[Row]:
    """The rows of a case that takes about `seconds`: skipped where there is less time, an error where it breaks.

    `ours`: what the case calls is ours, whose memory must not run out.
    """
    if settings.left() < (0 if settings.toy else seconds):
        yield skipped(case, "no time left")
        return
    reason = None
    try:
        yield from measure()
    except Exception as error:  # told in the report; the others go on
        reason = why_not(error, ours=ours)
    release(settings.device, thorough=reason is not None)
    if reason is not None:
        yield {"case": case, **reason}


def why_not(error: Exception, *, ours: bool) -> Row:
    """Why there is no number: an error, or skipped where a device's memory is too small for what is not ours.

    Ours makes no more than its ledger says, so that memory which runs out is an error of ours, unless the ledger said
    that it would.
    """
    too_large = isinstance(error, DoesNotFit) or (not ours and isinstance(error, (torch.OutOfMemoryError, MemoryError)))
    return {"skipped" if too_large else "error": described(error)}


def described(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def notes(rows: Iterable[Row]) -> str:
    """What was skipped and what broke, a line each, below a table of the rest."""
    lines = [
        f"- {row['case']}{', ' + row['method'] if 'method' in row else ''}: {row.get('error') or row['skipped']}"
        for row in rows
        if "error" in row or "skipped" in row
    ]
    return "\n".join(["", "", "Not measured:", "", *lines]) if lines else ""
