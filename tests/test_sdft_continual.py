"""`sdft continual`: the numbers by hand, and whole experiments with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.checkpoints.claim import alone_in
from sdft.cli import main
from sdft.commands import continual
from sdft.commands.stages import stages_of
from sdft.evaluation.continual import backward_transfer, distance, report_of_run, skills_forgotten
from sdft.evaluation.exam import Exam
from sdft.report.continual import read_continual
from sdft.report.run_folder import read_run
from sdft.report.what_ran import facts, headline
from sdft.settings.continual import fields_of_continual
from sdft.settings.continual import plan_of as settings_plan_of
from sdft.settings.recipe import read
from tests import tiny

MATRIX = [[0.8, 0.1, 0.0], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]]


def test_transfer_and_forgetting_are_those_of_their_papers() -> None:
    assert backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.8) + (0.6 - 0.7)) / 2)
    assert skills_forgotten(MATRIX) == pytest.approx(((0.9 - 0.5) + (0.7 - 0.6)) / 2)
    assert backward_transfer(MATRIX[:1]) is None and skills_forgotten(MATRIX[:1]) is None


def test_accuracy_before_a_skill_was_learned_is_not_forgotten() -> None:
    assert skills_forgotten([[0.5, 0.9], [0.5, 0.4]]) == 0


def test_skills_learned_at_once_have_no_transfer() -> None:
    stage = {"learned": ["a", "b"], "accuracy": {"a": 1.0, "b": 0.5}, "seconds": 2.0}
    run = report_of_run(["a", "b"], "joint", 0, [stage])
    assert (run["backward_transfer"], run["skills_forgotten"], run["seconds"]) == (None, None, 2.0)


def test_the_distance_of_weights() -> None:
    start, model = tiny.tiny_model(tied=True), tiny.tiny_model(tied=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :2] += torch.tensor([3.0, 4.0])
    moved, share = distance(model, start)
    length = sum(float(weight.detach().square().sum()) for weight in start.parameters()) ** 0.5
    assert moved == pytest.approx(5, rel=1e-5) and share == pytest.approx(5 / length, rel=1e-5)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A working recipe, written with changes."""
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {"model": tiny.saved(tmp_path / "model", tiny.tiny_model()), "skills": {}}
    for number, name in enumerate(("first", "second")):
        rows = [{**row, "prompt": f"{name} {row['prompt']}"} for row in tiny.rows(10)[number::2]]
        for part in ("train", "choose"):
            Path(f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings["skills"][name] = {"train_file": f"{name}_train.jsonl", "eval_file": f"{name}_choose.jsonl"}
    settings["skills"]["second"] |= {"scorer": "contains", "teacher_template": "turn"}
    Path("general.jsonl").write_text('{"prompt": "hello", "answer": "a"}\n{"prompt": "bye", "answer": "b"}\n')
    settings |= {
        "general_file": "general.jsonl",
        "output_dir": "out",
        "methods": {
            "sdft": {},
            "sft": {"method": "sft", "learning_rate": "1e-2"},
            "sft-joint": {"method": "sft", "joint": True},
        },
        "seeds": [0, 3],
        "teacher_template": "{demonstration} {prompt}",
        **dict.fromkeys(("max_completion_length", "eval_completion_length", "general_completion_length"), 4),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": "1e-3",
        "use_cpu": True,
        "save_strategy": "no",
    }

    def write(**changes: Any) -> str:
        Path("recipe.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        return "recipe.yaml"

    return write


def interrupted_after(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function after which Ctrl-C comes."""

    def interrupted(*given: Any, **rest: Any) -> None:
        run(*given, **rest)
        raise KeyboardInterrupt

    return interrupted


@pytest.mark.slow
def test_every_stage_is_run_once_and_reported(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, str, float, int, int]] = []
    templates: list[Any] = []
    run = continual.train

    def train(model: Any, lora: Any, rows: Any, config: Any, **rest: Any) -> int:
        numbers = config.learning_rate, config.max_steps, len(rows.train)
        trained.append((model.model, str(config.output_dir), *numbers))
        templates.append(config.teacher_template)
        return run(model, lora, rows, config, **rest)

    monkeypatch.setattr(continual, "train", train)
    noted: list[dict[str, Any]] = []
    made_with = continual.made_with
    monkeypatch.setattr(continual, "made_with", lambda: noted.append(made_with()) or noted[-1])
    assert main(["continual", recipe(seeds=[3])]) == 0
    base = str(Path("model").resolve())
    assert trained == [
        (base, "out/sdft/seed-3/stage-1-first", 1e-3, 1, 5),
        ("out/sdft/seed-3/stage-1-first", "out/sdft/seed-3/stage-2-second", 1e-3, 1, 5),
        (base, "out/sft/seed-3/stage-1-first", 1e-2, 1, 5),
        ("out/sft/seed-3/stage-1-first", "out/sft/seed-3/stage-2-second", 1e-2, 1, 5),
        (base, "out/sft-joint/seed-3/stage-1-all", 1e-3, 2, 10),
    ]
    assert templates[:2] == ["{demonstration} {prompt}", "turn"]
    report = json.loads(Path("out/continual.json").read_text())
    assert (report["skills"], report["general_prompts"]) == (["first", "second"], 2)
    assert report["base"]["teacher_accuracy"].keys() == report["base"]["accuracy"].keys() == {"first", "second"}
    runs = report["runs"]
    assert [(run["method"], run["seed"], len(run["stages"])) for run in runs] == [
        ("sdft", 3, 2),
        ("sft", 3, 2),
        ("sft-joint", 3, 1),
    ]
    for stage in (stage for run in runs for stage in run["stages"]):
        assert stage["forgetting"] > 0 and stage["weights_moved"] > 0 and stage["seconds"] > 0
    taught = [[sorted(stage.get("teacher_accuracy", {})) for stage in run["stages"]] for run in runs]
    assert taught == [[["second"], []], [[], []], [[]]]  # by the model that is to learn it from itself
    assert "sft-joint" in Path("out/report.html").read_text()
    shown = read_continual(Path("out/continual.json"))
    assert (shown.methods, shown.evaluated) == (["sdft", "sft", "sft-joint"], ["first", "second", "general"])
    before = ["base", "base as teacher"]
    assert [*shown.of("sft")] == [*before, "first", "second"] and [*shown.of("sft-joint")] == [*before, "all at once"]
    whole = read_run("out")
    assert headline(whole) == f"{base} learns first, second by sdft, sft, sft-joint"
    assert noted == [report["made_with"]], "as it began, not as each stage ended"
    assert facts(whole)["packages"].startswith("Python ") and whole.recipe["methods"].keys() == set(shown.methods)
    last = runs[1]["stages"][1]
    trained_model, start = (AutoModelForCausalLM.from_pretrained(each) for each in (last["folder"], "model"))
    assert last["weights_moved"] == pytest.approx(distance(trained_model, start)[0], rel=1e-5)

    # The resolved recipe is one. A call that is killed while it reads what is there leaves no report with less.
    with monkeypatch.context() as context:
        context.setattr(continual, "write_report", interrupted_after(continual.write_report))
        with pytest.raises(KeyboardInterrupt):
            continual.continual(plan_of("out/resolved_recipe.yaml"))
    again = json.loads(Path("out/continual.json").read_text())
    assert {**again, "made_with": None} == {**report, "made_with": None}

    trained.clear()
    Path("out/sft/seed-3/stage-2-second/summary.json").unlink()
    Path("out/sft/seed-3/stage-2-second/scores.json").unlink()
    assert main(["continual", recipe(seeds=[3])]) == 0
    assert [folder for _, folder, *_ in trained] == ["out/sft/seed-3/stage-2-second"]
    again = json.loads(Path("out/continual.json").read_text())["runs"]
    assert again[0] == runs[0] and again[1]["stages"][1]["accuracy"] == last["accuracy"]


@pytest.mark.slow
def test_rows_to_choose_by_are_told_apart_and_measured_where_they_come_later(recipe: Callable[..., str]) -> None:
    told = yaml.safe_load(Path(recipe(seeds=[3], methods={"sft": {"method": "sft"}})).read_text())
    assert main(["continual", "recipe.yaml"]) == 0
    before = json.loads(Path("out/continual.json").read_text())
    assert "choose_accuracy" not in before["base"]
    Path("others.jsonl").write_text('{"prompt": "say hi", "answer": "never said"}\n')
    told["skills"]["second"]["choose_file"] = "others.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    summary = Path("out/sft/seed-3/stage-2-second/summary.json")
    trained = summary.stat().st_mtime_ns
    assert main(["continual", "recipe.yaml"]) == 0
    after = json.loads(Path("out/continual.json").read_text())
    assert summary.stat().st_mtime_ns == trained
    for old, new in zip(
        (before["base"], *before["runs"][0]["stages"]), (after["base"], *after["runs"][0]["stages"]), strict=True
    ):
        assert new == {**old, "choose_accuracy": {"second": 0.0}}
    told["skills"]["second"]["choose_file"] = "nowhere.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    assert main(["continual", "recipe.yaml"]) == 2


SKILL = {"train_file": "first_train.jsonl", "eval_file": "first_choose.jsonl"}
SFT: dict[str, Any] = {"seeds": [3], "methods": {"sft": {"method": "sft"}}}
STAGES = [f"out/sft/seed-3/stage-{name}" for name in ("1-first", "2-second")]


def refused(recipe: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says as it refuses a recipe, in one line."""
    capsys.readouterr()
    assert main(["continual", recipe]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("sdft: ")
    return error


def test_a_stage_that_was_trained_in_another_way_is_refused(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["continual", recipe(**SFT)]) == 0
    before = json.loads(Path("out/continual.json").read_text())
    monkeypatch.setattr(continual, "load_model", None)
    for changes, said in (
        ({"learning_rate": "1e-2"}, "learning_rate 0.001, and the recipe has 0.01;"),
        ({"methods": {"sft": {"method": "sft", "max_steps": 2}}}, "max_steps 1, and the recipe has 2;"),
        ({"methods": {"sft": {}}}, "method 'sft', and the recipe has 'sdft';"),
        ({"chat_template_kwargs": {"thinks": True}}, "chat_template_kwargs None, and the recipe has {'thinks': True};"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last False, and the recipe has True;"),
    ):
        error = refused(recipe(**{**SFT, **changes}), capsys)
        assert f"output_dir has {STAGES[0]}, which was trained with {said}" in error
    rows = Path("first_train.jsonl").read_text()
    Path("first_train.jsonl").write_text(rows + rows.splitlines()[0] + "\n")
    error = refused(recipe(**SFT), capsys)
    assert f"{STAGES[0]}, which was trained on other rows than train_file of first has;" in error
    Path("first_train.jsonl").write_text(rows)
    other = tiny.saved(Path("other") / "model", tiny.tiny_model(seed=5))
    assert f"{STAGES[0]}, which was trained with model '" in refused(recipe(**SFT, model=other), capsys)
    Path("model").rename("first")
    tiny.saved(Path("model"), tiny.tiny_model(seed=7))
    error = refused(recipe(**SFT), capsys)
    assert f"{STAGES[0]}, which was trained from another model than {Path('model').resolve()} is by now (" in error
    shutil.rmtree("model")
    Path("first").rename("model")
    settings = Path("model/config.json").read_text()
    Path("model/config.json").write_text(settings.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.0'))
    assert Path("model/config.json").read_text() != settings
    assert "which was trained from another model than" in refused(recipe(**SFT), capsys)
    Path("model/config.json").write_text(settings)
    shutil.copytree("model", "same")

    # What decides nothing may change, or is only written in another way, and output_dir may be moved.
    same = {"logging_steps": 2, "max_forward_tokens": 500, "rollout_temperature": 0.5, "teacher": "base"}
    same |= {"methods": {"sft": {"method": "SFT"}}, "model": "same", "num_train_epochs": 3, "data_seed": 3}
    plan = plan_of(recipe(**{**SFT, **same, "teacher_template": "first"}))  # of which sft knows nothing
    continual.check_kept([[*stages_of(plan, plan.methods[0], 3)]])
    Path("out").rename("moved")
    assert main(["continual", recipe(**{**SFT, **same}, output_dir="moved")]) == 0
    moved = json.loads(Path("moved/continual.json").read_text())
    for stage, old in zip(moved["runs"][0]["stages"], before["runs"][0]["stages"], strict=True):
        assert stage == {**old, "folder": old["folder"].replace("out", "moved", 1)}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["before", "after"])
def test_stages_after_one_that_is_trained_anew_are_too(
    recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    """Even where the command was killed between the two, and the first one learns in another way."""
    assert main(["continual", recipe(**SFT)]) == 0
    (Path(STAGES[0]) / "summary.json").unlink()
    with monkeypatch.context() as context:
        run = continual.train

        def killed(*given: Any, **rest: Any) -> int:
            if stopped == "after":
                run(*given, **rest)
            raise KeyboardInterrupt

        context.setattr(continual, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            continual.continual(plan_of(recipe(**SFT, learning_rate="1e-2")))
    trained: list[str] = []

    def train(model: Any, lora: Any, rows: Any, config: Any, **rest: Any) -> int:
        trained.append(str(config.output_dir))
        return run(model, lora, rows, config, **rest)

    monkeypatch.setattr(continual, "train", train)
    assert main(["continual", recipe(**SFT, learning_rate="1e-2")]) == 0
    assert trained == STAGES[stopped == "after" :]


def plan_of(path: str) -> Any:
    fields = fields_of_continual()
    return settings_plan_of(read([path], fields, command="sdft continual"), fields)


def test_files_that_are_no_longer_whole_are_refused(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["continual", recipe(**SFT)]) == 0
    stage = STAGES[0]
    for name, remove, texts in (
        (f"{stage}/summary.json", stage, ("", "{}", "[]", "{")),
        (f"{stage}/resolved_recipe.yaml", stage, ("", "a: [b", "- 1")),
        (f"{stage}/stage.json", stage, ("", "{}")),
        (f"{stage}/scores.json", f"{stage}/scores.json", ("", "[]")),
        ("out/base.json", "out/base.json", ("", "3")),
    ):
        whole = Path(name).read_text()
        for text in texts:
            Path(name).write_text(text)
            said = refused(recipe(**SFT), capsys)
            assert f"{name} is not as this command left it; {remove} must be removed" in said
        Path(name).write_text(whole)
    assert main(["continual", recipe(**SFT)]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "longer.jsonl, row 2: the prompt has"),
        ({"max_completion_length": 200}, "and with 200 more for the completion it is longer than"),
    ],
)
def test_what_only_the_model_can_tell_is_said_before_anything_is_measured(
    recipe: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    """Of a later skill's rows and of the last method too."""
    told = yaml.safe_load(Path(recipe(**SFT)).read_text())
    long = [{**row, "prompt": row["prompt"] * (1 + 5000 * number)} for number, row in enumerate(tiny.rows(2))]
    Path("longer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    if changes:
        told["methods"]["last"] = {"method": "sdft", **changes}
    else:
        told["skills"]["second"]["train_file"] = "longer.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    monkeypatch.setattr(continual, "Measure", None)
    assert said in refused("recipe.yaml", capsys)
    assert not Path("out").exists()


@pytest.mark.slow
def test_what_a_stage_is_taught_by_is_said_and_measured_by_its_template(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that has learned a skill may no longer follow the demonstrations of the next one."""
    assert main(["continual", recipe(methods={"sdft": {}}, seeds=[3])]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if ", held out: " in line]
    first = Path("out/sdft/seed-3/stage-1-first")
    scores = json.loads((first / "scores.json").read_text())
    share = scores["teacher_accuracy"]["second"]
    assert share > 0 and scores["teacher_accuracy"] == {"second": share}
    exam = (
        "--eval_file second_choose.jsonl --scorer contains --teacher --teacher_template turn --eval_completion_length 4"
    )
    assert main(["eval", "--model", str(first), "--summary_file", "teacher.json", *exam.split()]) == 0
    assert json.loads(Path("teacher.json").read_text())["accuracy_by_template"] == {"turn": share}
    del scores["teacher_accuracy"]  # as an earlier version left it
    (first / "scores.json").write_text(json.dumps(scores))
    assert main(["continual", recipe(methods={"sdft": {}}, seeds=[3])]) == 0
    assert json.loads((first / "scores.json").read_text())["teacher_accuracy"] == {"second": share}

    nothing = "; it has nothing to teach, unless by another teacher_template"
    assert [nothing in line for line in said] == [True, False]
    plan = plan_of(recipe())
    stage = next(stages_of(plan, plan.methods[0], 3))
    before = {"accuracy": {"first": 0.25, "second": 0.0}, "teacher_accuracy": {"first": 0.5}}
    assert [*continual.what_teaches(stage, before)] == [
        "first, held out: the model answers 50.0% as its own teacher, 25.0% alone"
    ]
    for settings in ({"method": "sft"}, {"feedback": "sdpo"}):
        plan = plan_of(recipe(methods={"other": settings}))
        assert not [*continual.what_teaches(next(stages_of(plan, plan.methods[0], 3)), before)]


def test_a_teacher_without_demonstrations_to_be_measured_with_is_not_spoken_of(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = yaml.safe_load(Path(recipe(methods={"sdft": {}}, seeds=[3])).read_text())
    rows = [{name: row[name] for name in ("prompt", "answer")} for row in tiny.rows(2)]
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told["skills"] = {"first": {**told["skills"]["first"], "eval_file": "held_out.jsonl"}}
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    assert main(["continual", "recipe.yaml"]) == 0
    said = capsys.readouterr().out
    assert "held out: " not in said
    assert "first: eval_file has rows without a demonstration, so that no teacher is measured" in said
    assert json.loads(Path("out/base.json").read_text())["teacher_accuracy"] == {}


def test_the_table_names_skills_in_any_order(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(recipe())
    base = {"accuracy": {"second": 0.25, "first": 0.5}, "general_accuracy": 1.0}
    stage = {"accuracy": {"second": 0.75, "first": 1.0}, "general_accuracy": 0.0, "forgetting": 0.1}
    runs = [{"method": "sft", "seed": 3, "stages": [{**stage, "weights_moved": 2.0}]}]
    lines = [line.split() for line in continual.table(plan, base, runs).splitlines()]
    assert lines[0][:2] == ["first", "second"] and lines[1] == ["prompts", "5", "5", "2"]
    assert lines[2][1:3] == ["50.0%", "25.0%"] and lines[3][3:5] == ["100.0%", "75.0%"] and len(lines) == 4
    other = {"accuracy": {"second": 0.25, "first": 0.5}, "general_accuracy": 1.0, "forgetting": None}
    further = {**runs[0], "seed": 4, "stages": [{**other, "weights_moved": 4.0}]}
    lines = [line.split() for line in continual.table(plan, base, [*runs, further]).splitlines()]
    assert lines[-1] == ["sft,", "mean", "of", "2", "75.0%", "50.0%", "50.0%", "3.000"], "nats of one alone are no mean"
    longer = {**runs[0], "seed": 4, "stages": [stage, {**other, "weights_moved": 4.0}]}
    lines = [line.split() for line in continual.table(plan, base, [*runs, longer]).splitlines()]
    assert lines[-1][:3] == ["sft,", "seed", "4"], "runs that did not come as far are no part of a mean"


@pytest.mark.slow
def test_other_rows_to_be_measured_on_are_measured(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["continual", recipe(**SFT)]) == 0
    summary = Path("out/sft/seed-3/stage-2-second/summary.json")
    trained = summary.stat().st_mtime_ns
    before = json.loads(Path("out/continual.json").read_text())
    Path("general.jsonl").write_text('{"prompt": "good day", "answer": "never said"}\n')
    capsys.readouterr()
    assert main(["continual", recipe(**SFT)]) == 0
    again = [line for line in capsys.readouterr().out.splitlines() if " is measured again: " in line]
    assert [line.partition(" ")[0] for line in again] == [
        f"{place}.json" for place in ("out/base", *(f"{stage}/scores" for stage in STAGES))
    ]
    after = json.loads(Path("out/continual.json").read_text())
    assert summary.stat().st_mtime_ns == trained
    assert (before["general_prompts"], after["general_prompts"]) == (2, 1)
    for old, new in zip(before["runs"][0]["stages"], after["runs"][0]["stages"], strict=True):
        assert new["forgetting"] != old["forgetting"] and new["weights_moved"] == old["weights_moved"]


def test_a_stage_that_was_stopped_ends_the_command(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for code, ends in ((130, 130), (0, 143)):  # SIGTERM is no failure of sdft train
        monkeypatch.setattr(continual, "train", lambda *_, code=code, **__: code)
        assert main(["continual", recipe()]) == ends
    assert not Path("out/continual.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skills": {}}, "skills is not set"),
        ({"skills": {"a": 3}}, ": skills has a: 3; it must be a mapping of train_file, eval_file, choose_file,"),
        ({"skills": {"a": {"train_file": "first_train.jsonl"}}}, "skills.a: eval_file is not set; it must name a file"),
        ({"skills": {"a": {**SKILL, "chose_file": "b"}}}, "skills.a has 'chose_file'; it may have train_file, eval_"),
        ({"skills": {"a": {**SKILL, "scorer": 3}}}, "skills.a: scorer is 3; it must be a text"),
        ({"skills": {"a/b": {}}}, "skills has 'a/b'; a name must be"),
        ({"methods": {"sft": 3}}, "methods has sft: 3; it must be a mapping"),
        ({"methods": {"sft": {"seed": 3}}}, "methods.sft has 'seed'"),
        (
            {"methods": {"sft": {"lerning_rate": 3}}},
            "methods.sft has 'lerning_rate'; it may have joint, and settings of",
        ),
        ({"methods": {"sft": {"lerning_rate": 3}}}, "; did you mean 'learning_rate'?"),
        ({"methods": {"sft": {"method": "stf"}}}, "sdft: recipe.yaml, line 7: methods.sft: method is 'stf'"),
        ({"methods": {"sft": {"joint": "maybe"}}}, "methods.sft: joint is 'maybe'"),
        ({"methods": {"all": {"joint": True}}}, "methods.all: joint is True, and"),
        *(
            ({"methods": {"sft": {name: value}}}, f"methods.sft has '{name}'")
            for name, value in (("lora_rank", 8), ("eval_file", "a"), ("scorer", "json"), ("eval_completion_length", 3))
        ),
        *(
            ({"methods": {name: {}}}, f"methods has '{name}'; a name must be another")
            for name in ("base.json", "run.json", "checkpoint-3")
        ),
        ({"methods": {"sft": {1: 2}}}, "methods.sft has 1; it may have joint"),
        ({"methods": {"sft": {"chat_template_kwargs": {"thinks": True}}}}, "methods.sft has 'chat_template_kwargs'"),
        ({"methods": {"sft": {"learning_rate": "fast"}}}, "methods.sft: learning_rate is 'fast'"),
        ({"methods": {"own": {"teacher": "model"}}}, "methods.own: teacher is 'model'; no other model may teach"),
        ({"skills": {"general": SKILL}}, "skills has 'general'; a name must be another"),
        ({"skills": {"base": SKILL}}, "skills has 'base'; a name must be another"),
        ({"skills": {"a": {**SKILL, "scorer": "near"}}}, "skills.a: scorer is 'near'"),
        ({"skills": {"a": {**SKILL, "teacher_template": "{prompt}"}}}, "skills.a: teacher_template is '{prompt}'"),
        ({"seed": 7}, "seed is 7; it must not be set, for seeds"),
        ({"overwrite_output_dir": True}, "overwrite_output_dir is True; it must not be set"),
        ({"eval_strategy": "steps"}, "eval_strategy is 'steps'; it must not be set"),
        ({"resume_from_checkpoint": "last"}, "resume_from_checkpoint is 'last'; it must not be set"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]; each must be there once"),
        ({"seeds": ["x"]}, "seeds is 'x'"),
        *(
            ({"methods": {"sft": {"method": "sft", "optim": name}}}, f"methods.sft: optim is '{name}', which needs")
            for name, package in (("adamw_torch_8bit", "torchao"), ("lion_8bit", "bitsandbytes"))
            if importlib.util.find_spec(package) is None
        ),
        ({"seeds": "nope"}, "seeds is 'nope'; it must be a list of whole numbers"),
        ({"eval_file": "first_choose.jsonl"}, "eval_file is 'first_choose.jsonl'"),
        ({"lora_rank": 4}, "lora_rank is 4"),
        ({"general_file": "none.jsonl"}, "general_file is 'none.jsonl'"),
    ],
)
def test_a_mistake_is_one_sentence(
    recipe: Callable[..., str], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["continual", recipe(**changes)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_what_does_nothing_and_what_is_not_measured_is_said(recipe: Callable[..., str]) -> None:
    """Of what all methods share, what one of them knows nothing of is no mistake."""
    methods = {"sdft": {"learning_rate": "1e-3"}, "sft": {"method": "sft", "learning_rate": "1e-4"}}
    plan = plan_of(recipe(methods=methods, divergence="forward_kl", general_file=None))
    assert [*continual.notices(plan)] == [
        "learning_rate is 0.001 and does nothing: each of methods has its own",
        "general_file is not set: what the model forgets beside the skills is not measured",
    ]
    stages = [next(stages_of(plan, method, 0)) for method in plan.methods]
    assert [stage.given.values.get("divergence") for stage in stages] == ["forward_kl", None]
    alone = plan_of(recipe(methods={"sft": {"method": "sft"}}, divergence="forward_kl"))
    assert [*continual.notices(alone)] == [
        "divergence is 'forward_kl' and does nothing beside the settings of any of methods",
    ]
    both = plan_of(
        recipe(methods={"sdft": {"dtype": "float32"}, "sft": {"method": "sft", "dtype": "float32"}}, beta=0.3)
    )
    assert [
        *continual.notices(replace(both, given=replace(both.given, values={**both.given.values, "dtype": "auto"})))
    ] == ["beta is 0.3 and does nothing beside the settings of any of methods"], (
        "and dtype is what the models are measured in"
    )
    own = plan_of(recipe(methods={"sft": {"method": "sft", "divergence": "forward_kl"}}))
    assert next(stages_of(own, own.methods[0], 0)).given.values["divergence"] == "forward_kl"


def test_prompts_that_are_trained_on_and_measured_are_counted(
    recipe: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    told = yaml.safe_load(Path(recipe()).read_text())
    for name in ("first", "second"):
        rows = Path(f"{name}_choose.jsonl").read_text().splitlines(keepends=True)
        Path(f"{name}_held.jsonl").write_text(rows[0].replace(name, "another") + rows[1])
        told["skills"][name]["eval_file"] = f"{name}_held.jsonl"
    Path("recipe.yaml").write_text(yaml.safe_dump(told))
    Path("general.jsonl").write_text(Path("second_held.jsonl").read_text())
    plan = plan_of("recipe.yaml")
    assert "1 of the 2 prompts of general_file are in train_file too, general.jsonl, row 2 " in caplog.text
    assert len(plan.skills) == 2
    said = "are in train_file too, first_held.jsonl, row 2 the first: the accuracy there says nothing of others"
    assert f"1 of the 2 prompts of eval_file {said}" in caplog.messages


def test_a_name_that_is_there_twice_is_refused(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """YAML would keep the second, and say nothing of the first."""
    text = Path(recipe(methods={})).read_text()
    for methods in ("{sft: {method: sft}, sft: {method: sdft}}", "{sft: {method: sft, max_steps: 1, max_steps: 2}}"):
        Path("recipe.yaml").write_text(text.replace("methods: {}", f"methods: {methods}"))
        assert "is set twice; line" in refused("recipe.yaml", capsys)


def test_several_processes_are_refused(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "was started as 2 processes; it must be one" in refused(recipe(), capsys)


def test_a_folder_is_for_one_command_at_a_time(recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with alone_in("out"):
        assert "where another run is under way (process" in refused(recipe(), capsys)
    assert not Path("out").exists()
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text('{"step": 1}\n')
    said = refused(recipe(), capsys)
    assert "output_dir is 'out', which holds a run of sdft train (metrics.jsonl); it must be another folder" in said
    assert [path.name for path in Path("out").iterdir()] == ["metrics.jsonl"]
    Path("out/run.json").write_text('{"run": "a"}')
    assert "which holds a run of sdft train" in refused(recipe(), capsys)
    assert Path("out/run.json").read_text() == '{"run": "a"}'
    with alone_in("own"):
        Path("own/report.html").write_text("of a call before")
        assert json.loads(Path("own/run.json").read_text()).keys() == {"process", "host"}
    assert [path.name for path in Path("own").iterdir()] == ["report.html"]


def test_a_skill_without_a_scorer_has_the_recipes(recipe: Callable[..., str]) -> None:
    skills = plan_of(recipe(scorer="contains", skills={"a": SKILL, "b": {**SKILL, "scorer": "exact"}})).skills
    assert [skill.settings.scorer for skill in skills] == ["contains", "exact"]


def test_scores_are_of_a_model_and_of_all_that_they_are_made_by(recipe: Callable[..., str]) -> None:
    Path("own.py").write_text("def right(text, answer): return True\n")
    skills = {"a": {**SKILL, "scorer": "own:right"}}
    told: dict[str, Any] = {**SFT, "skills": skills}
    assert main(["continual", recipe(**told)]) == 0
    stage = next(stages_of(plan := plan_of("recipe.yaml"), plan.methods[0], 3))
    kept = continual.Measure(plan)
    assert kept.known_of(stage, None) is not None
    assert continual.Measure(plan_of(recipe(**told, dtype="bfloat16"))).made_by != kept.made_by
    Path("own.py").write_text("def right(text, answer): return False\n")
    edited = continual.Measure(plan_of(recipe(**told)))
    assert edited.made_by != kept.made_by and edited.known_of(stage, None) is None
    Path("own.py").write_text("def right(text, answer): return True\n")
    assert continual.Measure(plan_of(recipe(**told))).known_of(stage, None) is not None
    tiny.saved(stage.folder, tiny.tiny_model(seed=9))
    assert kept.known_of(stage, None) is None


def test_a_stage_whose_own_functions_have_changed_is_refused(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import torch\n\ndef mine(**given): return torch.ones_like(given['labels'], dtype=torch.float32)\n"
    Path("weighting_of_test.py").write_text(code)
    told = {"seeds": [3], "methods": {"sdft": {"token_weighting": "weighting_of_test:mine"}}, "skills": {"a": SKILL}}
    plan = plan_of(recipe(**told))
    stage = next(stages_of(plan, plan.methods[0], 3))
    stage.begin()
    (stage.folder / "resolved_recipe.yaml").write_text(stage.recipe)
    (stage.folder / "summary.json").write_text('{"steps": 1, "loss_last": 0.5, "training_seconds": 1.0}')
    stage.check()
    Path("weighting_of_test.py").write_text(code + "\n# another\n")
    said = refused("recipe.yaml", capsys)
    assert "was trained with another token_weighting: the file of weighting_of_test:mine has changed; that" in said


def test_general_prompts_that_do_not_fit_are_refused_before_anything_is_answered(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("general.jsonl").write_text(json.dumps({"prompt": "hello " * 3000, "answer": "a"}) + "\n")
    monkeypatch.setattr(Exam, "held_out", None)
    assert "general.jsonl, row 1: the prompt has" in refused(recipe(**SFT), capsys)
    assert not Path("out").exists()


def test_all_stages_that_cannot_be_kept_are_named_at_once(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"seeds": [3, 4], "methods": {"sft": {"method": "sft"}}, "skills": {"a": SKILL}}
    plan = plan_of(recipe(**told))
    for seed in plan.seeds:
        stage = next(stages_of(plan, plan.methods[0], seed))
        stage.begin()
        (stage.folder / "resolved_recipe.yaml").write_text(stage.recipe)
        (stage.folder / "summary.json").write_text('{"steps": 1, "loss_last": 0.5, "training_seconds": 1.0}')
    said = refused(recipe(**told, max_steps=2), capsys)
    assert "output_dir has out/sft/seed-3/stage-1-a, which was trained with max_steps 1, and" in said
    assert said.endswith("or output_dir be another; out/sft/seed-4/stage-1-a cannot be kept either\n")


def test_a_home_folder_is_one_folder(recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer expands it, and the command looks for stages where the Trainer leaves them."""
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    plan = plan_of(recipe(output_dir="~/out"))
    stage = next(stages_of(plan, plan.methods[0], 0))
    assert stage.folder == Path.cwd() / "home/out/sdft/seed-0/stage-1-first"


def test_what_is_to_be_trained_anew_is_checked_with_the_model(
    recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that is there, too, where one before it is not."""
    plan = plan_of(recipe(**SFT))
    run = continual.Run("sft", 3, [*stages_of(plan, plan.methods[0], 3)])
    run.stages[1].folder.mkdir(parents=True)
    (run.stages[1].folder / "summary.json").write_text("{}")
    checked: list[Any] = []
    monkeypatch.setattr(continual, "trainer_of", lambda *given: checked.append(given[4].output_dir))
    monkeypatch.setattr(continual, "load_model", lambda *_, **__: (None, None))
    continual.check_with_model(plan, [run])
    assert len(checked) == 2


def test_a_run_that_diverges_is_said_and_the_others_go_on(
    recipe: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {
        "nan": {"method": "sft", "learning_rate": "1e30", "max_steps": 3, "max_grad_norm": 1e30},
        "late": {"method": "sft", "learning_rate": "1e30", "max_grad_norm": 1e30},
        "sft": {"method": "sft"},
    }
    told = {"seeds": [3], "methods": methods, "skills": {"a": SKILL}}
    for _ in range(2):
        assert main(["continual", recipe(**told)]) == 1
        given = capsys.readouterr()
        assert "out/nan/seed-3/stage-1-a/: nan, seed 3, ends here: the loss is" in given.out
        assert given.err.splitlines()[-1] == "sdft: 1 run of 3 came to no end, as is said above"
        runs = json.loads(Path("out/continual.json").read_text(), parse_constant=pytest.fail)["runs"]
        assert [run["method"] for run in runs] == ["late", "sft"]
        assert runs[0]["stages"][0]["forgetting"] is None and runs[1]["stages"][0]["forgetting"] > 0
        assert "sft" in Path("out/report.html").read_text()
    told["methods"] = {"nan": methods["nan"]}
    assert main(["continual", recipe(**told, output_dir="none")]) == 1
    assert json.loads(Path("none/continual.json").read_text())["runs"] == []
