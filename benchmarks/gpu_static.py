"""What the loss costs on GPUs that are not here, beside TRL and Liger: `python -m benchmarks.gpu_static`.

Three parts. `kernels` compiles every Triton kernel of ours, and the peers' counterparts, for each target as a launch
would, and reads the machine code: minutes. `ledger` follows whole calls of each package, on tensors without values,
and adds up matrix products, memory traffic, launches, waits and workspace: seconds. `roofline` turns the ledgers into
times for A100, H100, H200 and B200. Nothing is run on a GPU; `python -m benchmarks.gpu_report` measures where there is
one. Exits with 1 where a bar is missed: spills, narrow accesses, traffic, launches, waits, or the time beside TRL.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from benchmarks import kernels, ledger, machine, roofline
from benchmarks.compiled import TARGETS

PARTS = ("kernels", "ledger", "roofline")


def compile_kernels(*, quick: bool, targets: list[str]) -> list[dict[str, Any]]:
    work = [(variant, target) for variant in kernels.variants(quick) for target in targets]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in tqdm(pool.map(kernels.compile_variant, *zip(*work, strict=True)), total=len(work), unit="call"):
            rows += found
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to do (default: all)")
    parser.add_argument("--quick", action="store_true", help="compile two variants a divergence instead of all")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="to compile for")
    parser.add_argument("--models", nargs="+", choices=list(roofline.MODELS), default=list(roofline.MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(roofline.TOKENS), help="(default: 1k to 128k)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row of every part there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the roofline's predictions there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the predictions there (PNG or SVG)")
    given = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0" and "kernels" in given.only:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if (given.csv or given.plot) and "roofline" not in given.only:
        parser.error("--csv and --plot are of the roofline's predictions: add roofline to --only")

    report: dict[str, Any] = {"basis": roofline.LABEL, **machine.describe()}
    broken: list[str] = []
    print(machine.heading(), f"triton {triton.__version__}; {roofline.LABEL}", sep="\n")
    if "kernels" in given.only:
        report["kernels"] = compile_kernels(quick=given.quick, targets=given.targets)
        broken += kernels.broken_bars(report["kernels"])
        print("\nKERNELS", kernels.table(report["kernels"]), sep="\n")
    if "ledger" in given.only:
        entries = [
            ledger.entry(method, roofline.MODELS[model].at(ledger.TOKENS), trainable_head=trainable_head)
            for model in tqdm(given.models, unit="model")
            for trainable_head in (True, False)
            for method in ledger.COUNTED[trainable_head]
        ]
        report["ledger"] = [asdict(entry) for entry in entries]
        broken += ledger.broken_bars(entries)
        print("\nLEDGER", ledger.table(entries), sep="\n")
    if "roofline" in given.only:
        cases = [(model, tokens) for model in given.models for tokens in given.tokens]
        predictions = [
            prediction
            for model, tokens in tqdm(cases, unit="shape")
            for trainable_head in (True, False)
            for prediction in roofline.predict(roofline.MODELS[model], tokens, trainable_head=trainable_head)
        ]
        report["roofline"] = [asdict(prediction) for prediction in predictions]
        broken += roofline.broken_bars(predictions)
        print("\nROOFLINE", roofline.table(predictions), sep="\n")
        if given.csv:
            write_csv(report["roofline"], given.csv)
        if given.plot:
            roofline.draw(predictions, given.plot)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))
    for sentence in broken:
        print(f"bar missed: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], "basis"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "basis": roofline.LABEL} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
