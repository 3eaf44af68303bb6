"""The report of a GPU, without one: its plan, its processes and its files."""

from __future__ import annotations

import ast
import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_report import __main__ as command
from benchmarks.gpu_report import folder, plan, report
from benchmarks.gpu_report.paths import ROOT, without_paths
from benchmarks.gpu_report.plan import RESERVE, STAGES, Stage, budget
from benchmarks.gpu_report.process import Outcome, environment
from benchmarks.gpu_report.stage import Row, markdown
from tests.waiting import patience

TABLE = "\n\ndef table(rows):\n    return f'{len(rows)} rows'\n"
ENDS = (
    "def run(settings):\n    print('to the log')\n    yield {'case': 'one', 'value': 1.5}\n    yield {'case': 'two'}\n"
)
RAISES = "def run(settings):\n    yield {'case': 'before'}\n    raise ValueError('the reason why')\n"
DIES = "import os\ndef run(settings):\n    print('its last words')\n    yield {'case': 'before'}\n    os.abort()\n"
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
            monkeypatch.delitem(sys.modules, f"stage_{name}", raising=False)  # an earlier test's
        made = tuple(Stage(f"stage_{name}", f"About {name}", 1.0, package="") for name in sources)
        for module in (plan, report, command, folder):
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
    assert status["stage_dies"] == ("failed", "ended by signal 6: its last words")
    assert status["stage_hangs"][0] == "cut off"
    assert status["stage_ends"] == ("done", None)
    assert found["stages"]["stage_ends"]["rows"] == [{"case": "one", "value": 1.5}, {"case": "two"}]
    for name in ("raises", "dies", "hangs"):
        assert found["stages"][f"stage_{name}"]["rows"] == [{"case": "before"}], "rows before the end count"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**Partial:** stage_raises failed; stage_dies failed; stage_hangs cut off." in text
    assert "## About ends" in text and "2 rows" in text and "Its table could not be made: KeyError" in text
    assert "to the log" in (tmp_path / "out" / "log.txt").read_text()
    said = capsys.readouterr().err
    assert "stage_raises: failed: ValueError: the reason why" in said
    assert "stage_broken: its table could not be made: KeyError: 'nothing'" in said


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
        (["--out", "x", "--minutes", "0.25"], "--minutes is 0.25; it must be above 0.25 and below 1440"),
        (["--out", "x", "--minutes", "1e9"], "--minutes is 1e+09; it must be above 0.25 and below 1440"),
        (["--out", "x", "--minutes", "nan"], "--minutes is nan"),
        (["--out", "x", "--only", "nothing"], "invalid choice"),
    ],
)
def test_wrong_options_are_said(options: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_stage_that_hangs_at_its_exit_is_cut_off(stages: Any, tmp_path: Path) -> None:
    hangs = (
        "import threading, time\ndef run(settings):\n    yield {'case': 'one'}\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
    )
    stages(hangs=hangs, ends=ENDS)
    assert run(tmp_path / "out", "--minutes", "0.5") == 1
    found = recorded(tmp_path / "out")["stages"]
    assert [found[name]["status"] for name in found] == ["cut off", "done"]
    assert found["stage_hangs"]["rows"] == [{"case": "one"}]


def test_a_stage_may_say_that_it_is_cut_off(stages: Any, tmp_path: Path) -> None:
    says = (
        "from benchmarks.gpu_report.errors import CutOff\ndef run(settings):\n    yield {'case': 'one'}\n"
        "    raise CutOff('half of it is missing')\n"
    )
    stages(says=says)
    assert run(tmp_path / "out", "--minutes", "1") == 1
    found = recorded(tmp_path / "out")["stages"]["stage_says"]
    assert (found["status"], found["reason"]) == ("cut off", "half of it is missing")


@pytest.mark.parametrize(
    "source", ["def run(s):\n    yield from ()\n", "def run(s):\n    yield {'case': 'a', 'skipped': 'b'}\n"]
)
def test_a_stage_that_measured_nothing_is_a_problem(source: str, stages: Any, tmp_path: Path, capsys: Any) -> None:
    stages(idle=source)
    assert run(tmp_path / "out", "--minutes", "1") == 1
    assert "stage_idle: it measured nothing" in capsys.readouterr().err


def test_what_is_printed_never_mixes_with_rows(stages: Any, tmp_path: Path) -> None:
    """Not even what Python's start prints, before the stage is there."""
    (tmp_path / "sitecustomize.py").write_text("print('welcome')\n")
    stages(ends="import os\n" + ENDS.replace("print('to the log')", "os.system('echo hello'); os.write(1, b'\\xff')"))
    assert run(tmp_path / "out", "--minutes", "1") == 0
    assert len(recorded(tmp_path / "out")["stages"]["stage_ends"]["rows"]) == 2
    said = (tmp_path / "out" / "log.txt").read_text()
    assert "welcome\n" in said and "hello\n" in said


def test_a_number_that_is_none_is_an_error(stages: Any, tmp_path: Path, capsys: Any) -> None:
    stages(nan="def run(settings):\n    yield {'case': 'one', 'ms': float('nan'), 'rounds': 3, 'method': 'ours'}\n")
    assert run(tmp_path / "out", "--minutes", "1") == 1
    assert recorded(tmp_path / "out")["stages"]["stage_nan"]["rows"] == [
        {"case": "one", "rounds": 3, "method": "ours", "error": "ms is nan"}
    ]
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()
    assert "stage_nan: one, ours: ms is nan" in capsys.readouterr().err


def test_a_shells_settings_do_not_reach_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would pass for the GPU, and fewer tests for all."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    on_a_gpu = environment("cuda")
    assert "TRITON_INTERPRET" not in on_a_gpu and "PYTEST_ADDOPTS" not in on_a_gpu
    assert environment("cpu")["TRITON_INTERPRET"] == "1" and environment("cpu")["CUDA_VISIBLE_DEVICES"] == ""


def test_many_failures_are_told_in_few_lines() -> None:
    rows: list[Row] = [{"case": f"number {n}", "error": "broken"} for n in range(20)]
    said = report.problems({"stage": Outcome("done", None, 1.0, 2.0, rows)})
    assert len(said) == report.MOST_SENTENCES + 1 and said[-1] == "stage: and 12 more, in report.md"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f'File "{ROOT}/benchmarks/gpu.py", line 3', 'File "benchmarks/gpu.py", line 3'),
        ("/usr/lib/python3.12/site-packages/torch/nn.py:12: warned", "torch/nn.py:12: warned"),
        ("--out=/somewhere/of/mine --minutes", "--out=…/mine --minutes"),
        (f"no file {Path.home()}, {Path.home()}/a/b.py", "no file ~, …/b.py"),
        ("see https://pytorch.org/docs/stable/x.html", "see https://pytorch.org/docs/stable/x.html"),
        ("12 ms/s and a/b/c of ours/this", "12 ms/s and a/b/c of ours/this"),
    ],
)
def test_paths_are_cut(said: str, kept: str) -> None:
    assert without_paths(said) == kept


