"""The Triton kernels of the loss and of its peers, compiled for GPUs that are not here, and what they take there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any
from unittest import mock

from benchmarks.compiled import TARGETS, Launch, compile_launch, record_launches, resources
from benchmarks.kernel_calls import (
    OF_ENTRIES,
    PEERS,
    VOCABULARIES,
    AnyVariant,
    LinearVariant,
    PeerVariant,
    ScalingVariant,
    ScoringVariant,
    TopVariant,
    Variant,
    call,
    compare_top,
    linear_variants,
    multiply,
    scale,
    score,
    top_variants,
)
from benchmarks.ledger import OURS
from sdft_kernels.backends.gpu import linear as triton_linear
from sdft_kernels.backends.gpu.operands import configurations
from sdft_kernels.divergences import CROSS_ENTROPY, DIVERGENCES


def variants(quick: bool) -> Iterator[AnyVariant]:
    """Every combination that changes a kernel, or two a divergence that between them take every branch; the peers'
    kernels as their own code launches them."""
    yield from (
        ScoringVariant(capped, labels, bias, vocab=vocab)
        for capped, labels, bias in product((False, True), repeat=3)
        if bias == labels or not quick
        for vocab in (VOCABULARIES[capped : capped + 1] if quick else VOCABULARIES)
    )
    yield from top_variants(quick)
    yield from (ScalingVariant(dtype) for dtype in ("float32", "bfloat16", "float16"))
    yield from (
        PeerVariant(package, divergence) for package in ("TRL", "Liger") for divergence in ("reverse_kl", "jsd")
    )
    yield PeerVariant("TRL, whole logits", "(scoring)")
    yield from linear_variants(quick)
    if quick:
        for divergence in (*DIVERGENCES, CROSS_ENTROPY):
            yield Variant(divergence)
            hard = divergence != CROSS_ENTROPY
            yield Variant(divergence, True, True, True, True, True, "bfloat16", 61, VOCABULARIES[1], hard)
        return
    for capped, gradient, bias, vocab in product(
        (False, True), ("float32", "bfloat16", "float16"), (False, True), VOCABULARIES
    ):
        of_labels = Variant(CROSS_ENTROPY, capped, bias=bias, gradient=gradient, vocab=vocab)
        yield of_labels
        yield replace(of_labels, tokens=61)
    for divergence, student_capped, teacher_capped, vocab in product(
        DIVERGENCES, (False, True), (False, True), VOCABULARIES
    ):
        of_both = Variant(divergence, student_capped, teacher_capped, vocab=vocab)
        for gradient, bias, hard in product(("float32", "bfloat16", "float16"), (False, True), (False, True)):
            yield replace(of_both, gradient=gradient, bias=bias, labels=bias, hard=hard)
        for tokens in (61, 64, 128, 256, 512, 2048):
            for labels, importance in ((False, False), (True, False), (True, True)):
                yield replace(of_both, labels=labels, importance=importance, gradient=None, tokens=tokens)


def _tuned(variant: LinearVariant, kind: str) -> list[Launch]:
    """What `multiply` launches in every configuration that the tuner would try on a device of this kind."""
    kernel, tiles = triton_linear.process_hidden_kernel, triton_linear.PROCESS_TILES
    if variant.divergence == "(scoring)":
        kernel, tiles = triton_linear.score_hidden_kernel, triton_linear.SCORE_TILES
    noted: list[Launch] = []
    if kind == "hopper" and variant.bias:
        kind = "cuda"
    copies = mock.patch.object(triton_linear, "copies_tiles", return_value=kind == "hopper")
    for config in configurations(tiles, kind):
        with mock.patch.object(kernel, "configs", [config]), copies:
            noted += record_launches(lambda: multiply(variant))
    return noted


def kind_of(target: str) -> str:
    """Which tiles the kernels that multiply have on this target."""
    return "hopper" if target == "sm_90" else TARGETS[target].backend


def launches(variant: AnyVariant, kind: str) -> list[Launch]:
    """What the call launches on a device of this kind, each kernel once in each of its tiles."""

    def calls() -> None:
        if isinstance(variant, PeerVariant):
            PEERS[variant.package](variant)
        elif isinstance(variant, ScoringVariant):
            score(variant)
        elif isinstance(variant, TopVariant):
            compare_top(variant)
        elif isinstance(variant, ScalingVariant):
            scale(variant)
        elif isinstance(variant, Variant):
            call(variant)

    noted = _tuned(variant, kind) if isinstance(variant, LinearVariant) else record_launches(calls)
    return list({(launch.name, _tile(launch)): launch for launch in reversed(noted)}.values())[::-1]


def _tile(launch: Launch) -> tuple[int, ...]:
    """Tokens, vocabulary entries, hidden entries and warps of a kernel that multiplies; else nothing."""
    sizes = [size for name, size in launch.options.items() if name.startswith("BLOCK_") and name != "BLOCK_SIZE"]
    return (*sizes, launch.options["num_warps"]) if len(sizes) == 3 else ()


def compile_variant(variant: AnyVariant, target: str) -> list[dict[str, Any]]:
    """A row of the report for each kernel that this call would launch on this target."""
    if isinstance(variant, Variant | TopVariant) and variant.gradient and TARGETS[target].backend == "hip":
        variant = replace(variant, gradient="float32")  # all there is on ROCm: products.gradient_dtype
    return [
        {
            "package": OURS,
            "kernel": launch.name,
            "target": target,
            "tile": _tile(launch),
            "elements": _elements(launch, target),
            **asdict(variant),
            **asdict(found := resources(compile_launch(launch, TARGETS[target]), TARGETS[target])),
            "narrow": found.inner.narrow,
        }
        for launch in launches(variant, kind_of(target))
    ]


def _elements(launch: Launch, target: str) -> int:
    """Logits that a thread handles in one turn of the loop, each with BLOCK_K products where a kernel multiplies; 1
    where there are no blocks of them."""
    tokens, vocab, *_ = _tile(launch) or (1, launch.options.get("BLOCK", launch.options.get("BLOCK_SIZE", 1)))
    block = tokens * vocab
    return max(1, block // (TARGETS[target].warp_size * launch.options.get("num_warps", 4)))


def broken_bars(rows: list[dict[str, Any]]) -> list[str]:
    """Our kernels neither spill nor use a stack, reach rows 16 bytes at a time, and multiply on the tensor cores."""
    broken = []
    for row in rows:
        if row["package"] != OURS:
            continue
        where = f"{row['kernel']} on {row['target']} ({row['divergence']})"
        if row["spills"] or row["stack"]:
            broken.append(f"{where} spills {row['spills']} and has a stack of {row['stack']} bytes: {row}")
        if row["tile"] and not row["matrix"]:
            broken.append(f"{where} does not multiply on the tensor cores: {row}")
        if row["narrow"] and "combine" not in row["kernel"] and row["kernel"] not in OF_ENTRIES:  # which read no rows
            broken.append(f"{where} reaches rows with {row['narrow']} accesses under 16 bytes: {row}")
    return broken


def table(rows: list[dict[str, Any]]) -> str:
    """The heaviest specialisation of each kernel in each tile on each target, with and without capped logits."""
    heaviest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        capped = row.get("capped", row.get("student_capped", False) or row.get("teacher_capped", False))
        tile = "x".join(map(str, row["tile"]))
        key = (row["package"], row["kernel"], row["target"], row["divergence"], "capped" if capped else "", tile)
        if key not in heaviest or row["registers"] > heaviest[key]["registers"]:
            heaviest[key] = row
    lines = [
        "for each thread; the right half counts one turn of the inner loop (without one, the kernel) per logit of each",
        "tile; where a kernel multiplies, special functions and shuffles are of the loop around, over the vocabulary;",
        "tile: tokens, vocabulary and hidden entries, warps; scalar: a warp's registers that spill, but not to memory",
        f"{'package':17} {'kernel':21} {'target':6} {'divergence':16} {'logits':6} {'tile':13} {'regs':>4} "
        f"{'spills':>6} {'scalar':>6} {'stack':>5} {'shared':>6} {'warps':>5} | {'special':>7} {'shuffles':>8} "
        f"{'instr.':>6}  tensor cores, loads and stores",
    ]
    for (package, kernel, target, divergence, capped, tile), row in heaviest.items():
        inner, elements = row["inner"], row["elements"]
        of_logits = row["around"] if tile else inner
        named = ", ".join(f"{n} {name}" for name, n in (row["matrix"] | inner["accesses"]).items())
        lines.append(
            f"{package:17} {kernel:21} {target:6} {divergence:16} {capped:6} {tile:13} {row['registers']:4} "
            f"{row['spills']:6} {row['scalar_spills']:6} {row['stack']:5} {row['shared']:6} {row['occupancy']:5.0%} | "
            f"{of_logits['special'] / elements:7.2f} {of_logits['shuffles'] / elements:8.2f} "
            f"{inner['instructions'] / elements:6.1f}  {named}"
        )
    return "\n".join(lines)
