"""The command: what it leaves behind when it works, and the one line and the exit code when it does not."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sdft.cli import main
from sdft.report import Summary, loss_ends, table
from sdft.trainer import SDFTTrainer
from tests import tiny


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
    assert summary["general_divergence"] > 0
    for name in ("accuracy_before", "accuracy_after", "accuracy_teacher"):
        assert 0 <= summary[name] <= 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    trained, base = (AutoModelForCausalLM.from_pretrained(f) for f in (out, str(model_folder)))
    assert not torch.equal(trained.lm_head.weight, base.lm_head.weight)
    assert not (tmp_path / "out").exists()


def test_a_resumed_command_ends_as_the_uninterrupted_one(recipe, tmp_path):
    assert main(["train", recipe(save_strategy="steps", save_steps=2), "--output_dir", "a"]) == 0
    os.rename("a/model.safetensors", "a/straight.safetensors")
    os.rename("a/checkpoint-4", "moved-away")
    assert main(["train", "recipe.yaml", "--output_dir", "a", "--resume_from_checkpoint", "last"]) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "a/straight.safetensors").read_bytes()
    steps = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps if "loss" in entry] == [1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize("options", [["--method", "sft"], ["--teacher", "ema"]], ids=" ".join)
def test_other_methods_run_too(options, recipe, tmp_path):
    assert main(["train", recipe(max_steps=1), *options]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["general_divergence"] > 0


def test_without_held_out_files_only_the_loss_is_reported(recipe, tmp_path, capsys):
    assert main(["train", recipe(max_steps=1, eval_file=None, general_file=None)]) == 0
    printed = capsys.readouterr().out
    assert "training loss" in printed
    assert "held-out" not in printed
    assert (tmp_path / "out/curves.png").exists()


def test_eval_scores_a_model_its_teacher_and_its_divergence(recipe, model_folder, capsys, tmp_path):
    other = tmp_path / "other"
    tiny.tiny_model(1).save_pretrained(other)
    tiny.tiny_tokenizer().save_pretrained(other)
    assert main(["eval", recipe(), "--model", str(other), "--teacher"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" (")[0] for line in lines] == [
        "held-out prompts answered exactly",
        "the same, shown the demonstration",
        "general prompts answered",
        f"divergence from {model_folder}",
    ]
    assert float(lines[-1].split(": ")[-1].split()[0]) > 0.1


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
        ({"eval_strategy": "steps", "eval_file": None}, None, ["eval_strategy", "eval_dataset"]),
        ({"train_file": None}, None, ["train_file", "not set"]),
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
        (["train", "recipe.yaml", "--learning-rte", "1"], ["--learning-rte", "did you mean '--learning_rate'"]),
        (["train", "recipe.yaml", "more.yaml"], ["more.yaml", "one argument too many"]),
        (["train", "recipe.yaml", "--max_steps"], ["max_steps", "expected one argument"]),
        (["train", "train.jsonl"], ["train.jsonl", "not YAML"]),
        (["trian", "recipe.yaml"], ["unknown command 'trian'", "train"]),
        (["eval", "recipe.yaml", "--eval_file", "", "--general_file", ""], ["eval_file and general_file"]),
        (["eval", "recipe.yaml", "--max_step", "3"], ["--max_step"]),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(argv, expected, recipe, tmp_path, capsys):
    recipe()
    message = fails(capsys, argv, 2)
    for part in expected:
        assert part in message
    assert nothing_written(tmp_path)


def test_a_nan_loss_is_one_line_and_exit_code_1_and_no_half_written_checkpoint(recipe, tmp_path, capsys):
    path = recipe(learning_rate=1e30, lr_scheduler_type="constant", save_strategy="steps", save_steps=2, method="sft")
    message = fails(capsys, ["train", path], 1)
    assert "the loss is nan at step 2" in message
    assert [name for name in os.listdir("out") if name != "metrics.jsonl"] == []


def test_a_student_that_broke_is_one_line_and_exit_code_1(recipe, tmp_path, capsys):
    message = fails(capsys, ["train", recipe(learning_rate=1e30, lr_scheduler_type="constant")], 1)
    assert "finite" in message or "nan" in message
    assert "model.safetensors" not in os.listdir("out")


def test_an_output_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sdft.run.answer", lambda *args, **kwargs: pytest.fail("the model was asked something"))
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

    monkeypatch.setattr("sdft.run.load_model", interrupt)
    assert fails(capsys, ["train", recipe()], 130) == "sdft: interrupted"


def test_sigterm_ends_training_with_a_checkpoint_exit_code_0_and_a_line(recipe, capsys, monkeypatch):
    samples = SDFTTrainer.samples

    def told_to_stop(trainer, rows):
        if trainer.state.global_step + 1 == 2:
            signal.raise_signal(signal.SIGTERM)
        return samples(trainer, rows)

    assert main(["train", recipe(), "--output_dir", "straight"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(SDFTTrainer, "samples", told_to_stop)
        capsys.readouterr()
        assert main(["train", recipe()]) == 0
    assert "stopped by SIGTERM after step 2 of 4: checkpoint-2 is in out/" in capsys.readouterr().out
    assert sorted(os.listdir("out")) == ["checkpoint-2", "metrics.jsonl"]
    assert main(["train", recipe(), "--resume_from_checkpoint", "last"]) == 0
    with open("out/model.safetensors", "rb") as resumed, open("straight/model.safetensors", "rb") as straight:
        assert resumed.read() == straight.read()


def test_help_is_there_and_the_first_one_is_quick(capsys):
    for command in ("train", "eval"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"sdft {command} examples/demo.yaml" in capsys.readouterr().out
    code = "import sys, sdft, sdft.cli; sdft.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "sdft train examples/demo.yaml" in done.stdout


def test_the_demo_recipe_is_valid():
    from sdft.config import DataArguments, EvalArguments, ModelArguments, SDFTConfig
    from sdft.recipe import RecipeParser, parse

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    parser = RecipeParser([ModelArguments, DataArguments, EvalArguments, SDFTConfig])
    model, data, evaluation, config = parse(parser, [os.path.join(root, "examples/demo.yaml")])
    assert model.model == "smollm2-135m-instruct"
    assert config.output_dir == "runs/demo"
    assert config.learning_rate == 5e-5
    for file in (data.train_file, evaluation.eval_file, evaluation.general_file):
        assert os.path.isfile(os.path.join(root, file))


def test_the_table_leaves_out_what_was_not_measured():
    summary = Summary("m", "sdft", "forward_kl", "base", 3, 1.0, 0.5, accuracy_before=0.0, held_out_prompts=2)
    assert "0.0 %" in table(summary)
    assert "general" not in table(summary)
    assert "teacher" not in table(summary)


def test_the_losses_of_a_run_are_means_over_its_first_and_last_tenth():
    history = [{"loss": float(n)} for n in range(30)] + [{"train_runtime": 1.0}]
    assert loss_ends(history) == (1.0, 28.0)
    assert loss_ends([]) == (None, None)
