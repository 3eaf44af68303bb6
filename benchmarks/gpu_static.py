"""What the Triton kernels compile to, without a GPU: `python -m benchmarks.gpu_static`.

Compiles every kernel of the loss for each target, specialised as launches would specialise it, and prints
registers, spills, stack, shared memory and the widths of loads and stores. Fails where a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

from benchmarks.compiled import TARGETS, compile_launch, record_launches, resources
from sdft_kernels import triton_divergence, triton_scoring
from sdft_kernels.chunk_loop import make_workspace
from sdft_kernels.divergences import DIVERGENCES, LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores


@dataclass(frozen=True)
class Variant:
    """One way of calling the row operations; kernels are specialised for every field."""

    divergence: str
    student_capped: bool = False
    teacher_capped: bool = False
    labels: bool = False
    importance: bool = False
    gradient: str | None = "float32"
    tokens: int = 2048  # few tokens: rows split over several programs
    vocab: int = 50257  # odd, so that alignment has to come from the workspace


def variants(quick: bool) -> Iterator[Variant | ScoringVariant]:
    """Every combination that changes a kernel, or two a divergence that between them take every branch."""
    yield from (ScoringVariant(capped, labels) for capped in (False, True) for labels in (False, True))
    if quick:
        for divergence in DIVERGENCES:
            yield Variant(divergence)
            yield Variant(divergence, True, True, True, True, "bfloat16", tokens=64)
        return
    for divergence in DIVERGENCES:
        for capped in ((False, False), (True, False), (False, True), (True, True)):
            for gradient in ("float32", "bfloat16", "float16"):
                yield Variant(divergence, *capped, gradient=gradient)
            for tokens in (64, 128, 256, 512, 2048):
                for labels, importance in ((False, False), (True, False), (True, True)):
                    yield Variant(divergence, *capped, labels, importance, None, tokens)


def call(variant: Variant) -> None:
    """The call whose launches are compiled. Nothing is computed, so the buffers hold nothing."""
    like = torch.empty(0)

    student, teacher = (make_workspace(like, variant.tokens, variant.vocab, torch.float32) for _ in range(2))
    gradient = None
    if variant.gradient is not None:
        dtype = getattr(torch, variant.gradient)
        separate = make_workspace(like, variant.tokens, variant.vocab, dtype)
        gradient = student if dtype == torch.float32 else separate
    given, written = torch.empty(variant.tokens), torch.empty(variant.tokens)
    rows = TokenRows(
        weight=given,
        labels=torch.empty(variant.tokens, dtype=torch.int64) if variant.labels else None,
        old_logprobs=given if variant.importance else None,
        loss=written,
        student_entropy=written,
        teacher_entropy=written,
        student_logprob=written if variant.labels else None,
        teacher_logprob=written if variant.labels else None,
    )
    objective = Objective(
        variant.divergence,
        student=LogitOptions(softcap=30.0 if variant.student_capped else None),
        teacher=LogitOptions(softcap=30.0 if variant.teacher_capped else None),
        importance_clip=2.0 if variant.importance else None,
    )
    triton_divergence.process_rows(student, teacher, rows, objective, gradient)


@dataclass(frozen=True)
class ScoringVariant:
    """One way of scoring a single model's tokens."""

    capped: bool
    labels: bool
    tokens: int = 2048
    vocab: int = 50257
    divergence: str = "(scoring)"


def score(variant: ScoringVariant) -> None:
    """As `call`, for the kernel of `linear_token_stats`."""
    written = torch.empty(variant.tokens)
    scores = TokenScores(
        labels=torch.empty(variant.tokens, dtype=torch.int64) if variant.labels else None,
        logprob=written if variant.labels else None,
        top1=torch.empty(variant.tokens, dtype=torch.bool) if variant.labels else None,
        entropy=written,
        logsumexp=written,
    )
    logits = make_workspace(written, variant.tokens, variant.vocab, torch.float32)
    triton_scoring.score_rows(logits, scores, LogitOptions(softcap=30.0 if variant.capped else None))


def compile_variant(variant: Variant | ScoringVariant, target: str) -> list[dict[str, Any]]:
    """A row of the report for each kernel that this call would launch on this target."""
    rows = []
    launches = record_launches(lambda: score(variant) if isinstance(variant, ScoringVariant) else call(variant))
    for launch in launches:
        found = resources(compile_launch(launch, TARGETS[target]), TARGETS[target])
        rows.append({"kernel": launch.name, "target": target, **asdict(variant), **asdict(found)})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two variants a divergence instead of all")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
    given = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    work = [(variant, target) for variant in variants(given.quick) for target in given.targets]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in tqdm(pool.map(compile_variant, *zip(*work, strict=True)), total=len(work), unit="call"):
            rows += found
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    print_table(rows)
    spilling = [row for row in rows if row["spills"] or row["stack"]]
    for row in spilling:
        print(f"spills: {row}", file=sys.stderr)
    return 1 if spilling else 0


def print_table(rows: list[dict[str, Any]]) -> None:
    """The heaviest specialisation of each kernel on each target."""
    heaviest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["kernel"], row["target"], row["divergence"])
        if key not in heaviest or row["registers"] > heaviest[key]["registers"]:
            heaviest[key] = row
    print(f"compiled with triton {triton.__version__}; nothing here was run on a GPU")
    heading = f"{'kernel':18} {'target':7} {'divergence':16} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>6}"
    print(f"{heading}  loads and stores by width")
    for row in heaviest.values():
        widths = ", ".join(f"{count} {name}" for name, count in row["widths"].items())
        print(
            f"{row['kernel']:18} {row['target']:7} {row['divergence']:16} {row['registers']:>9} {row['spills']:>6} "
            f"{row['stack']:>5} {row['shared']:>6}  {widths}"
        )


if __name__ == "__main__":
    sys.exit(main())