def test_a_report_names_no_folder_of_its_machine(stages: Any, tmp_path: Path) -> None:
    stages(
        tells=f"def run(settings):\n    print('in {tmp_path}/a')\n    yield {{'case': 'one', 'at': '{tmp_path}/b'}}\n"
    )
    assert run(tmp_path / "out", "--minutes", "1") == 0
    for name in ("report.json", "report.md", "log.txt"):
        assert str(tmp_path.parent) not in (tmp_path / "out" / name).read_text(), name


def test_an_earlier_reports_files_are_gone(stages: Any, tmp_path: Path) -> None:
    draws = ENDS + TABLE + "\n\ndef draw(rows, path):\n    len(rows) > 5 and path.write_text('')\n"
    stages(draws=draws)
    (tmp_path / "out").mkdir()
    for name in ("report.json", "report.md", "log.txt", "stage_draws.png", "mine.txt"):
        (tmp_path / "out" / name).write_text("old")
    assert run(tmp_path / "out", "--minutes", "1") == 0
    assert not (tmp_path / "out" / "stage_draws.png").exists() and (tmp_path / "out" / "mine.txt").exists()
    assert "stage_draws.png" not in (tmp_path / "out" / "report.md").read_text(), "no plot was drawn"


@pytest.mark.parametrize(("error", "status"), [("ModuleNotFoundError('no matplotlib')", 0), ("KeyError('ms')", 1)])
def test_a_plot_that_cannot_be_drawn_leaves_the_table(error: str, status: int, stages: Any, tmp_path: Path) -> None:
    stages(draws=ENDS + TABLE + f"\n\ndef draw(rows, path):\n    path.write_text('half')\n    raise {error}\n")
    assert run(tmp_path / "out", "--minutes", "1") == status
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2 rows\n\nIts plot could not be drawn: " in text and "png" not in text
    assert not (tmp_path / "out" / "stage_draws.png").exists()


