"""The report of a GPU, without one: its plan, its processes and its files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import correctness, plan, report
from benchmarks.gpu_report.plan import RESERVE, STAGES, Stage, budget
from benchmarks.gpu_report.process import Outcome
from benchmarks.gpu_report.stage import markdown

TABLE = "\n\ndef table(rows):\n    return f'{len(rows)} rows'\n"
ENDS = (
    "def run(settings):\n    print('to the log')\n    yield {'case': 'one', 'value': 1.5}\n    yield {'case': 'two'}\n"
)
RAISES = "def run(settings):\n    yield {'case': 'before'}\n    raise ValueError('the reason why')\n"
DIES = "import os\ndef run(settings):\n    yield {'case': 'before'}\n    os.abort()\n"
HANGS = "import time\ndef run(settings):\n    yield {'case': 'before'}\n    time.sleep(600)\n"
BROKEN_TABLE = "def run(settings):\n    yield {'case': 'one'}\n\ndef table(rows):\n    return rows[0]['nothing']\n"


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the report's stages of modules with these sources."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("benchmarks.gpu_report.process.GRACE", 1)

    def make(**sources: str) -> list[str]:
        for name, source in sources.items():
            text = source if "def table" in source else source + TABLE
            (tmp_path / f"stage_{name}.py").write_text(text)
        made = tuple(Stage(f"stage_{name}", f"About {name}", 1.0, package="") for name in sources)
        for module in (plan, report, command):
            monkeypatch.setattr(module, "STAGES", made)
        names = [stage.name for stage in made]
        monkeypatch.setattr(command, "NAMES", names)
        return names

    return make


def run(out: Path, *options: str) -> int:
    return command.main(["--out", str(out), "--device", "cpu", "--toy", *options])


def recorded(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_every_stage_has_its_module() -> None:
    for stage in STAGES:
        module = stage.module()
        assert callable(module.run) and callable(module.table), stage.name


def test_the_plan_fits_and_hands_on_what_is_left_over() -> None:
    left, taken = 660.0, []
    for number, stage in enumerate(STAGES):
        seconds = budget(STAGES, number, left)
        assert seconds == pytest.approx(stage.share * (660 - RESERVE) / sum(s.share for s in STAGES))
        taken.append(seconds)
        left -= seconds
    assert left == pytest.approx(RESERVE)
    quick = budget(STAGES, 1, 660.0) / budget(STAGES, 1, 660.0 - taken[0])
    assert quick > 1, "what the first stage leaves over goes to the next"
    assert budget(STAGES, len(STAGES) - 1, 5.0) == 0.0


def test_a_stage_that_raises_dies_or_hangs_does_not_stop_the_others(stages: Any, tmp_path: Path, capsys: Any) -> None:
    stages(raises=RAISES, dies=DIES, hangs=HANGS, broken=BROKEN_TABLE, ends=ENDS)
    started = time.monotonic()
    assert run(tmp_path / "out", "--minutes", "0.5") == 1
    assert time.monotonic() - started < 40
    found = recorded(tmp_path / "out")
    assert found["complete"] and found["date"] and found["versions"] and found["command"].startswith("python -m ")
    status = {name: (stage["status"], stage["reason"]) for name, stage in found["stages"].items()}
    assert status["stage_raises"] == ("failed", "ValueError: the reason why")
    assert status["stage_dies"][0] == "failed"
    assert status["stage_hangs"][0] == "cut off"
    assert status["stage_ends"] == ("done", None)
    assert found["stages"]["stage_ends"]["rows"] == [{"case": "one", "value": 1.5}, {"case": "two"}]
    for name in ("raises", "dies", "hangs"):
        assert found["stages"][f"stage_{name}"]["rows"] == [{"case": "before"}], "rows before the end count"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## About ends" in text and "2 rows" in text and "Its table could not be made: KeyError" in text
    assert "to the log" in (tmp_path / "out" / "log.txt").read_text()
    assert "stage_raises: failed: ValueError: the reason why" in capsys.readouterr().err


def test_all_well_is_0(stages: Any, tmp_path: Path) -> None:
    names = stages(ends=ENDS, others=ENDS)
    assert run(tmp_path, "--minutes", "1") == 0
    assert list(recorded(tmp_path)["stages"]) == names
    assert run(tmp_path, "--minutes", "1", "--only", "stage_others") == 0
    assert list(recorded(tmp_path)["stages"]) == ["stage_others"]


def test_the_file_is_whole_before_the_next_stage_begins(stages: Any, tmp_path: Path) -> None:
    looks = (
        "import json\ndef run(settings):\n"
        f"    found = json.load(open({str(tmp_path / 'out' / 'report.json')!r}))\n"
        "    rows = found['stages']['stage_first']['rows']\n"
        "    yield {'case': 'seen', 'complete': found['complete'], 'rows': len(rows)}\n"
    )
    stages(first=ENDS, second=looks)
    assert run(tmp_path / "out", "--minutes", "1") == 0
    assert recorded(tmp_path / "out")["stages"]["stage_second"]["rows"] == [
        {"case": "seen", "complete": False, "rows": 2}
    ]


def test_the_tables_again_from_recorded_rows(stages: Any, tmp_path: Path) -> None:
    stages(ends=ENDS)
    run(tmp_path / "one", "--minutes", "1")
    assert command.main(["--out", str(tmp_path / "two"), "--from", str(tmp_path / "one")]) == 0
    assert (tmp_path / "two" / "report.md").read_text() == (tmp_path / "one" / "report.md").read_text()
    assert command.main(["--out", str(tmp_path / "two"), "--from", str(tmp_path)]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "needs a CUDA GPU" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out is not given"),
        (["--out", "x", "--device", "cpu"], "--toy"),
        (["--out", "x", "--minutes", "0"], "--minutes is 0"),
        (["--out", "x", "--only", "nothing"], "invalid choice"),
    ],
)
def test_wrong_options_are_said(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_failed_tests_are_told_in_full() -> None:
    rows: list[dict[str, Any]] = [
        {"case": "tests/gpu/test_a.py::one", "outcome": "passed", "seconds": 1.0, "message": ""},
        {"case": "tests/gpu/test_a.py::two", "outcome": "failed", "seconds": 2.0, "message": "E 1\nE 2"},
        {"case": "tests/gpu/test_b.py::three", "outcome": "skipped", "seconds": 0.0, "message": "needs two GPUs"},
        {"case": "the tests after these", "skipped": "no time left"},
    ]
    text = correctness.table(rows)
    assert "| tests/gpu/test_a.py | 1 | 1 | 0 | 3 |" in text and "| together | 1 | 1 | 1 | 3 |" in text
    assert "FAILED `tests/gpu/test_a.py::two`" in text and "E 2" in text and "needs two GPUs" in text
    assert "the tests after these: no time left" in text
    outcome = Outcome("done", None, 1.0, 2.0, rows)
    assert report.problems({"correctness": outcome}) == ["correctness: tests/gpu/test_a.py::two failed"]


def test_markdown_leaves_out_what_is_not_there() -> None:
    text = markdown([{"a": 1.25, "b": None}], [("A", "a", ".1f"), ("B", "b", "d"), ("C", "c", "")])
    assert text.splitlines()[-1] == "| 1.2 | - | - |"
