"""The tests of tests/gpu, in several processes on the one GPU: a row for each, as it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped

ROOT = Path(__file__).parents[2]

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


def workers(settings: Settings) -> int:
    """Most of the time compiles kernels, on the CPU; each process takes about half a gibibyte of the GPU besides."""
    return 2 if settings.toy else max(2, min(12, (os.cpu_count() or 2) - 2))


def run(settings: Settings) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.touch()
        tests = TOY_TESTS if settings.toy else ("tests/gpu",)
        command = [sys.executable, "-m", "pytest", *tests, "-q", "-p", "benchmarks.gpu_report.pytest_rows"]
        command += ["--numprocesses", str(workers(settings)), "--dist", "loadgroup", "-p", "no:cacheprovider"]
        environment = {**os.environ, "SDFT_TEST_DEVICE": settings.device, "SDFT_TEST_ROWS": str(rows)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr)
        try:
            with rows.open() as file:
                while process.poll() is None and settings.left() > 0:
                    yield from map(json.loads, file)
                    time.sleep(0.2)
                in_time = process.poll() is not None
                yield from map(json.loads, file)
        finally:
            process.kill()  # its workers, which then have nobody to talk to, end with the stage's process group
            process.wait()
        if not in_time:
            yield skipped("the tests after these", "no time left")
        elif process.returncode not in (0, 1):  # which is that tests failed
            yield {"case": "pytest", "error": f"it ended with exit status {process.returncode}"}


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
    lines = [markdown([*counted, {"file": "together", **whole}], columns)]
    for row in rows:
        if row.get("outcome") == "failed":
            lines.append(f"\nFAILED `{row['case']}`\n\n    " + row["message"].replace("\n", "\n    "))
        elif row.get("outcome") == "skipped" and "is about a GPU itself" not in row["message"]:
            lines.append(f"\nSkipped `{row['case']}`: {row['message']}")
        elif "error" in row or "outcome" not in row:
            lines.append(f"\n{row['case']}: {row.get('error') or row.get('skipped')}")
    return "\n".join(lines)
