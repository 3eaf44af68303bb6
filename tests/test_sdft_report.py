"""`sdft report`: what is read of a run's folder, and the page in a real browser."""

from __future__ import annotations

import importlib.metadata
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sdft import cli
from sdft.errors import UsageError
from sdft.report.continual import Continual, Measurement, read_continual
from sdft.report.page import CURVES, as_json, continual, curves, page, step_seconds
from sdft.report.rollouts import MOST_TOKENS, choose, samples
from sdft.report.run_folder import MOST_POINTS, read_run, series
from sdft.report.what_ran import beside, differing, duration, facts, headline
from tests.browser import Browser, installed

WICKED = "</script><img src=x onerror=alert(1)><!-- & \u2028 \ud800"


def line(step: int) -> dict[str, Any]:
    random.seed(step)
    found: dict[str, Any] = {"step": step, "epoch": step / 10, "loss": 1 / step + random.random() / 5}
    for name in ("student_entropy", "teacher_entropy", "completion_length", "tokens_per_second", "rollout_seconds"):
        found[name] = 2 + random.random()
    return found | {
        "finished": random.random(),
        "out_of_reach": 0.9 / step,
        "learn_seconds": 1.5,
        "score_seconds": 0.5,
        "grad_norm": 3.0,
    }


def rollout(step: int, prompt: str, tokens: list[str]) -> dict[str, Any]:
    top = [[[token, -0.25], ["other", -2.0]] for token in tokens]
    return {
        "step": step,
        "prompt": prompt,
        "teacher_prompt": f"shown\n{prompt}",
        "completion": "".join(tokens),
        "completion_ids": list(range(len(tokens))),
        "tokens": tokens,
        "divergence": [None, *(0.1 * n for n in range(1, len(tokens)))],
        "student_logprob": [None, *(-0.5 for _ in tokens[1:])],
        "teacher_logprob": [None, *(-0.25 for _ in tokens[1:])],
        "student_top": [None, *top[1:]],
        "teacher_top": [None, *top[1:]],
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")


def make_run(folder: Path, steps: int = 40, *, ended: bool = True) -> Path:
    """The files of a run, with evaluation, rollouts and texts that are not to be read as HTML."""
    folder.mkdir(parents=True)
    logs = [line(step) for step in range(1, steps + 1)]
    for step in range(10, steps + 1, 10):
        logs.append({"step": step, "eval_accuracy": step / (2 * steps), "eval_forgetting": 0.002 * step})
    write_lines(folder / "metrics.jsonl", logs)
    words = ["Hi", " <b>", WICKED, "\n", "", " end"] * 5
    written = [rollout(step, f"{WICKED} {name}", words[: 6 + step % 9]) for step in (1, steps) for name in "ab"]
    write_lines(folder / "completions.jsonl", [*written, rollout(steps // 2, "once", [" long"] * (MOST_TOKENS + 7))])
    made_with = {
        "started": "now",
        "packages": {"torch": "2.13"},
        "devices": [WICKED],
        "git_commit": "abc",
        "python": "3",
    }
    (folder / "run.json").write_text(json.dumps({"run": "1", "made_with": made_with}))
    if ended:
        summary = {
            "model": f"m {WICKED}",
            "method": "sdft",
            "divergence": "forward_kl",
            "teacher": "ema",
            "steps": steps,
        }
        summary |= {"accuracy_before": 0.0, "accuracy_after": 0.75, "accuracy_teacher": 1.0, "loss_first": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "resolved_recipe.yaml").write_text("model: m\nlearning_rate: 1e-3\nbf16: false\nmax_steps: null\n")
    return folder


def make_continual(folder: Path) -> Path:
    folder.mkdir()

    def stage(accuracy: float, forgetting: float) -> dict[str, Any]:
        return {"learned": ["tools"], "accuracy": {"tools": accuracy}, "forgetting": forgetting}

    runs = [{"method": "sdft", "seed": seed, "stages": [stage(0.8, 0.1 * seed)]} for seed in (1, 2)]
    runs += [{"method": "sft", "seed": 1, "stages": [stage(0.6, 0.5)]}]
    base = {"accuracy": {"tools": 0.0}, "general_accuracy": 0.9, "teacher_accuracy": {"tools": 1.0}}
    (folder / "continual.json").write_text(json.dumps({"skills": ["tools"], "base": base, "runs": runs}))
    return folder


def test_nothing_of_a_run_can_end_the_data_or_be_read_as_html(tmp_path: Path) -> None:
    text = page([make_run(tmp_path / "run")])
    assert "onerror" in text and "<img" not in text and "<!--" not in text
    inside = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    data = json.loads(inside)
    assert data["runs"][0]["samples"][0]["rollouts"][0]["tokens"][2][0] == WICKED.replace("\ud800", "?")
    assert json.loads(as_json(["<", "\u2028"])) == ["<", "\u2028"]
    assert text.count("<script>") == 4 and "http-equiv" in text


def test_the_page_is_small_and_quick_to_write(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=500)
    logged = [
        rollout(step, f"prompt {step % 50} {n}", [" word"] * 256) for step in range(50, 501, 50) for n in range(8)
    ]
    write_lines(folder / "completions.jsonl", logged)
    started = time.process_time()
    size = len(page([folder]).encode())
    assert time.process_time() - started < 3
    assert size < 3 * 2**20


def test_what_is_missing_or_cut_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ended=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (folder / "run.json").write_text("{")
    (folder / "completions.jsonl").write_text('["no object"]\n' + json.dumps({"step": 1, "prompt": "p", "tokens": 3}))
    run = read_run(folder)
    (sample,) = samples(run)
    assert sample["rollouts"] == [{"step": 1, "completion": ""}], "a file without the texts of tokens"
    said = " ".join(run.notes)
    for part in (
        "1 line of metrics.jsonl",
        "run.json is not whole",
        "has not ended",
        "up to step 40",
        "leaves out 1 line of completions.jsonl",
    ):
        assert part in said
    assert headline(run) == "40 steps logged" and facts(run).keys() == {"folder"}
    (folder / "metrics.jsonl").write_text("")
    assert "no line yet" in " ".join(read_run(folder).notes)
    assert page([folder])


@pytest.mark.parametrize("words", [[], ["nowhere"], ["empty"], ["file"], ["run", "--output_file", "run/metrics.jsonl"]])
def test_what_cannot_be_reported_is_refused_in_a_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert cli.main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    expected = {
        "nowhere": "no such folder",
        "empty": "has no metrics.jsonl",
        "file": "is a file",
        "run": "read or written",
    }
    assert (expected[words[0]] if words else "run_dir is not set") in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_the_command_writes_beside_one_run_and_here_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", steps=20)
    assert cli.main(["report", "a"]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert cli.main(["report", "a", "b"]) == 0 and (tmp_path / "report.html").is_file()
    assert cli.main(["report", "--output_file", "c.html", "a", "b"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("c.html shows a, b (")


def test_a_checkout_that_is_not_installed_has_its_report_and_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert cli.main(["report", str(make_run(tmp_path / "run"))]) == 0
    assert '"version":"of a checkout"' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "sdft of a checkout that is not installed\n"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdft", "report", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("sdft: ")


def test_the_command_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, sdft.commands.report; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_curves_are_thinned_begin_before_training_and_leave_out_what_is_no_number() -> None:
    lines = [{"step": n, "loss": float(n % 2), "odd": float("nan")} for n in range(1, 2 * MOST_POINTS + 2)]
    assert series(lines).keys() == {"loss"}
    steps, values = series(lines)["loss"]
    assert (
        len(steps) <= MOST_POINTS and steps[-1] == 2 * MOST_POINTS + 1 and values[0] == pytest.approx(2 / 3, rel=1e-4)
    )
    spent = step_seconds([{"step": 10, "loss": 1.0, "learn_seconds": 5.0, "eval_seconds": 9.0}])
    assert spent == [{"step": 10, "learn": 0.5}]


def test_evaluation_begins_with_what_was_measured_before(tmp_path: Path) -> None:
    found = curves(read_run(make_run(tmp_path / "run")))
    assert found["eval_accuracy"] == [[0, 10, 20, 30, 40], [0.0, 0.125, 0.25, 0.375, 0.5]]
    assert found["eval_forgetting"][1][0] == 0.0


def test_the_page_draws_every_curve_that_it_has(tmp_path: Path) -> None:
    found = curves(read_run(make_run(tmp_path / "run")))
    assert found["out_of_reach"][1][:3] == pytest.approx([0.9, 0.45, 0.3])
    script = files("sdft.report").joinpath("assets", "report.js").read_text("utf-8")
    assert [name for name in CURVES if f'"{name}"' not in script] == []


def test_prompts_that_were_answered_twice_come_first_and_others_from_all_of_the_run() -> None:
    twice = [[(1, 10), (5, 50)], [(1, 11), (9, 90)], [(2, 20), (2, 21)]]
    once = [[(step, 100 + step)] for step in range(1, 10)]
    assert choose([*once, *twice], 2, 3) == [[11, 90], [10, 50], [101], [104], [109]]
    assert choose([], 2, 3) == []


def test_forgetting_before_the_last_skill_is_said_to_be_that() -> None:
    measured = [
        Measurement("sdft", 0, "tools", {"tools": 0.5}, 0.1),
        Measurement("sdft", 0, "triage", {"tools": 0.25}, 0.25),
        Measurement("sft", 0, "tools", {"tools": 0.5}, 0.75),
        Measurement("joint", 0, "all at once", {"tools": 0.5}, 0.5),
    ]
    tables = continual(Continual(["tools", "triage"], measured))["tables"]
    said = {table["method"]: (table["after"], table["forgetting"]["mean"]) for table in tables}
    assert said == {"sdft": (None, 0.25), "sft": ("tools", 0.75), "joint": (None, 0.5)}


def test_tables_of_several_runs() -> None:
    rows = beside([{"a": "1", "b": "2"}, {"b": "3", "a": "1", "c": "4"}])
    assert rows == [("a", ["1", "1"]), ("b", ["2", "3"]), ("c", ["", "4"])]
    assert [name for name, _ in beside([{"a": "1", "b": "2"}, {"c": "3"}], ["c", "b", "z"])] == ["c", "b", "a"]
    assert [name for name, _ in differing(rows)] == ["b", "c"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_run(Path(parent) / "run", steps=2) for parent in ("a", "b")]
    assert "<title>a/run, b/run: sdft report</title>" in page(folders)
    assert "<title>run: sdft report</title>" in page(folders[:1])


def test_durations() -> None:
    assert [duration(seconds) for seconds in (2.5, 299, 3600 * 2 + 60)] == ["2.5 s", "4 min 59 s", "2 h 01 min"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not what sdft continual writes: TypeError"),
        ('{"skills": [], "base": {}, "runs": []}', "is not what sdft continual writes: KeyError: 'accuracy'"),
        (
            '{"skills": ["x"], "base": {"accuracy": {"x": "y"}}, "runs": []}',
            "x after base is 'y'; it must be a number or null",
        ),
    ],
)
def test_a_wrong_continual_file_is_refused_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "continual.json").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_continual(tmp_path / "continual.json")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if installed() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    one, two = make_run(folder / "one"), make_run(folder / "two", ended=False)
    skills = make_continual(folder / "skills")
    written = {"one": [one], "several": [one, two], "skills": [skills]}
    for name, folders in written.items():
        (folder / f"{name}.html").write_text(page(folders), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["one", "several", "skills"])
def test_a_page_draws_itself_without_a_complaint_and_fits(
    name: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width, dark=dark)
    assert browser.problems == []
    assert browser.ask("document.documentElement.scrollWidth") == width, "nothing sticks out"
    plots = browser.ask("plots.length")
    assert plots == {"one": 11, "several": 12, "skills": 1}[name]
    assert browser.ask("plots.every((plot) => plot.chart.width > 200 && plot.canvas.getAttribute('aria-label'))")
    assert browser.ask("document.images.length") == 0, "texts of the run are texts"
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 384) == dark
    if name == "skills":
        cells = browser.ask("[...document.querySelectorAll('.heat td')].map((cell) => cell.textContent).join(' ')")
        assert [cell.strip() for cell in cells.split("%")] == ["0", "90", "100", "80", "0", "90", "100", "60", ""]


def test_tokens_say_what_both_models_held_likely_by_keyboard_too(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["one"])
    browser.ask("document.querySelector('.tokens span').focus()")
    detail = "document.getElementById('token')"
    assert "is not part of the loss" in browser.ask(f"{detail}.textContent")
    browser.press("ArrowRight")
    shown = browser.ask(f"{detail}.textContent")
    for part in ("“ <b>”", "divergence 0.100 nats", "60.7 %", "77.9 %", "other"):
        assert part in shown
    assert browser.ask("document.activeElement.getAttribute('aria-label')").startswith("“ <b>”: divergence 0.100 nats")
    box = browser.ask(f"(({{left, right, width}}) => [left, right, width])({detail}.getBoundingClientRect())")
    assert box[0] >= 0 and box[1] <= 1280 and box[2] > 100
    assert browser.ask("document.querySelectorAll('.tokens span[tabindex=\"0\"]').length") == browser.ask(
        "document.querySelectorAll('.tokens').length"
    ), "Tab goes from rollout to rollout"
    browser.press("Escape")
    assert browser.ask(f"{detail}.hidden")
    shades = browser.ask(
        "[...document.querySelectorAll('.tokens span')].slice(0, 3).map((t) => t.style.getPropertyValue('--d'))"
    )
    assert [float(shade) for shade in shades] == sorted(map(float, shades)) and float(shades[2]) > 0