def test_a_stage_whose_packages_are_missing_leaves_the_other_tables(stages: Any, tmp_path: Path) -> None:
    stages(lacks=ENDS, ends=ENDS)
    assert run(tmp_path / "one", "--minutes", "1") == 0
    (tmp_path / "stage_lacks.py").write_text("import no_such_package\n")
    del sys.modules["stage_lacks"]
    assert command.main(["--out", str(tmp_path / "two"), "--from", str(tmp_path / "one")]) == 1
    text = (tmp_path / "two" / "report.md").read_text()
    assert "Its table could not be made: ModuleNotFoundError" in text and "2 rows" in text


def test_a_full_disk_stops_nothing(stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == tmp_path / "out":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *arguments, **options)

    stages(first=ENDS, second=ENDS)
    monkeypatch.setattr(Path, "open", full)
    assert run(tmp_path / "out", "--minutes", "1") == 1
    shown = capsys.readouterr()
    assert shown.out.count("2 rows") == 2
    for name in ("report.json", "report.md", "log.txt"):
        assert f"{name} could not be written: No space left on device" in shown.err


def refusal(capsys: Any, *options: str) -> str:
    """The one line that says why a run is refused."""
    assert command.main([*options]) == 2
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_folder_that_cannot_be_written_is_one_line(stages: Any, tmp_path: Path, capsys: Any) -> None:
    stages(ends=ENDS)
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below", Path("/proc/sys")):
        said = refusal(capsys, "--out", str(out), "--device", "cpu", "--toy")
        assert f"--out is {out}, where no file can be written" in said
        run(tmp_path / "one", "--minutes", "1")
        capsys.readouterr()
        assert f"--out is {out}, " in refusal(capsys, "--out", str(out), "--from", str(tmp_path / "one"))


def test_one_run_at_a_time_in_a_folder(stages: Any, tmp_path: Path, capsys: Any) -> None:
    stages(ends=ENDS)
    with folder.held(tmp_path / "out"):
        said = refusal(capsys, "--out", str(tmp_path / "out"), "--device", "cpu", "--toy")
        assert "to which another run writes" in said
    assert run(tmp_path / "out", "--minutes", "1") == 0


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stages": {"card": 1}}', "\xff"])
def test_what_is_no_report_is_one_line(text: str, tmp_path: Path, capsys: Any) -> None:
    assert "where there is no report.json" in refusal(capsys, "--out", str(tmp_path), "--from", str(tmp_path))
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    assert "report.json" in refusal(capsys, "--out", str(tmp_path), "--from", str(tmp_path))
    assert not (tmp_path / "report.md").exists()


