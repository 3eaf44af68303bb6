"""What a command is told: every mistake names the place, and is found before torch or transformers is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft import SDFTConfig
from sdft.cli import main
from sdft.errors import UsageError
from sdft.settings.checks import matching
from sdft.settings.config import DIVERGENCES, MethodSettings
from sdft.settings.fields import own_fields, training_fields
from sdft.settings.inputs import ModelArguments
from sdft.settings.recipe import read, read_flags, read_recipe
from sdft_kernels import divergences

ROOT = Path(__file__).parent.parent
FIELDS = own_fields(ModelArguments) | training_fields()
LIGHT = """
import sys
from sdft.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_fields_read_from_the_source_are_those_of_the_dataclass() -> None:
    expected = {field.name: field for field in dataclasses.fields(SDFTConfig)}
    found = training_fields()
    assert found.keys() == expected.keys()
    for name, field in found.items():
        assert field.help, name
        literal = expected[name].default
        if field.default is not None and not callable(literal):
            assert field.default == literal, name
    assert found["save_strategy"].choices == ("no", "steps", "epoch", "best")


def test_the_divergences_are_those_of_the_kernels() -> None:
    assert tuple(divergences.DIVERGENCES) == DIVERGENCES


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("learning_rate: fast", "recipe.yaml, line 3: learning_rate is 'fast'; it must be a number"),
        ("max_steps: 1.5", "recipe.yaml, line 3: max_steps is '1.5'; it must be a whole number"),
        ("bf16: perhaps", "recipe.yaml, line 3: bf16 is 'perhaps'; it must be true or false"),
        ("learning_rate: [1, 2]", "recipe.yaml, line 3: learning_rate is ['1', '2']; it must be a single value"),
        ("rollout_stop: x", "recipe.yaml, line 3: rollout_stop is 'x'; it must be a list of texts"),
        ("rollout_stop: {a: b}", "recipe.yaml, line 3: rollout_stop is {'a': 'b'}; it must be a list of texts"),
        (
            "teacher_template: {a: b}",
            "recipe.yaml, line 3: teacher_template is {'a': 'b'}; it must be a list of messages or a text",
        ),
        ("liger_kernel_config: x", "recipe.yaml, line 3: liger_kernel_config is 'x'; it must be a mapping"),
        ("lr_scheduler_kwargs: '{'", "recipe.yaml, line 3: lr_scheduler_kwargs is '{'; it must be a mapping"),
        ("learning_rate:", "recipe.yaml, line 3: learning_rate is not set"),
        (
            "# note\n\nlearning_rte: 1",
            "recipe.yaml, line 5: unknown field 'learning_rte'; did you mean 'learning_rate'?",
        ),
        ("model: y", "recipe.yaml, line 3: model is set twice; line 1 has set it before"),
        (
            "chat_template_kwargs:\n  a: 1\n  a: 2",
            "recipe.yaml, line 5: a is set twice; line 4 has set it before",
        ),
        ("teacher_template: [{a: 1, a: 2}]", "recipe.yaml, line 3: a is set twice; line 3 has set it before"),
        ("divergence: kl", "recipe.yaml, line 3: divergence is 'kl'; it may be reverse_kl"),
        ("save_strategy: often", "recipe.yaml, line 3: save_strategy is 'often'; it may be no, steps, epoch or best"),
        ("beta: 2", "recipe.yaml, line 3: beta is 2.0; it must be a number from 0.001 to 0.999"),
        ("seed: " + "9" * 5000, "recipe.yaml, line 3: seed is '9999"),
        ("teacher: a: b", "recipe.yaml, line 3: not YAML: mapping values are not allowed here"),
        ("teacher: [a", "recipe.yaml, line 4: not YAML: expected ',' or ']'"),
        ("teacher: *nothing", "recipe.yaml, line 3: not YAML: found undefined alias"),
        ("[a]: b", "recipe.yaml, line 3: a field's name must be a word"),
        ("teacher_template: " + "[" * 5000, "recipe.yaml is not a recipe: it is nested too deeply"),
        ("teacher_template: &a [*a]", "recipe.yaml, line 3: not YAML: found unconstructable recursive node"),
        ("teacher_template: [[2026-99-99]]", "recipe.yaml, line 3: teacher_template cannot be read: month must be"),
        ('run_name: "\\ud800"', "recipe.yaml, line 3: run_name has half of a surrogate pair"),
        ("train_file: absent.jsonl", "recipe.yaml, line 3: train_file is 'absent.jsonl'; there is no such file"),
        ("output_dir: /proc/foo", "recipe.yaml, line 3: output_dir is '/proc/foo', which cannot be written"),
        ("fp16: true\nbf16: true\nuse_cpu: true", "recipe.yaml, line 3: At most one of fp16 and bf16 can be True"),
        ("use_cpu: true\nfsdp: sideways", "recipe.yaml, line 4: Unknown `fsdp` option: sideways"),
        (
            "use_cpu: true\nload_best_model_at_end: true",
            "line 4: load_best_model_at_end requires the save and eval strategy to match, except when "
            'save_strategy="best", but found - Evaluation strategy: no - Save strategy: steps',
        ),
        ("num_train_epochs: nan", "recipe.yaml, line 3: num_train_epochs is nan; it must be a number above 0"),
        ("seed: -1", "recipe.yaml, line 3: seed is -1; it must be a whole number of at least 0 and at most 4294967295"),
        ("debug: x", "recipe.yaml, line 3: debug is 'x'; it may be underflow_overflow or tpu_metrics_debug"),
        ("log_level: nope", "recipe.yaml, line 3: log_level is 'nope'; it may be detail, debug"),
        (
            "accelerator_config: abc",
            "recipe.yaml, line 3: accelerator_config is 'abc'; it must be a mapping, or a JSON",
        ),
        ("output_dir: ''", "recipe.yaml, line 3: output_dir is ''; it must be a folder to write to"),
        ("output_dir: " + "a" * 300, "which cannot be written: File name too long"),
    ],
    ids=lambda value: value[:40],
)
def test_a_mistake_in_a_recipe_is_named_by_file_line_and_field(
    lines: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    # Two lines before, so that a line is neither the first nor the only one.
    (tmp_path / "recipe.yaml").write_text(f"model: m/n\n\n{lines}\n" + ("" if "train_file" in lines else TRAINED))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "demonstration": "b"}')
    assert main(["train", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("sdft: ") and message.count("\n") == 1
    assert expected in message


TRAINED = "train_file: rows.jsonl\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learning-rate", "fast"], "--learning-rate is 'fast'; it must be a number"),
        (["--learning_rate=fast"], "--learning_rate is 'fast'; it must be a number"),
        (["--beta", "-1"], "--beta is -1.0; it must be a number from 0.001 to 0.999"),
        (["--beta"], "--beta has no value"),
        (["--lora_target_modules", "--beta", "0.5"], "--lora_target_modules has no value; it must have one or more"),
        (["--lerning_rate", "1"], "unknown field '--lerning_rate'; did you mean '--learning_rate'?"),
        (["-m", "x"], "unknown field '-m'"),
        (["--divergence", "kl"], "--divergence is 'kl'; it may be reverse_kl"),
        (["--output_dir", "/proc/foo"], "--output_dir is '/proc/foo', which cannot be written"),
        (["--train_file", "absent"], "--train_file is 'absent'; there is no such file"),
        (["--model", "./absent"], "--model is './absent': no such folder"),
        (["--model", "~nosuchuser/x"], "--model is '~nosuchuser/x': no such folder"),
        (["--load_best_model_at_end", "--save_strategy", "steps"], "--load_best_model_at_end requires"),
        (["--bf16", "--fp16", "--use_cpu"], "--fp16: At most one of fp16 and bf16 can be True"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_named_as_it_was_typed(
    flags: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "demonstration": "b"}')
    (tmp_path / "recipe.yaml").write_text("model: m/n\nbeta: 0.5\n" + TRAINED)
    assert main(["train", "recipe.yaml", *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"sdft: {expected}") and message.count("\n") == 1


def test_a_package_that_a_setting_takes_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "recipe.yaml").write_text("model: m/n\nlora_rank: 4\n" + TRAINED)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    assert main(["train", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "sdft: recipe.yaml, line 2: lora_rank is 4, which needs peft: pip install peft\n"


def test_flags_and_recipes_are_read_as_they_are_meant(tmp_path: Path) -> None:
    words = ["--bf16", "r.yaml", "--max-steps", "-1", "--no_dataloader_pin_memory", "--lora_rank=2"]
    words += ["--rollout_stop", "a", "- b", "--average_tokens_across_devices", "off", "--log_completions"]
    words += ["--rollout_batch_size", "8"]
    fields = FIELDS | own_fields(_lora())
    path, flags = read_flags(words, fields, "sdft train")
    assert path == "r.yaml"
    values = {name: fields[name].read(given.value) for name, given in flags.items()}
    assert values == {
        "bf16": True,
        "max_steps": -1,
        "dataloader_pin_memory": False,
        "lora_rank": 2,
        "rollout_stop": ["a", "- b"],
        "average_tokens_across_devices": False,
        "log_completions": True,
        "rollout_batch_size": 8,
    }
    assert fields["rollout_batch_size"].read("auto") == "auto"
    for words, listed in ((['["}", "\\n"]'], ["}", "\n"]), (["[INST]"], ["[INST]"]), (['["a"]', "b"], ['["a"]', "b"])):
        _, flags = read_flags(["--rollout_stop", *words], fields, "sdft train")
        assert fields["rollout_stop"].read(flags["rollout_stop"].value) == listed
    (tmp_path / "r.yaml").write_text("save_strategy: no\neval_strategy: off\nrun_name: no\nlearning_rate: 2e-5\n")
    found = {name: FIELDS[name].read(given.value) for name, given in read_recipe(str(tmp_path / "r.yaml")).items()}
    assert found == {"save_strategy": "no", "eval_strategy": "no", "run_name": "no", "learning_rate": 2e-5}


def _lora() -> type:
    from sdft.settings.inputs import LoraArguments

    return LoraArguments


@pytest.mark.parametrize("written", ["reverse-kl", "Reverse_KL", "REVERSE-KL"])
def test_case_hyphens_and_underscores_do_not_count_in_a_choice(written: str) -> None:
    assert MethodSettings(divergence=written).divergence == "reverse_kl"
    assert matching(written, DIVERGENCES) == "reverse_kl"
    given = read(["--lr_scheduler_type", "Cosine-With-Restarts"], FIELDS, command="sdft train")
    assert given.values == {"lr_scheduler_type": "cosine_with_restarts"}
    assert MethodSettings(teacher_template="Turn").teacher_template == "turn"
    with pytest.raises(UsageError):
        MethodSettings(divergence="reversekl")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["train", "--help-all"], 0),
        (["eval", "--help"], 0),
        (["generate", "--help"], 0),
        (["train", "typo.yaml"], 2),
        (["train", "--lerning_rate", "1"], 2),
        (["train", "--model", "m", "--train_file", __file__, "--output_dir", "/proc/foo"], 2),
        (["train", "--model", "./absent.gguf", "--train_file", __file__], 2),
        (["train", "--model", "m", "--train_file", __file__, "--beta", "2"], 2),
        (["train", "--model", "m", "--train_file", __file__, "--activation_checkpointing_kwargs", "3"], 2),
        (["eval", "--model", "m", "--eval_file", "absent"], 2),
        (["generate", "--model", "m", "--prompt", "x", "--output_file", "no/such"], 2),
    ],
    ids=str,
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(argv: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("learning_rate: fast\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = sum(os.times()[2:4])  # CPU seconds of children
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert sum(os.times()[2:4]) - started < 1
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2)


def test_mappings_that_are_merged_may_have_a_key_each(tmp_path: Path) -> None:
    """As YAML has it: the one that stands there goes before what is merged."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "chat_template_kwargs: &c {<<: {a: 1}, <<: {b: 1}, a: 2}\nteacher_chat_template_kwargs: *c\n", "utf-8"
    )
    found = read_recipe(str(path))
    assert {name: written.value for name, written in found.items()} == {
        "chat_template_kwargs": {"a": 2, "b": 1},
        "teacher_chat_template_kwargs": {"a": 2, "b": 1},
    }
