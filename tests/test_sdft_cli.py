"""The command: what it leaves behind when it works, and the one line and the exit code when it does not."""

import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.cli import main
from sdft.data import load_rows
from sdft.evaluation.exam import Answers, answer
from sdft.evaluation.report import Summary, describe, loss_ends, table
from sdft.templates import TEMPLATES
from sdft.trainer import SDFTTrainer
from tests import tiny
from tests.waiting import patience


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_model().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model_folder, monkeypatch):
    """A working recipe, and a function that writes it with changes."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "heldout", "general"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    settings = {
        "model": str(model_folder),
        "train_file": "train.jsonl",
        "eval_file": "heldout.jsonl",
        "general_file": "general.jsonl",
        "output_dir": "out",
        "teacher_template": "turn",
        "max_completion_length": 5,
        "eval_completion_length": 5,
        "general_completion_length": 5,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": "1e-3",
        "use_cpu": True,
        "save_strategy": "no",
    }

    def write(**changes):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        return "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("command", "platform", "given", "left"),
    [
        ("train", "linux", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("train", "linux", {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ("train", "linux", {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ("train", "win32", {}, {}),
        ("eval", "linux", {}, {}),
    ],
)
def test_training_lets_cudas_segments_grow_unless_the_user_has_said_otherwise(
    command, platform, given, left, monkeypatch, capsys
):
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(sys, "platform", platform)
    assert main([command, "--help"]) == 0
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == left


def test_a_run_leaves_the_model_the_metrics_the_summary_and_the_curves(recipe, model_folder, tmp_path, capsys):
    assert main(["train", recipe(), "--output_dir", "elsewhere"]) == 0
    out = tmp_path / "elsewhere"
    printed = capsys.readouterr().out
    for line in ("held-out prompts answered exactly (8)", "divergence from the base model", "training loss"):
        assert line in printed
    summary = json.loads((out / "summary.json").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    assert [entry["step"] for entry in metrics if "loss" in entry] == [1, 2, 3, 4]
    assert summary["steps"] == 4
    assert (summary["loss_first"], summary["loss_last"]) == (losses[0], losses[-1])
    assert summary["held_out_prompts"] == summary["general_prompts"] == 8
    assert summary["forgetting"] > 0
    for name in ("accuracy_before", "accuracy_after", "accuracy_teacher"):
        assert 0 <= summary[name] <= 1
    for name in ("rollout", "score", "learn", "save", "eval"):
        assert 0 < summary[f"{name}_seconds"] < summary["total_seconds"]
    for name in ("tokens_per_second", "rollout_tokens_per_second", "peak_memory_mib"):
        assert summary[name] > 0
    assert yaml.safe_load((out / "resolved_recipe.yaml").read_text())["output_dir"] == "elsewhere"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    trained, base = (AutoModelForCausalLM.from_pretrained(f) for f in (out, str(model_folder)))
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    assert not (tmp_path / "out").exists()


def test_a_resumed_command_ends_as_the_uninterrupted_one(recipe, tmp_path, capsys):
    assert main(["train", recipe(save_strategy="steps", save_steps=2), "--output_dir", "a"]) == 0
    os.rename("a/model.safetensors", "a/straight.safetensors")
    os.rename("a/checkpoint-4", "moved-away")
    capsys.readouterr()
    assert main(["train", "recipe.yaml", "--output_dir", "a", "--resume_from_checkpoint", "last"]) == 0
    assert capsys.readouterr().out.startswith(f"going on from {tmp_path}/a/checkpoint-2, after step 2 of 4\n")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "a/straight.safetensors").read_bytes()
    steps = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("steps", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_resuming_a_complete_run_leaves_everything_as_it_is(steps, recipe, capsys, monkeypatch):
    assert main(["train", recipe(save_strategy="steps", save_steps=1, **steps)]) == 0
    before = contents("out")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(
            "sdft.evaluation.exam.answer", lambda *args, **kwargs: pytest.fail("the model was asked something")
        )
        assert main(["train", "recipe.yaml", "--resume_from_checkpoint", "last"]) == 0
    assert contents("out") == before
    count = 3 if steps["max_steps"] == 3 else 4
    assert capsys.readouterr().out == f"the run is complete, with {count} steps: out/ is left as it is\n"
    assert main(["train", "recipe.yaml", "--resume_from_checkpoint", "last", "--max_steps", "5"]) == 0
    assert contents("out") != before


def test_a_run_whose_last_step_was_done_is_brought_to_its_end(recipe):
    """Killed after its last checkpoint, before its model and its report."""
    assert main(["train", recipe(save_strategy="steps", save_steps=2)]) == 0
    model, summary = Path("out/model.safetensors"), Path("out/summary.json")
    expected, measured = model.read_bytes(), json.loads(summary.read_text())
    for lost in (model, summary):
        lost.unlink()
    assert main(["train", "recipe.yaml", "--resume_from_checkpoint", "last"]) == 0
    assert model.read_bytes() == expected
    again = json.loads(summary.read_text())
    for name in ("steps", "loss_first", "loss_last", "accuracy_after", "forgetting"):
        assert again[name] == measured[name]


def test_the_last_checkpoint_goes_once_the_model_is_there_unless_it_was_asked_for(recipe, capsys):
    assert main(["train", recipe(save_strategy="steps", save_steps=3)]) == 0
    assert [name for name in sorted(os.listdir("out")) if "checkpoint" in name] == ["checkpoint-3"]
    printed = capsys.readouterr().out.splitlines()[-1]
    sizes = {path: len(data) / 2**20 for path, data in contents("out").items()}
    kept = sum(size for path, size in sizes.items() if path.parent.name == "checkpoint-3")
    assert printed == (
        "out/ has the trained model, resolved_recipe.yaml, metrics.jsonl, summary.json, curves.png and report.html "
        f"({sum(sizes.values()) - kept:.0f} MiB), and to go on from checkpoint-3 ({kept:.0f} MiB)"
    )
    before = contents("out")
    resume = ["train", "recipe.yaml", "--resume_from_checkpoint", "last"]
    assert main(resume) == 0
    assert capsys.readouterr().out == "the run is complete, with 4 steps: out/ is left as it is\n"
    assert contents("out") == before
    assert main([*resume, "--max_steps", "6"]) == 0  # from checkpoint-3
    assert sorted(name for name in os.listdir("out") if "checkpoint" in name) == ["checkpoint-3", "checkpoint-6"]


def test_a_complete_run_that_kept_no_checkpoint_is_known_to_be_complete(recipe, capsys):
    assert main(["train", recipe(save_strategy="steps", max_steps=3)]) == 0
    assert not [name for name in os.listdir("out") if "checkpoint" in name]
    before = contents("out")
    resume = ["train", "recipe.yaml", "--resume_from_checkpoint", "last"]
    capsys.readouterr()
    assert main(resume) == 0
    assert capsys.readouterr().out == "the run is complete, with 3 steps: out/ is left as it is\n"
    message = fails(capsys, [*resume, "--max_steps", "5"], 2)
    assert "the run in out ended after 3 of what are now 5 steps and left no checkpoint" in message
    assert contents("out") == before


def test_evaluation_during_training_is_in_the_metrics(recipe, tmp_path):
    assert main(["train", recipe(eval_strategy="steps", eval_steps=2, scorer="contains")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    evaluated = [entry for entry in metrics if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert evaluated[-1]["eval_accuracy"] == summary["accuracy_after"]
    assert evaluated[-1]["eval_forgetting"] == pytest.approx(summary["forgetting"], rel=1e-6)
    assert summary["scorer"] == "contains"


def test_the_best_model_by_what_it_forgot_is_kept(recipe, tmp_path):
    """It forgets more with every step, so that is the first."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "forgetting"}
    assert main(["train", recipe(**steps, **best, learning_rate="1e-2", lr_scheduler_type="constant")]) == 0
    state = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    first, kept = (tmp_path / "out" / name / "model.safetensors" for name in ("checkpoint-1", "."))
    assert first.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("options", [["--method", "sft"], ["--teacher", "ema"]], ids=" ".join)
