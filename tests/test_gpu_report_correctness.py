"""The GPU report's first stage: what is no proof is never told as one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu_report import correctness, report
from benchmarks.gpu_report.errors import CutOff
from benchmarks.gpu_report.paths import ROOT
from benchmarks.gpu_report.process import Outcome
from benchmarks.gpu_report.stage import Row, Settings


@pytest.fixture
def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stage's rows with these test files, and how it ended if not as usual."""

    def rows_of(left: Callable[[], float] = lambda: 60, **sources: str) -> tuple[list[Row], BaseException | None]:
        rows: list[Row] = []
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        for name, source in sources.items():
            (tmp_path / f"test_{name}.py").write_text(source)
        monkeypatch.setattr(correctness, "TOY_TESTS", (str(tmp_path),))
        try:
            settings: Any = SimpleNamespace(device="cpu", toy=True, left=left)
            for row in correctness.run(settings):
                rows.append(row)
        except (CutOff, SystemExit) as error:
            return rows, error
        return rows, None

    return rows_of


PASSES = "def test_passes():\n    pass\n"
FAILS = "def test_fails():\n    assert 1 == 2\n"


def outcomes(rows: list[Row]) -> dict[str, str]:
    return {row["case"].rpartition("/")[2]: row.get("outcome", "error") for row in rows}


def test_what_passes_and_what_fails_is_told(rows_of: Any) -> None:
    rows, error = rows_of(good=PASSES, bad=FAILS)
    assert error is None
    assert outcomes(rows) == {"test_good.py::test_passes": "passed", "test_bad.py::test_fails": "failed"}


def test_a_file_that_cannot_be_imported_is_a_failure(rows_of: Any) -> None:
    rows, _ = rows_of(good=PASSES, broken="import os\nraise OSError(os.getpid())  # which differs by process\n")
    assert len(rows) == 2
    assert outcomes(rows)["test_broken.py"] == "failed"
    assert "OSError" in next(row["message"] for row in rows if row["case"].endswith("test_broken.py"))
    assert report.problems({"correctness": Outcome("done", None, 1, 1, rows)})


def test_where_nothing_passed_nothing_is_proven(rows_of: Any) -> None:
    rows, error = rows_of(idle="import pytest\n@pytest.mark.skip(reason='no GPU')\n" + PASSES)
    assert outcomes(rows) == {"test_idle.py::test_passes": "skipped"}
    assert isinstance(error, SystemExit) and "0 passed, 0 failed, 1 skipped, and 1 tests were found" in str(error)
    assert isinstance(rows_of(idle="")[1], SystemExit)


def test_tests_that_time_cuts_off_are_counted_and_the_last_named(rows_of: Any, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    hangs = f"import time\ndef test_hangs():\n    open({str(begun)!r}, 'w')\n    time.sleep(600)\n"
    after = "def test_after():\n    pass\n"

    def left() -> float:
        return 2 - (time.time() - begun.stat().st_mtime) if begun.exists() else 60

    rows, error = rows_of(left, one=hangs + after + PASSES)
    assert isinstance(error, CutOff) and "passed, 0 failed, 0 skipped, and 3 tests were found" in str(error)
    named = next(row for row in rows if "error" in row)
    assert named["case"].endswith("test_hangs") and "had not ended" in named["error"]


def test_without_pytest_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xdist", None)
    with pytest.raises(ImportError, match="xdist"):
        list(correctness.run(Settings("cpu", True, time.monotonic() + 60)))


def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_failure() -> None:
    """And the interpreter, which a shell may have chosen, does not stand in for it."""
    environment = {**os.environ, "SDFT_TEST_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    given = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_loss.py",
        "-k",
        "no_tokens",
    ]
    done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "SDFT_TEST_DEVICE is cuda, and torch sees no CUDA GPU here" in done.stdout
    asks = "import os, tests.conftest; assert 'TRITON_INTERPRET' not in os.environ"
    subprocess.run([sys.executable, "-c", asks], cwd=ROOT, env=environment, check=True)


def test_failed_tests_are_told_in_full() -> None:
    rows: list[dict[str, Any]] = [
        {"case": "tests/gpu/test_a.py::one", "outcome": "passed", "seconds": 1.0, "message": ""},
        {"case": "tests/gpu/test_a.py::two", "outcome": "failed", "seconds": 2.0, "message": "E 1\nE 2"},
        {"case": "tests/gpu/test_b.py::three", "outcome": "skipped", "seconds": 0.0, "message": "needs two GPUs"},
        {"case": "tests/gpu/test_a.py::three", "error": "it began"},
    ]
    rows += [
        {"case": f"tests/gpu/test_c.py::{n}", "outcome": "failed", "seconds": 0.0, "message": "no GPU"}
        for n in range(30)
    ]
    text = correctness.table(rows)
    assert "| tests/gpu/test_a.py | 1 | 1 | 0 | 3 |" in text and "| together | 1 | 31 | 1 | 3 |" in text
    assert "FAILED `tests/gpu/test_a.py::two`" in text and "E 2" in text and "needs two GPUs" in text
    assert "tests/gpu/test_a.py::three: it began" in text
    assert text.count("no GPU") == 1 and "`tests/gpu/test_c.py::9` and 20 more" in text
    outcome = Outcome("done", None, 1.0, 2.0, rows[:3])
    assert report.problems({"correctness": outcome}) == ["correctness: tests/gpu/test_a.py::two failed"]
