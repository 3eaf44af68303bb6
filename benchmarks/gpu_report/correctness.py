"""The tests of tests/gpu, in several processes on the one GPU: a row for each, as it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.gpu_report.errors import CutOff
from benchmarks.gpu_report.paths import ROOT
from benchmarks.gpu_report.stage import Row, Settings, markdown

#: On the CPU, where Triton's interpreter takes its time: tests that between them run all of the code.
TOY_TESTS = (
    "tests/gpu/test_trainer.py::test_loss_and_gradients_of_a_batch",
    "tests/gpu/test_device.py::test_autocast",
    "tests/gpu/test_scoring.py",
    "tests/gpu/test_loss.py::test_extreme_logits",
    "tests/gpu/test_loss.py::test_no_tokens_give_zeros",
)

#: Of each file of tests.
COUNTED = ("passed", "failed", "skipped", "seconds")
#: Tests that are named where many fail alike.
MOST_CASES = 10


#: Bytes of the GPU's memory that the largest tests take, which one process has, and those that any other process takes.
OF_LARGEST, OF_A_WORKER = 26 * 2**30, 3.5 * 2**30


def workers(settings: Settings) -> int:
    """As many as there are processors, for most of the time compiles kernels; and as many as the GPU has memory for."""
    if settings.toy:
        return 2
    fit = (torch.cuda.get_device_properties(0).total_memory - OF_LARGEST) // OF_A_WORKER
    return max(2, min(16, os.cpu_count() or 2, int(fit)))


@dataclass
class Tests:
    """What became of the tests so far, by what the plugin writes."""

    collected: int = 0
    begun: dict[str, None] = field(default_factory=dict)  # and not ended
    ended: dict[str, str] = field(default_factory=dict)  # the outcome of each
    _begun_line: str = ""

    def take(self, file: TextIO) -> Iterator[Row]:
        """A row for each test that has ended since the last look."""
        *lines, self._begun_line = (self._begun_line + file.read()).split("\n")
        for event in map(json.loads, lines):
            if "collected" in event:
                self.collected = max(self.collected, event["collected"])
            elif "begun" in event:
                self.begun[event["begun"]] = None
            else:
                self.begun.pop(event["case"], None)
                self.ended[event["case"]] = event["outcome"]
                yield event

    @property
    def said(self) -> str:
        outcomes = list(self.ended.values())
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
        return f"{counts}, and {self.collected} tests were found"


def run(settings: Settings) -> Iterator[Row]:
    for package in ("pytest", "xdist", "hypothesis"):
        importlib.import_module(package)  # whose absence the process below would tell only the log
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.jsonl"
        events.touch()
        chosen = TOY_TESTS if settings.toy else ("tests/gpu",)
        command = [sys.executable, "-m", "pytest", *chosen, "-q", "-p", "benchmarks.gpu_report.pytest_rows"]
        command += ["--numprocesses", str(workers(settings)), "--dist", "loadgroup", "-p", "no:cacheprovider"]
        # A report that a test makes is none of that test's workers.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment = {**inherited, "SDFT_TEST_DEVICE": settings.device, "SDFT_TEST_ROWS": str(events)}
        tests = Tests()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr)
        try:
            with events.open() as file:
                while process.poll() is None and settings.left() > 0:
                    yield from tests.take(file)
                    time.sleep(0.2)
                in_time = process.poll() is not None
                yield from tests.take(file)
        finally:
            process.kill()  # its workers, which then have nobody to talk to, end with the stage's process group
            process.wait()
    if not in_time:
        yield from ({"case": case, "error": "it began, and had not ended when time was up"} for case in tests.begun)
        raise CutOff(f"no time was left: {tests.said}")
    outcomes = list(tests.ended.values())
    every_test = len(outcomes) >= tests.collected and "passed" in outcomes
    if not every_test or process.returncode != ("failed" in outcomes):
        raise SystemExit(f"pytest ended with exit status {process.returncode}: {tests.said}")


def table(rows: list[Row]) -> str:
    """How many tests of each file passed, and all that did not."""
    files: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "outcome" in row:
            counts = files.setdefault(row["case"].partition("::")[0], dict.fromkeys(COUNTED, 0))
            counts[row["outcome"]] += 1
            counts["seconds"] += row["seconds"]
    counted = [{"file": file, **counts} for file, counts in files.items()]
    whole = {key: sum(row[key] for row in counted) for key in COUNTED}
    columns = (
        ("file", "file", ""),
        ("passed", "passed", "d"),
        ("failed", "failed", "d"),
        ("skipped", "skipped", "d"),
        ("seconds in tests", "seconds", ".0f"),
    )
    lines = [
        "Tests of each file, by what became of them; seconds in tests are added up over processes side by side.",
        "",
    ]
    lines += [markdown([*counted, {"file": "together", **whole}], columns)]
    failed: dict[str, list[str]] = {}  # by what they say, which is often the same
    for row in rows:
        if row.get("outcome") == "failed":
            failed.setdefault(row["message"], []).append(row["case"])
    for message, cases in failed.items():
        more = f" and {len(cases) - MOST_CASES} more" if len(cases) > MOST_CASES else ""
        names = ", ".join(f"`{case}`" for case in cases[:MOST_CASES])
        lines.append(f"\nFAILED {names}{more}\n\n    " + message.replace("\n", "\n    "))
    for row in rows:
        if row.get("outcome") == "skipped" and "is about a GPU itself" not in row["message"]:
            lines.append(f"\nSkipped `{row['case']}`: {row['message']}")
        elif "error" in row or "outcome" not in row:
            lines.append(f"\n{row['case']}: {row.get('error') or row.get('skipped')}")
    return "\n".join(lines)