def test_other_methods_run_too(options, recipe, tmp_path):
    assert main(["train", recipe(max_steps=1), *options]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["forgetting"] > 0


def test_without_held_out_files_only_the_loss_is_reported(recipe, tmp_path, capsys):
    assert main(["train", recipe(max_steps=1, eval_file=None, general_file=None)]) == 0
    printed = capsys.readouterr().out
    assert "training loss" in printed
    assert "held-out" not in printed
    assert (tmp_path / "out/curves.png").exists()


def test_eval_scores_a_model_its_teachers_and_its_divergence(recipe, model_folder, capsys, tmp_path):
    other = tmp_path / "other"
    tiny.tiny_model(1).save_pretrained(other)
    tiny.tiny_tokenizer().save_pretrained(other)
    assert main(["eval", recipe(), "--model", str(other), "--teacher"]) == 0
    lines = capsys.readouterr().out.split("8 wrong answers of the model itself, the first 3:")[0].splitlines()
    assert [line.split(":")[0].split(" (")[0] for line in lines] == [
        "held-out prompts answered exactly",
        "the same, shown the demonstration under teacher_template",
        *(f"  {name.ljust(max(map(len, TEMPLATES)))}    0.0%" for name in TEMPLATES),
        "general prompts answered",
        "forgetting",
    ]
    assert float(lines[-1].split(": ")[-1].split()[0]) > 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--teacher_template", "turn"], ["turn"]),
        (["--teacher_template", "{demonstration} {prompt}"], [*TEMPLATES, "your own"]),
        (["--teacher_template", '[{"role": "user", "content": "{prompt}{demonstration}"}]'], [*TEMPLATES, "your own"]),
    ],
    ids=str,
)
def test_the_teacher_is_measured_under_the_templates_asked_for(options, expected, recipe, capsys, monkeypatch):
    asked = []

    def one_is_right(model, tokenizer, rows, *, template, **_):
        asked.append(template)
        return Answers([], [], [""] * 8, [template == TEMPLATES["turn"], False] * 4, [True] * 8)

    monkeypatch.setattr("sdft.evaluation.exam.answer", one_is_right)
    assert main(["eval", recipe(general_file=None), "--teacher", *options]) == 0
    printed = capsys.readouterr().out.split("8 wrong answers")[0]
    rows = [line.split() for line in printed.splitlines() if line.startswith("  ")]
    assert [(" ".join(name), share) for *name, share in rows] == [
        (name, "50.0%" if name == "turn" else "0.0%") for name in expected
    ]
    assert asked[0] is None and len(asked) == 1 + len(expected)