def test_a_gpu_that_fails_is_one_line_and_is_not_asked_by_a_toy(
    stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def breaks() -> str:
        raise RuntimeError("CUDA error: unknown error\nand advice")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", breaks)
    stages(ends=ENDS)
    assert "CUDA error: unknown error" in refusal(capsys, "--out", str(tmp_path / "out"))
    assert run(tmp_path / "out", "--minutes", "1") == 0
    assert recorded(tmp_path / "out")["device"] == "CPU"


@pytest.mark.parametrize("package", ["torch", "tqdm"])
def test_without_a_package_it_needs_it_is_one_line(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert package in refusal(capsys, "--out", str(tmp_path / "out"), "--device", "cpu", "--toy")


def driven(tmp_path: Path, *options: str, **environment: str) -> list[str]:
    """A command line that runs the report of the stages that are there, in a process of its own."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, sys\n"
        "from benchmarks.gpu_report import __main__ as command, folder, plan, report\n"
        "names = sorted(n.stem for n in __import__('pathlib').Path(__file__).parent.glob('stage_*.py'))\n"
        "for module in (plan, report, command, folder):\n"
        "    module.STAGES = tuple(plan.Stage(name, name, 1.0, package='') for name in names)\n"
        "command.NAMES = names\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--toy"]
    return ["env", *(f"{k}={v}" for k, v in environment.items()), sys.executable, str(driver), *out, *options]


def paths_of_python(tmp_path: Path) -> str:
    return f"{tmp_path}:{ROOT}"


WAITS = (
    "import subprocess, time\ndef run(settings):\n    yield {'case': 'one'}\n"
    "    yield {'case': 'two', 'child': subprocess.Popen(['sleep', '600']).pid}\n    time.sleep(600)\n"
)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition: Any, seconds: float = 60) -> None:
    ended = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < ended
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_report_that_is_stopped_leaves_its_rows_and_no_process(number: int, stages: Any, tmp_path: Path) -> None:
    stages(a_waits=WAITS, b_ends=ENDS)
    command_line = driven(tmp_path, "--minutes", "2", PYTHONPATH=paths_of_python(tmp_path))
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, preexec_fn=signals_as_they_are)
    out = tmp_path / "out"
    until(lambda: (out / "report.json").exists() and "child" in (out / "report.json").read_text())
    process.send_signal(number)
    _, said = process.communicate(timeout=patience(60))
    waits = recorded(out)["stages"]["stage_a_waits"]
    assert len(waits["rows"]) == 2
    until(lambda: not alive(waits["rows"][1]["child"]))
    if number == signal.SIGKILL:
        assert process.returncode == -number and not (out / "report.md").exists()
        assert command.main(["--out", str(out), "--from", str(out)]) == 0
        missing = "**Partial:** stage_a_waits running; stage_b_ends not reached."
    else:
        assert process.returncode == 128 + number and "Traceback" not in said
        assert waits["status"] == "cut off" and not recorded(out)["complete"]
        missing = "**Partial:** stage_a_waits cut off; stage_b_ends not reached."
    assert missing in (out / "report.md").read_text()


def signals_as_they_are() -> None:
    """A shell's job in the background, as tests may run, ignores Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_rows_are_saved_while_a_stage_says_nothing_more(stages: Any, tmp_path: Path) -> None:
    looks = (
        "import json, time\ndef run(settings):\n    yield {'case': 'one'}\n    yield {'case': 'two'}\n"
        "    time.sleep(3)\n"
        f"    found = json.load(open({str(tmp_path / 'out' / 'report.json')!r}))\n"
        "    yield {'case': 'seen', 'rows': len(found['stages']['stage_looks']['rows'])}\n"
    )
    stages(looks=looks)
    assert run(tmp_path / "out", "--minutes", "1") == 0
    assert recorded(tmp_path / "out")["stages"]["stage_looks"]["rows"][2]["rows"] == 2


def test_a_locale_without_the_characters(stages: Any, tmp_path: Path) -> None:
    stages(ends=ENDS + "\n\ndef table(rows):\n    return 'é³'\n")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    given = driven(tmp_path, "--minutes", "1", PYTHONPATH=paths_of_python(tmp_path), **ascii_alone)
    done = subprocess.run(given, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"??" in done.stdout
    assert "é³" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_reader_that_goes_away_ends_nothing(stages: Any, tmp_path: Path) -> None:
    stages(a_ends=ENDS, b_ends=ENDS)
    given = driven(tmp_path, "--minutes", "1", PYTHONPATH=paths_of_python(tmp_path))
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(60) == 0
    assert recorded(tmp_path / "out")["complete"]


def test_make_takes_a_folder_with_a_space(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\nprint(sys.argv[1:])\n")
    python.chmod(0o755)
    given = ["make", "-s", "gpu", f"PYTHON={python}", "READY=", "GPU_OUT=my runs", "MINUTES=3"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["-m", "benchmarks.gpu_report", "--out", "my runs", "--minutes", "3"]


def test_markdown_leaves_out_what_is_not_there() -> None:
    text = markdown([{"a": 1.25, "b": None}], [("A", "a", ".1f"), ("B", "b", "d"), ("C", "c", "")])
    assert text.splitlines()[-1] == "| 1.2 | - | - |"
