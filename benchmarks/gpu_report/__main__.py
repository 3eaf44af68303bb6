"""Prove the kernels on a GPU and measure what was predicted: `python -m benchmarks.gpu_report --out DIR`.

Runs the tests of tests/gpu, then every measurement, each stage in a process and a time of its own, and writes
report.json (every row; whole at any moment), report.md (tables) and plots to DIR. Needs no network, and what
docs/gpu.md says to install. With --from it measures nothing: it makes report.md and the plots of a report.json that is
there.

Exits with 0 where every stage ended and every test passed, 1 where not, and 2 where it cannot run at all: no GPU, or no
folder to write to. Ctrl-C ends it with 130 and SIGTERM with 143, once what there is has been written.

    python -m benchmarks.gpu_report --out runs/gpu                        # eleven minutes on one GPU
    python -m benchmarks.gpu_report --out runs/toy --device cpu --toy     # all of its code, on a CPU, in minutes
    python -m benchmarks.gpu_report --out runs/loss --only card loss --minutes 4
    python -m benchmarks.gpu_report --out runs/gpu --from runs/gpu        # report.md and plots again, from report.json

`make gpu` runs it too: GPU_OUT and MINUTES are --out and --minutes, and GPU_ARGS all other arguments, as they stand:

    make gpu GPU_OUT=runs/loss MINUTES=4 GPU_ARGS="--only card loss"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu_report import folder, signals
from benchmarks.gpu_report.errors import Refused, Stopped
from benchmarks.gpu_report.plan import RESERVE, STAGES, Stage, budget
from benchmarks.gpu_report.process import Log, Outcome, run_apart
from benchmarks.gpu_report.report import Report, read, tables, write
from benchmarks.gpu_report.streams import lenient

NAMES = [stage.name for stage in STAGES]
LEAST_MINUTES, MOST_MINUTES = RESERVE / 60, 24 * 60
SAVED_EVERY = 1.0  # seconds


def folder_name(text: str) -> Path:
    return Path(text).expanduser()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=folder_name, metavar="DIR", help="where the report goes")
    parser.add_argument("--minutes", type=float, default=11, help="shared out among the stages (default 11)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu goes with --toy (default cuda)")
    parser.add_argument("--toy", action="store_true", help="sizes of no interest: whether the code runs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="stages to run (default: all)")
    parser.add_argument(
        "--from",
        dest="recorded",
        type=folder_name,
        metavar="DIR",
        help="measure nothing: make report.md and the plots again, in --out, of the report.json in this folder",
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # in the process of one stage
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.stage is None and given.out is None:
        parser.error("--out is not given; it must be a folder for the report")
    if not LEAST_MINUTES < given.minutes < MOST_MINUTES:
        parser.error(f"--minutes is {given.minutes:g}; it must be above {LEAST_MINUTES:g} and below {MOST_MINUTES}")
    if given.device == "cpu" and not given.toy:
        parser.error("--device is cpu; there the stages run with --toy alone")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    if given.stage is not None:
        from benchmarks.gpu_report.process import run_here
        from benchmarks.gpu_report.stage import Settings

        run_here(given.stage, Settings(given.device, given.toy, time.monotonic() + given.seconds), given.rows)
        return 0
    with lenient():
        try:
            with signals.raised():
                return run(given) if given.recorded is None else again(given.recorded, given.out)
        except Refused as refused:
            print(f"gpu_report: {refused}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            print(f"gpu_report: {stopped}", file=sys.stderr)
            return 128 + stopped.number


def heading_of(given: argparse.Namespace) -> dict[str, str]:
    """Where and how the report is made, and no folder's name: it is sent to others."""
    try:
        import torch
        import tqdm  # noqa: F401  # as `run` imports it

        from benchmarks import machine
    except (ImportError, OSError) as error:
        raise Refused(f"what it needs cannot be imported: {error}") from error
    if given.device == "cuda":
        advice = "`--device cpu --toy` shows that its code runs"
        try:
            if not torch.cuda.is_available():
                raise Refused(f"it needs a CUDA GPU, and torch sees none here; {advice}")
            torch.cuda.get_device_name()
        except (RuntimeError, AssertionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Refused(f"it needs a CUDA GPU that works, and this one does not: {reason}; {advice}") from error
    command = ["python", "-m", "benchmarks.gpu_report", f"--minutes={given.minutes:g}"]
    if given.device == "cpu":
        command += ["--device=cpu"]
    if given.toy:
        command += ["--toy"]
    if given.only != NAMES:
        command += ["--only", *given.only]
    described = machine.describe(gpu=given.device == "cuda")
    return {**described, "command": " ".join(command), "toy": "yes" if given.toy else "no"}


def run(given: argparse.Namespace) -> int:
    """Every stage in turn; the rows are on disk as they come."""
    until = time.monotonic() + 60 * given.minutes
    heading = heading_of(given)
    stages = [stage for stage in STAGES if stage.name in given.only]
    with folder.held(given.out):
        folder.clear(given.out)
        report = Report(given.out, heading, [stage.name for stage in stages])
        log = Log(given.out / folder.LOG)
        try:
            measure(stages, report, log, given, until)
            report.complete = True
        except Stopped as stopped:
            for outcome in report.outcomes.values():
                if outcome.status == "running":
                    outcome.status, outcome.reason = "cut off", f"the report was {stopped}"
            raise
        finally:
            report.save()
            text = report.publish()
        if log.lost is not None:
            report.unwritten[log.path.name] = log.lost
        print(text)
        broken = report.problems()
        for sentence in broken:
            print(f"not as it should be: {sentence}", file=sys.stderr)
        return 1 if broken else 0


def measure(stages: list[Stage], report: Report, log: Log, given: argparse.Namespace, until: float) -> None:
    """The stages, one after another, with the time that there is until then."""
    from tqdm import tqdm

    saved, rows_saved = 0.0, 0

    def looked() -> None:
        """Rows that have come are saved, once a second."""
        nonlocal saved, rows_saved
        rows = sum(len(outcome.rows) for outcome in report.outcomes.values())
        if rows > rows_saved and time.monotonic() - saved > SAVED_EVERY:
            progress.set_description_str(f"{stage.name}: {len(outcome.rows)} rows")
            report.save()
            saved, rows_saved = time.monotonic(), rows

    with tqdm(total=len(stages), unit="stage", bar_format="{desc:40} {n}/{total} stages, {elapsed}") as progress:
        for number, stage in enumerate(stages):
            seconds = budget(stages, number, until - time.monotonic())
            outcome = report.outcomes[stage.name] = Outcome("running", None, 0.0, seconds)
            progress.set_description_str(stage.name)
            run_apart(stage, outcome, device=given.device, toy=given.toy, log=log, looked=looked)
            report.save()
            took = f"{outcome.seconds:.0f} of {outcome.budget:.0f} s"
            progress.write(f"{stage.name:12} {outcome.status:8} {len(outcome.rows):4} rows, {took}", file=sys.stderr)
            progress.update()


def again(recorded: Path, out: Path) -> int:
    """report.md and the plots of a report.json that is there."""
    found = read(recorded)
    with folder.held(out):
        folder.clear(out, keep_rows=out.resolve() == recorded.resolve())
        text, broken = tables(out, found)
        try:
            write(out / folder.TEXT, text)
        except OSError as error:
            raise Refused(f"{out / folder.TEXT} cannot be written: {error.strerror}") from error
    for sentence in broken:
        print(f"not as it should be: {sentence}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
