"""A pytest plugin that appends lines of JSON to the file that SDFT_TEST_ROWS names: how many tests there are, which one
begins, and what became of it."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

#: Of a failure's text: the lines that say what was wrong.
MOST_LINES = 12

_NOT_COLLECTED: set[str] = set()


def pytest_collection_finish(session: Any) -> None:
    _write({"collected": len(session.items)})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    _write({"collected": len(ids)})


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported is a failure, of tests that nobody could count; each process may report it."""
    if report.failed and report.nodeid not in _NOT_COLLECTED:
        _NOT_COLLECTED.add(report.nodeid)
        _write({"case": report.nodeid, "outcome": "failed", "seconds": 0.0, "message": _message(report)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"begun": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    row = {
        "case": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
        "message": _message(report),
    }
    _write(row)


def _write(event: dict[str, Any]) -> None:
    """Under xdist the processes that run tests see it too; the one that collects results alone writes."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["SDFT_TEST_ROWS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def _message(report: Any) -> str:
    if report.outcome == "skipped":
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    if report.outcome == "passed":
        return ""
    lines = str(report.longrepr).splitlines()
    said = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join(said[:MOST_LINES] + lines[-1:])[:4000]
