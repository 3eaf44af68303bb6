"""A pytest plugin that appends a line of JSON for each test to the file that SDFT_TEST_ROWS names."""

from __future__ import annotations

import json
import os
from typing import Any

#: Of a failure's text: the lines that say what was wrong.
MOST_LINES = 12


def pytest_runtest_logreport(report: Any) -> None:
    """Under xdist the processes that run tests see it too; the one that collects results alone writes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    ended = report.when == "call" or report.outcome != "passed"
    if not ended:
        return
    row = {
        "case": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
        "message": _message(report),
    }
    with open(os.environ["SDFT_TEST_ROWS"], "a") as file:
        file.write(json.dumps(row) + "\n")


def _message(report: Any) -> str:
    if report.outcome == "skipped":
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.outcome == "passed":
        return ""
    lines = str(report.longrepr).splitlines()
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join(said[:MOST_LINES] + lines[-1:])[:4000]