def test_eval_takes_a_recipe_that_names_its_teacher(recipe, capsys):
    assert main(["eval", recipe(teacher="ema")]) == 0
    printed = capsys.readouterr().out
    assert "held-out prompts answered exactly" in printed
    assert "shown the demonstration" not in printed


def test_eval_of_prompts_without_answers_takes_a_base_model(recipe, model_folder, tmp_path, capsys):
    recipe()
    (tmp_path / "unanswered.jsonl").write_text('{"prompt": "a"}\n')
    command = ["eval", "--model", str(model_folder), "--general_file", "unanswered.jsonl"]
    for same in ([], ["--base_model", str(model_folder)]):
        message = fails(capsys, [*command, *same], 2)
        assert "general_file is 'unanswered.jsonl', whose rows have no answer, and base_model is" in message
    tiny.tiny_model(1).save_pretrained(tmp_path / "other")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert main([*command, "--base_model", str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out.startswith("forgetting: ")
    scored = [*command, "--eval_file", "heldout.jsonl"]
    assert "whose rows have no answer, and base_model is None" in fails(capsys, scored, 2)
    assert main([*scored[:-2], "--general_file", "general.jsonl"]) == 0
    assert "forgetting was not measured: base_model is not set" in capsys.readouterr().out


def test_eval_scores_by_the_scorer_named_and_samples_where_told(recipe, model_folder, tmp_path, capsys):
    rows = [{"prompt": f"say {n}", "answer": answer} for n, answer in enumerate(['{"a": 1}', '{"b": 2}'])]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "--model", str(model_folder), "--eval_file", "calls.jsonl", "--eval_completion_length", "5"]
    assert main([*command, "--scorer", "json", "--eval_temperature", "0.5", "--eval_samples", "3"]) == 0
    assert capsys.readouterr().out.startswith(
        "held-out prompts answered with the right JSON (2): 0.0%\n6 wrong answers"
    )
    assert "it must be the letter of a choice" in fails(capsys, [*command, "--scorer", "choice"], 2)


def test_eval_leaves_every_answer_the_numbers_and_three_wrong_answers(recipe, model_folder, tmp_path, capsys):
    rows = load_rows(tiny.rows(4))
    made = answer(tiny.tiny_model(), tiny.tiny_tokenizer(), rows, max_new_tokens=5, batch_size=4)
    right, ended = made.texts[0], [completion[-1] == 1 for completion in made.completions]
    asked = [{**row, "answer": right.strip() if n == 0 else f"ö{n}"} for n, row in enumerate(tiny.rows(4))]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    other = tmp_path / "other"
    tiny.tiny_model(1).save_pretrained(other)
    tiny.tiny_tokenizer().save_pretrained(other)
    files = ["--output_file", "answers.jsonl", "--summary_file", "scores.json"]
    sizes = ["--per_device_eval_batch_size", "2", "--base_model", str(other)]
    assert main(["eval", recipe(), "--teacher", "--teacher_template", "turn", *sizes, *files]) == 0
    printed = capsys.readouterr().out
    assert "3 wrong answers of the model itself:\n  heldout.jsonl, row 2\n" in printed
    assert printed.count("    answer      ö") == 3
    cut = ended.count(False)
    assert (
        f"{cut} of 4 answers to held-out prompts were cut at eval_completion_length=5: raise it, or name in eval_stop"
        in printed
    )
    assert printed.endswith("answers.jsonl has every answer\nscores.json has these numbers\n")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [record["asked"] for record in records]
    assert names == ["held-out"] * 4 + ["teacher (turn)"] * 4 + ["general"] * 8
    assert records[0] == {
        "asked": "held-out",
        "row": "heldout.jsonl, row 1",
        "prompt": "say a",
        "answer": right.strip(),
        "completion": right,
        "finished": ended[0],
        "right": True,
    }
    assert [record["finished"] for record in records[:4]] == made.finished == ended
    assert [record["row"] for record in records[:4]] == [f"heldout.jsonl, row {n}" for n in range(1, 5)]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == sum(record["right"] for record in records[:4]) / 4 == 0.25
    assert scores["accuracy_by_template"] == {"turn": sum(record["right"] for record in records[4:8]) / 4}
    assert scores["forgetting"] > 0 and scores["base_model"] == str(other)
    for name in ("heldout.jsonl", "general.jsonl"):
        assert "which is read or written too" in fails(capsys, ["eval", "recipe.yaml", "--output_file", name], 2)
    both = ["eval", "recipe.yaml", "--output_file", "new.json", "--summary_file", "./new.json"]
    assert "which is read or written too" in fails(capsys, both, 2)


def test_a_folder_that_is_not_there_is_no_name_for_the_hub(recipe, tmp_path, capsys):
    recipe()
    (tmp_path / "runs").mkdir()
    said = fails(capsys, ["eval", "recipe.yaml", "--model", "runs/nope", "--eval_file", "heldout.jsonl"], 2)
    assert "model is 'runs/nope': no such folder" in said


def test_answers_that_were_made_are_kept_whatever_ends_the_command(recipe, tmp_path, capsys, monkeypatch):
    from sdft.evaluation import exam as evaluate

    made = []

    def stops(model, prompts, *how, **options):
        made.append(len(prompts))
        if len(made) == 3:
            raise KeyboardInterrupt
        return [[5, 1] for _ in prompts]

    monkeypatch.setattr(evaluate, "sample", stops)
    small = ["--per_device_eval_batch_size", "2", "--output_file", "answers.jsonl"]
    commands = {"generate": ["--prompt_file", "train.jsonl"], "eval": ["--general_file", ""]}
    for name, options in commands.items():
        made.clear()
        assert fails(capsys, [name, recipe(), *options, *small], 130) == "sdft: interrupted"
        lines = (tmp_path / "answers.jsonl").read_text().splitlines()
        assert len([json.loads(line) for line in lines]) == 4


def test_a_row_with_half_a_character_is_named_before_torch_is_imported(recipe, tmp_path, capsys, monkeypatch):
    for slow in ("torch", "sdft.settings.arguments", "sdft.commands.train"):
        monkeypatch.setitem(sys.modules, slow, None)  # to import it is an error
    path = recipe()
    for name, field in (("train", "demonstration"), ("heldout", "answer"), ("general", "prompt"), ("train", "note")):
        good = (tmp_path / f"{name}.jsonl").read_text()
        row = json.dumps({**tiny.rows(1)[0], field: "half \ud83d of a pair"})
        (tmp_path / f"{name}.jsonl").write_text(good + row + "\n")
        command = {"general": ["eval", path], "heldout": ["eval", path], "train": ["train", path]}[name]
        message = f"{name}.jsonl, row 9: {field} has '\\ud83d', half of a surrogate pair"
        assert message in fails(capsys, command, 2)
        if name == "train":
            answers = ["generate", path, "--prompt_file", "train.jsonl", "--output_file", "out.jsonl"]
            assert message in fails(capsys, answers, 2)
        (tmp_path / f"{name}.jsonl").write_text(good)


def test_generate_prints_the_answer_to_a_prompt(recipe, model_folder, capsys):
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    greedy, sampled = (
        answer(
            model, tokenizer, load_rows([{"prompt": "say hi"}], need=("prompt",)), max_new_tokens=9, batch_size=1, **o
        )
        for o in ({}, {"temperature": 2.0, "seed": 3})
    )
    command = ["generate", recipe(), "--prompt", "say hi", "--max_completion_length", "9"]
    assert main(command) == 0
    assert capsys.readouterr().out == greedy.texts[0] + "\n"
    assert main([*command, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == greedy.texts[0] + "\n"
    assert main([*command, "--temperature", "2", "--seed", "3"]) == 0
    assert capsys.readouterr().out == sampled.texts[0] + "\n"
    assert sampled.texts != greedy.texts
    assert main([*command, "--temperature", "2", "--top_k", "1"]) == 0  # the likeliest token is all there is
    assert capsys.readouterr().out == greedy.texts[0] + "\n"


def test_a_package_that_is_missing_is_named(recipe, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    monkeypatch.delitem(sys.modules, "sdft.settings.recipe", raising=False)
    assert "yaml is not installed; pip install 'sdft-kernels[train]'" in fails(capsys, ["train", recipe()], 2)


def test_an_answer_that_the_terminal_cannot_show_is_no_error(recipe, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sdft.evaluation.exam.sample", lambda model, prompts, *_, **__: [[5, 1] for _ in prompts])
    monkeypatch.setattr(tiny.tiny_tokenizer().__class__, "decode", lambda *_, **__: "ö")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["generate", recipe(), "--prompt", "a"]) == 0
    assert shown.buffer.getvalue() == b"\\xf6\n"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_generate_answers_a_file_of_prompts(kind, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say ö"}]
    rows = [{"prompt": [{"role": "user", "content": "say a"}], "id": 7}, {"prompt": chat, "id": 8}]
    if kind == "jsonl":
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet("in.parquet")
    command = ["generate", "--model", str(model_folder), "--prompt_file", f"in.{kind}", "--output_file", "out.jsonl"]
    assert main([*command, "--max_completion_length", "4"]) == 0
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = answer(
        tiny.tiny_model(), tiny.tiny_tokenizer(), load_rows(rows, need=("prompt",)), max_new_tokens=4, batch_size=2
    )
    ended = [completion[-1] == 1 for completion in answers.completions]
    assert printed.endswith("out.jsonl has the answers to 2 prompts\n")
    assert f"{ended.count(False)} of 2 answers were cut at max_completion_length=4: raise it\n" in printed
    assert written == [
        {**row, "completion": text, "finished": end} for row, text, end in zip(rows, answers.texts, ended, strict=True)
    ]
    assert sorted(os.listdir(tmp_path)) == [f"in.{kind}", "out.jsonl"]


def fails(capsys, argv, code):
    """Run, and return the one line that says what was wrong."""
    capsys.readouterr()
    assert main(argv) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("sdft:")]
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    if code == 2:
        assert captured.err.strip() == errors[0]
    return errors[0]


def nothing_written(folder):
    return not (folder / "out").exists()


DEMONSTRATED = '{"prompt": "a", "demonstration": "b"}\n'


@pytest.mark.parametrize(
    ("changes", "train_lines", "expected"),
    [
        ({"train_file": "absent.jsonl"}, None, ["absent.jsonl", "no such file"]),
        ({"eval_file": "absent.jsonl"}, None, ["absent.jsonl", "no such file"]),
        ({}, DEMONSTRATED + '{"prompt": "a"}\n', ["train.jsonl", "row 2", "no demonstration"]),
        ({}, "", ["train.jsonl", "empty"]),
        (
            {},
            DEMONSTRATED.replace('"a"', f'"{"a" * 200}"'),
            ["train.jsonl, row 1", "longer than the model's context of 160"],
        ),
        ({"general_completion_length": 500}, None, ["general.jsonl", "longer than the model's context of 160"]),
        ({"learning_rte": 1}, None, ["recipe.yaml", "'learning_rte'", "did you mean 'learning_rate'"]),
        ({"zzz": 1}, None, ["'zzz'", "sdft train --help"]),
        ({"max_steps": "many"}, None, ["max_steps", "many"]),
        ({"max_steps": 1.5}, None, ["max_steps", "1.5"]),
        ({"max_steps": [1]}, None, ["max_steps", "single value"]),
        ({"lr_scheduler_type": "sideways"}, None, ["sideways", "linear"]),
        ({"divergence": "kl"}, None, ["divergence", "'kl'", "reverse_kl"]),
        ({"teacher_template": "{prompt}"}, None, ["teacher_template", "without {demonstration}"]),
        ({"teacher_template": [{"role": "user", "content": "x"}]}, None, ["teacher_template", "{prompt}"]),
        ({"model": "no/such/folder/here.gguf"}, None, ["model", "no such file"]),
        ({"model": "."}, None, ["model", "config.json"]),
        ({"model": None}, None, ["model", "not set"]),
        ({"resume_from_checkpoint": "last"}, None, ["resume_from_checkpoint", "no such checkpoint"]),
        ({"resume_from_checkpoint": "x/checkpoint-3"}, None, ["x/checkpoint-3", "no such checkpoint"]),
        ({"eval_strategy": "steps", "eval_file": None, "general_file": None}, None, ["eval_strategy", "eval_file"]),
        (
            {"eval_strategy": "steps", "metric_for_best_model": "forgetting", "general_file": None},
            None,
            ["metric_for_best_model is 'forgetting'", "general_file"],
        ),
        ({"train_file": None}, None, ["train_file", "not set"]),
        ({"learning_rate": None}, None, ["recipe.yaml, line ", ": learning_rate is not set"]),
        ({"log_completions": "often"}, None, ["log_completions", "'often'", "a whole number or true or false"]),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(changes, train_lines, expected, recipe, tmp_path, capsys):
    path = recipe(**changes)
    if train_lines is not None:
        (tmp_path / "train.jsonl").write_text(train_lines)
    message = fails(capsys, ["train", path], 2)
    for part in expected:
        assert part in message
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "absent.yaml"], ["absent.yaml", "no such recipe"]),
        (["generate", "Good morning"], ["Good morning is not there: no such recipe", "field, as in --model NAME"]),
        (["train", "recipe.yaml", "--learning-rte", "1"], ["--learning-rte", "did you mean '--learning_rate'"]),
        (["train", "--lr", "1e-5"], ["unknown field '--lr'"]),
        (["train", "--lr", "1e-5", "recipe.yaml"], ["unknown field '--lr'"]),
        (["train", "recipe.yaml", "more.yaml"], ["more.yaml", "one argument too many"]),
        (["data", "a.jsonl", "b.jsonl", "--rows", "1"], ["'b.jsonl'", "--train_file '[a.jsonl, b.jsonl]'"]),
        (["train", "recipe.yaml", "--max_steps"], ["--max_steps has no value"]),
        (["train", "train.jsonl"], ["train.jsonl", "is no recipe"]),
        *(
            (["train", "recipe.yaml", *words], [f"{words[0]} is", f"pip install {package}"])
            for words, package in (
                (["--optim", "paged-adamw-8bit"], "bitsandbytes"),
                (["--optim", "adamw_torch_4bit"], "torchao"),
            )
            if importlib.util.find_spec(package) is None
        ),
        (["trian", "recipe.yaml"], ["unknown command 'trian'", "train"]),
        (["eval", "recipe.yaml", "--eval_file", "", "--general_file", ""], ["eval_file and general_file"]),
        (["eval", "recipe.yaml", "--max_step", "3"], ["--max_step"]),
        (["eval", "recipe.yaml", "--scorer", "exactly"], ["scorer", "'exactly'", "json or module:function"]),
        (["eval", "recipe.yaml", "--eval_temperature", "-1"], ["eval_temperature", "-1"]),
        (["eval", "recipe.yaml", "--eval_samples", "4"], ["eval_samples is 4", "eval_temperature"]),
        (["eval", "recipe.yaml", "--teacher", "--teacher_template", "trun"], ["teacher_template", "'trun'", "'turn'"]),
        (["eval", "recipe.yaml", "--teacher", "--eval_file", ""], ["teacher is True", "eval_file"]),
        (["generate", "recipe.yaml"], ["prompt and prompt_file are not set"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--prompt_file", "b"], ["prompt and prompt_file are both set"]),
        (["generate", "recipe.yaml", "--prompt_file", "train.jsonl"], ["output_file is not set"]),
        (["generate", "recipe.yaml", "--prompt_file", "absent", "--output_file", "out"], ["absent", "no such file"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--output_file", "no/out"], ["output_file", "no such folder"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--output_file", "."], ["output_file", "a folder"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--top_p", "0.9"], ["top_p is 0.9", "temperature"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--temperature", "nan"], ["temperature is nan"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--zzz", "1"], ["--zzz", "sdft generate --help"]),
        (["generate", "recipe.yaml", "--prompt", " "], ["prompt is ' '; it must be a text"]),
        (["generate", "recipe.yaml", "--prompt", "a", "--temperature", "0", "--top_k", "3"], ["temperature is 0.0"]),
        (["eval", "recipe.yaml", "--base_model", "./absent"], ["--base_model is './absent': no such folder"]),
        (["generate", "recipe.yaml", "--prompt", "a" * 200], ["prompt, row 1", "context of 160"]),
        (["generate", "--prompt", "a"], ["model is not set"]),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(argv, expected, recipe, tmp_path, capsys):
    recipe()
    message = fails(capsys, argv, 2)
    for part in expected:
        assert part in message
    assert nothing_written(tmp_path)


def test_an_adapter_is_not_written_over_its_model(recipe, model_folder, capsys):
    before = sorted(os.listdir(model_folder))
    message = fails(capsys, ["train", recipe(lora_rank=2, output_dir=str(model_folder))], 2)
    assert "with lora_rank it must be another folder" in message
    assert sorted(os.listdir(model_folder)) == before


def test_answers_do_not_take_the_place_of_a_pipe(recipe, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    message = fails(capsys, ["generate", recipe(), "--prompt", "a", "--output_file", "pipe"], 2)
    assert "output_file is 'pipe', a device or a pipe" in message
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize(
    ("saved", "options"),
    [
        ({}, [["--lora_rank", "2"], ["--freeze_embeddings", "True"], ["--optim", "sgd"], ["--learning_rate", "0.5"]]),
        ({"lora_rank": 2}, [["--lora_rank", "4"], ["--lora_rank", "0"]]),
    ],
    ids=["all weights", "adapter"],
)
def test_a_checkpoint_of_other_settings_is_one_line(saved, options, recipe, capsys, monkeypatch):
    save = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "eval_file": None, "general_file": None}
    resume = ["train", recipe(**save, **saved), "--resume_from_checkpoint", "last", "--max_steps", "2"]
    assert main(["train", "recipe.yaml"]) == 0
    for other in options:
        message = fails(capsys, [*resume, *other], 2)
        assert "out/checkpoint-1" in message
        assert "must be those that it was saved with" in message
    optimizer = Path("out/checkpoint-1/optimizer.pt")
    whole = optimizer.read_bytes()
    optimizer.write_bytes(b"not an optimizer")
    assert "out/checkpoint-1', whose optimizer.pt is damaged" in fails(capsys, resume, 2)
    optimizer.write_bytes(whole)

    def fail(*_, **__):
        raise ValueError("of its own")

    monkeypatch.setattr(SDFTTrainer, "samples", fail)
    with pytest.raises(ValueError, match=r"^of its own$"):
        main(resume)


def test_a_nan_loss_is_one_line_and_exit_code_1_and_no_half_written_checkpoint(recipe, tmp_path, capsys):
    path = recipe(learning_rate=1e30, lr_scheduler_type="constant", save_strategy="steps", save_steps=2, method="sft")
    message = fails(capsys, ["train", path], 1)
    assert "the loss is nan at step 2" in message
    assert sorted(os.listdir("out")) == ["metrics.jsonl", "run.json"]


def test_a_student_that_broke_is_one_line_and_exit_code_1(recipe, tmp_path, capsys):
    message = fails(capsys, ["train", recipe(learning_rate=1e30, lr_scheduler_type="constant")], 1)
    assert "finite" in message or "nan" in message
    assert "model.safetensors" not in os.listdir("out")


def test_an_output_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "sdft.evaluation.exam.answer", lambda *args, **kwargs: pytest.fail("the model was asked something")
    )
    (tmp_path / "file").write_text("")
    message = fails(capsys, ["train", recipe(output_dir="file/out")], 2)
    assert "output_dir is 'file/out', which cannot be made" in message
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / "locked"))  # root may everywhere
    (tmp_path / "locked").mkdir()
    message = fails(capsys, ["train", recipe(output_dir="locked/out")], 2)
    assert "output_dir is 'locked/out', which cannot be written" in message
    assert not list((tmp_path / "locked").iterdir())


def test_interruption_is_clean(recipe, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdft.commands.train.load_model", interrupt)
    assert fails(capsys, ["train", recipe()], 130) == "sdft: interrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_training_with_a_checkpoint_and_a_line_that_says_how_to_go_on(
    number, code, recipe, capfd, monkeypatch
):
    samples = SDFTTrainer.samples

    def told_to_stop(trainer, rows):
        if trainer.state.global_step + 1 == 3:
            signal.raise_signal(number)
        return samples(trainer, rows)

    assert main(["train", recipe(), "--output_dir", "straight"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(SDFTTrainer, "samples", told_to_stop)
        capfd.readouterr()
        assert main(["train", recipe()]) == code
    printed = capfd.readouterr()
    assert "sdft: stopping after this step; again to stop now\n" in printed.err
    name = signal.Signals(number).name
    (line,) = [line for line in printed.out.splitlines() if line.startswith("stopped by")]
    told, command = line.split("; to go on: ")
    assert told == f"stopped by {name} after step 2 of 4: checkpoint-2 is in out/"
    assert command == "sdft train recipe.yaml --resume_from_checkpoint last"
    assert sorted(os.listdir("out")) == ["checkpoint-2", "metrics.jsonl", "run.json"]
    assert main(shlex.split(command)[1:]) == 0
    with open("out/model.safetensors", "rb") as resumed, open("straight/model.safetensors", "rb") as straight:
        assert resumed.read() == straight.read()


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_second_signal_ends_the_command_at_once(number, code, line, recipe, capsys, monkeypatch):
    save = SDFTTrainer.save_beside

    def told_twice(trainer, folder):  # amid a checkpoint
        save(trainer, folder)
        for _ in range(2 if trainer.state.global_step == 4 else 0):
            signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(SDFTTrainer, "save_beside", told_twice)
    monkeypatch.setattr("sdft.checkpoints.signals.ECHO", 0.0)
    try:
        assert fails(capsys, ["train", recipe(save_strategy="steps", save_steps=2)], code) == f"sdft: {line}"
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sorted(os.listdir("out")) == ["checkpoint-2", "metrics.jsonl", "run.json"]


def test_sigterm_outside_of_training_ends_the_command_with_a_line(recipe, capsys, monkeypatch):
    monkeypatch.setattr("sdft.commands.train.load_model", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    assert fails(capsys, ["train", recipe()], 143) == "sdft: terminated"
    assert not os.path.exists("out")


def test_a_sigterm_after_the_last_step_leaves_the_model_exit_code_0_and_a_line(recipe, capsys, monkeypatch):
    evaluate = SDFTTrainer.evaluate

    def told_to_stop(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(SDFTTrainer, "evaluate", told_to_stop)
    assert main(["train", recipe(eval_strategy="steps", eval_steps=2)]) == 0
    assert "SIGTERM came after the last step: out/ has the trained model" in capsys.readouterr().out
    assert "model.safetensors" in os.listdir("out") and "summary.json" not in os.listdir("out")


def test_a_folder_with_another_run_is_refused_before_anything_is_loaded(recipe, capsys, monkeypatch, recwarn):
    assert main(["train", recipe(save_strategy="steps", save_steps=2, lora_rank=2, log_completions=1)]) == 0
    assert not [each for each in recwarn if "is_gradient_checkpointing" in str(each.message)]
    before = contents("out")
    with monkeypatch.context() as patch:
        patch.setattr("sdft.commands.train.load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
        message = fails(capsys, ["train", recipe(max_steps=2)], 2)
        assert "output_dir is 'out', which holds another run (adapter_config.json, adapter_model.safetensors" in message
        assert "overwrite_output_dir is true" in message
    assert contents("out") == before
    assert main(["train", "recipe.yaml", "--overwrite_output_dir", "true", "--save_strategy", "steps"]) == 0
    names = ["config.json", "curves.png", "metrics.jsonl", "model.safetensors", "resolved_recipe.yaml", "run.json"]
    assert [name for name in sorted(os.listdir("out")) if name in names or "check" in name] == names
    assert "completions.jsonl" not in os.listdir("out") and "adapter_config.json" not in os.listdir("out")
    assert [json.loads(line)["step"] for line in Path("out/metrics.jsonl").read_text().splitlines()] == [1, 2, 2]


def test_a_folder_stays_as_it_is_where_a_run_that_would_replace_it_cannot_start(recipe, capsys, tmp_path):
    assert main(["train", recipe(save_strategy="steps", save_steps=2)]) == 0
    before = contents("out")
    (tmp_path / "train.jsonl").write_text(DEMONSTRATED.replace('"a"', f'"{"a" * 200}"'))
    assert "longer than" in fails(capsys, ["train", "recipe.yaml", "--overwrite_output_dir", "true"], 2)
    assert contents("out") == before


LONG = "".join(json.dumps(row) + "\n" for row in tiny.rows() * 500)
SDFT = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from sdft.cli import main; "


@pytest.mark.slow
def test_ctrl_c_ends_a_real_process_with_one_line_and_leaves_nothing_half_written(recipe, tmp_path):
    path = recipe(max_steps=100_000, eval_file=None, general_file=None, save_strategy="steps", save_steps=2)
    (tmp_path / "long.jsonl").write_text(LONG)
    commands = {
        "train": ["train", path],
        "eval": ["eval", path, "--eval_file", "long.jsonl", "--per_device_eval_batch_size", "1"],
        "generate": ["generate", path, "--prompt_file", "long.jsonl", "--output_file", "answers.jsonl"],
    }
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    processes = {}
    for name, argv in commands.items():
        with open(tmp_path / f"{name}.err", "w") as stderr:
            processes[name] = subprocess.Popen(
                [sys.executable, "-c", SDFT + "sys.exit(main(sys.argv[1:]))", *argv], stderr=stderr, env=environment
            )
    started = {"train": "training:", "eval": "held-out prompts:", "generate": "answers:"}
    answers = tmp_path / "answers.jsonl"
    try:
        deadline = time.monotonic() + patience(300)
        for name, process in processes.items():
            errors = tmp_path / f"{name}.err"
            while (
                started[name] not in errors.read_text()
                or (name == "train" and not (tmp_path / "out/checkpoint-2").exists())
                or (name == "generate" and not answers.exists())
            ):
                assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        for name, process in processes.items():
            assert process.wait(timeout=patience(60)) == 130, name
            lines = (tmp_path / f"{name}.err").read_text().replace("\r", "\n").splitlines()
            said = "sdft: stopping after this step; again to stop now" if name == "train" else "sdft: interrupted"
            assert [line for line in lines if line.startswith("sdft:")] == [said]
            assert not any("Traceback" in line for line in lines)
    finally:
        for process in processes.values():
            process.kill()
    assert all(json.loads(line)["completion"] is not None for line in answers.read_text().splitlines())
    assert not [name for _, folders, files in os.walk(tmp_path) for name in (*folders, *files) if ".saving" in name]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-2")


def test_help_is_there_and_the_first_one_is_quick(capsys):
    for command in ("train", "eval", "generate"):
        assert main([command, "--help"]) == 0
        assert f"sdft {command} examples/demo.yaml" in capsys.readouterr().out
    code = "import sys, sdft, sdft.cli; sdft.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sdft train examples/demo.yaml" in done.stdout


def test_every_name_in_the_reports_is_in_their_documentation(recipe, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    assert main(["train", recipe(**options, log_completions=1)]) == 0
    text = (Path(__file__).parent.parent / "docs" / "outputs.md").read_text()
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    names = {name for line in metrics for name in line if not name.startswith("train_") and name != "total_flos"}
    names |= set(json.loads(Path("out/completions.jsonl").read_text().splitlines()[0]))
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_demo_recipe_is_valid():
    from sdft.settings.config import SDFTConfig
    from sdft.settings.fields import own_fields, training_fields
    from sdft.settings.inputs import DataArguments, EvalArguments, ModelArguments
    from sdft.settings.recipe import read

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parts = (ModelArguments, DataArguments, EvalArguments)
    given = read(
        [os.path.join(root, "examples/demo.yaml")], own_fields(*parts) | training_fields(), command="sdft train"
    )
    model, data, evaluation, config = (given.make(part) for part in (*parts, SDFTConfig))
    assert model.model == "smollm2-135m-instruct"
    assert config.output_dir == "runs/demo"
    assert config.learning_rate == 5e-5
    for file in (data.train_file, evaluation.eval_file, evaluation.general_file):
        assert os.path.isfile(os.path.join(root, file))


def test_help_begins_with_ten_settings_and_has_every_field_when_asked(capsys):
    from sdft.settings.fields import training_fields
    from sdft.settings.help import FIRST, GROUPS

    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(FIRST) == 10 and len(short.splitlines()) < 90
    assert [line.split()[0] for line in short.splitlines() if line.startswith("  --")] == [
        f"--{name}" for name in FIRST
    ]
    assert main(["train", "--help-all"]) == 0
    full = capsys.readouterr().out
    said = " ".join(full.split())
    assert "--metric_for_best_model VALUE What the best model is the best by: accuracy (on eval_file;" in said
    assert "--torch_compile [true|false] Must be left as it is: the loss is no forward pass of the model's." in said
    described = [line.split()[0] for line in full.splitlines() if line.startswith("  --")]
    assert len(set(described)) == len(described)
    assert {f"--{name}" for name in training_fields()} < set(described)
    for kind in (short, full):
        assert max(map(len, kind.splitlines())) <= 120
    assert {name for names in GROUPS.values() for name in names} >= set(FIRST)


def test_env_says_what_is_installed_and_what_the_loss_runs_on(capsys, monkeypatch):
    from sdft_kernels.backends.cpu import library

    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"\n  torch         {torch.__version__}\n" in printed
    assert "kernels in C, built when" in printed or not library.find()
    monkeypatch.setattr(library, "find", lambda: None)
    find_spec = importlib.util.find_spec
    for there, said in ((True, "that are there cannot be used"), (None, "were not built")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, there=there: there if "_kernels" in name else find_spec(name)
        )
        assert main(["env"]) == 0
        assert f"plain torch, for the kernels in C {said}" in capsys.readouterr().out
    assert "one argument too many" in fails(capsys, ["env", "more"], 2)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sdft 0.")


def test_the_lazy_names_are_there_for_tab_completion():
    import sdft

    assert [name for name in dir(sdft) if not name.startswith("__")] == ["SDFTConfig", "SDFTTrainer", "load_model"]


def test_one_step_is_no_plural():
    one, two = (describe(Summary("m", "sft", None, None, steps, 1.0, 0.5)) for steps in (1, 2))
    assert "m: 1 step of" in one and "m: 2 steps of" in two


def test_the_table_leaves_out_what_was_not_measured():
    summary = Summary("m", "sdft", "forward_kl", "base", 3, 1.0, 0.5, accuracy_before=0.0, held_out_prompts=2)
    assert "0.0 %" in table(summary)
    assert "general" not in table(summary)
    assert "held-out prompts answered exactly (2)" in table(summary)
    summary.scorer = "choice"
    assert "held-out prompts answered with the right letter (2)" in table(summary)
    assert "teacher" not in table(summary)


def test_the_losses_of_a_run_are_means_over_its_first_and_last_tenth():
    history = [{"loss": float(n)} for n in range(30)] + [{"train_runtime": 1.0}]
    assert loss_ends(history) == (1.0, 28.0)
    assert loss_ends([]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "m", "--prompt", ""], "--prompt is ''; it must be a text to answer"),
        (["train", "rows.jsonl"], "rows.jsonl is no recipe, which is a YAML file; files of rows are named by fields"),
        (["train", "model.gguf"], "model.gguf is no recipe, which is a YAML file; a model is named by --model"),
        (
            ["train", "--model", "m", "--train_file", "."],
            "--train_file is '.', a folder that datasets has not saved; it must name a file",
        ),
        (
            ["eval", "--model", "m", "--eval_file", "rows.jsonl", "--teacher"],
            "teacher is True, and rows.jsonl, row 2 has no demonstration for the teacher to see",
        ),
    ],
)
def test_what_was_mistaken_for_something_else_is_said(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "answer": "b", "demonstration": "c"}, {"prompt": "a", "answer": "b"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("model.gguf").write_bytes(b"GGUF")
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
