"""Prove the kernels on a GPU and measure what was predicted: `python -m benchmarks.gpu_report --out DIR`.

Runs the tests of tests/gpu, then every measurement, each stage in a process and a time of its own, and writes
report.json (every row; whole at any moment), report.md (tables) and plots to DIR. Needs no network, and the packages
that benchmarks/gpu_wheels.txt lists beside torch, triton, transformers, peft and pytest. Exits with 0 where every stage
ended and every test passed, 1 where not, and 2 where there is no GPU.

    python -m benchmarks.gpu_report --out runs/gpu                        # eleven minutes on one GPU
    python -m benchmarks.gpu_report --out runs/toy --device cpu --toy     # all of its code, on a CPU, in minutes
    python -m benchmarks.gpu_report --out runs/loss --only card loss --minutes 4
    python -m benchmarks.gpu_report --out runs/gpu --from runs/gpu        # report.md and plots again, from report.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from benchmarks.gpu_report.plan import STAGES, budget

NAMES = [stage.name for stage in STAGES]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--minutes", type=float, default=11, help="shared out among the stages (default 11)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu goes with --toy (default cuda)")
    parser.add_argument("--toy", action="store_true", help="sizes of no interest: whether the code runs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="stages to run (default: all)")
    parser.add_argument("--from", dest="recorded", type=Path, metavar="DIR", help="a report to make tables of again")
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in the process of one stage
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.stage is None and given.out is None:
        parser.error("--out is not given; it must be a folder for the report")
    if not 0 < given.minutes < 24 * 60:
        parser.error(f"--minutes is {given.minutes:g}; it must be above 0")
    if given.device == "cpu" and not given.toy:
        parser.error("--device is cpu; there the stages run with --toy alone")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.recorded is not None:
        return again(given.recorded, given.out)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_report needs a CUDA GPU, and torch sees none here; `--device cpu --toy` shows that its code runs",
            file=sys.stderr,
        )
        return 2
    if given.stage is not None:
        from benchmarks.gpu_report.process import run_here
        from benchmarks.gpu_report.stage import Settings

        run_here(given.stage, Settings(given.device, given.toy, time.monotonic() + given.seconds))
        return 0
    command = shlex.join(["python", "-m", "benchmarks.gpu_report", *(sys.argv[1:] if argv is None else argv)])
    return run(given, command)


def run(given: argparse.Namespace, command: str) -> int:
    """Every stage in turn; the report is on disk after each row."""
    from tqdm import tqdm

    from benchmarks import machine
    from benchmarks.gpu_report import report
    from benchmarks.gpu_report.process import Outcome, run_apart

    until = time.monotonic() + 60 * given.minutes
    stages = [stage for stage in STAGES if stage.name in given.only]
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "log.txt"
    log.write_text("")
    heading = {**machine.describe(), "command": command, "toy": "yes" if given.toy else "no"}
    if given.device == "cpu":
        heading["device"] = "CPU"
    outcomes: dict[str, Outcome] = {}
    saved = 0.0
    with tqdm(total=len(stages), unit="stage", bar_format="{desc:40} {n}/{total} stages, {elapsed}") as progress:
        for number, stage in enumerate(stages):
            outcome = outcomes[stage.name] = Outcome(
                "running", None, 0.0, budget(stages, number, until - time.monotonic())
            )

            def seen(row: dict[str, object], stage: str = stage.name, outcome: Outcome = outcome) -> None:
                nonlocal saved
                outcome.rows.append(row)
                if time.monotonic() - saved > 1:
                    progress.set_description_str(f"{stage}: {len(outcome.rows)} rows")
                    report.write(given.out, heading, outcomes, complete=False)
                    saved = time.monotonic()

            progress.set_description_str(stage.name)
            outcomes[stage.name] = run_apart(
                stage, device=given.device, toy=given.toy, seconds=outcome.budget, log=log, seen=seen
            )
            report.write(given.out, heading, outcomes, complete=False)
            ended = outcomes[stage.name]
            took = f"{ended.seconds:.0f} of {ended.budget:.0f} s"
            progress.write(f"{stage.name:12} {ended.status:8} {len(ended.rows):4} rows, {took}", file=sys.stderr)
            progress.update()
    report.write(given.out, heading, outcomes, complete=True)
    broken = report.problems(outcomes)
    print((given.out / "report.md").read_text())
    for sentence in broken:
        print(f"not as it should be: {sentence}", file=sys.stderr)
    return 1 if broken else 0


def again(recorded: Path, out: Path) -> int:
    """report.md and the plots of a report.json that is there."""
    from benchmarks.gpu_report import report

    path = recorded / "report.json"
    if not path.is_file():
        print(f"--from is {recorded}, where there is no report.json", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(report.from_recorded(out, json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
