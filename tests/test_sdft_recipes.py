"""Every recipe in examples/, read by the command itself up to where a model would be loaded."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sdft import cli, early_checks, rows
from sdft.commands import train as run

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
#: The settings of arXiv 2601.19897, in all recipes for GPUs.
PAPER = {
    "method": "sdft",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "ema_rate": 0.01,
    "teacher": "ema",
    "teacher_template": "paper",
    "max_completion_length": 2048,
    "skip_tokens": 3,
    "rollout_temperature": 1.0,
    "divergence": "reverse_kl",
}
FOR_GPU = [name for name in RECIPES if name.startswith("qwen")]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What `sdft train RECIPE` hands to the run, by field."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        early_checks, "check_rows", lambda field, source: None
    )  # a recipe names files that are the user's
    monkeypatch.setattr(early_checks, "check_packages_of", lambda values: None)  # and packages of a GPU's
    monkeypatch.setattr(rows, "rows_of_train", lambda data, of_eval, *_: SimpleNamespace(**vars(data), **vars(of_eval)))

    def read(name: str) -> dict[str, Any]:
        handed: list[Any] = []
        resolved: dict[str, str] = {}
        monkeypatch.setattr(run, "train", lambda *settings, **rest: handed.extend(settings) or resolved.update(rest))
        assert cli.main(["train", str(EXAMPLES / name)]) == 0
        assert os.listdir(tmp_path) == [], "a recipe is read without a trace"
        found = {field: value for dataclass in handed for field, value in vars(dataclass).items()}
        return found | {"resolved": resolved["recipe"]}

    return read


def plain(value: Any) -> Any:
    """A value as it may stand in YAML; numbers as numbers, since YAML 1.1 takes 2e-5 for text."""
    value = value.value if isinstance(value, Enum) else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_arrives_as_written(name: str, settings: Any) -> None:
    found = settings(name)
    written = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    assert {field: plain(found[field]) for field in written} == {field: plain(v) for field, v in written.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_recipe_gives_the_same_settings(
    name: str, settings: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = settings(name)
    resolved = tmp_path_factory.mktemp("resolved") / "recipe.yaml"
    resolved.write_text(found["resolved"], encoding="utf-8")
    again = settings(str(resolved))
    differ = {field for field in found if again[field] != found[field] and repr(again[field]) != repr(found[field])}
    assert differ <= {"resolved"}
    assert yaml.safe_load(again["resolved"]) == yaml.safe_load(found["resolved"])
    assert {"learning_rate", "weight_decay", "lora_rank"} < yaml.safe_load(found["resolved"]).keys()


def test_the_resolved_recipe_has_no_secret(settings: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    lines = ("model: m", "train_file: f", "use_cpu: true", "hub_token: hf_secret", "overwrite_output_dir: true")
    recipe.write_text("\n".join(lines))
    written = settings(str(recipe))["resolved"]
    assert "secret" not in written and not {"hub_token", "overwrite_output_dir"} & yaml.safe_load(written).keys()


@pytest.mark.parametrize("name", FOR_GPU)
def test_recipes_for_gpus_have_the_papers_settings(name: str, settings: Any) -> None:
    found = settings(name)
    wanted = PAPER | ({"learning_rate": 10 * PAPER["learning_rate"]} if "lora" in name else {})  # of an adapter
    assert {field: plain(found[field]) for field in PAPER} == {field: plain(value) for field, value in wanted.items()}
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 32
    assert found["dtype"] == "bfloat16" and found["activation_checkpointing"] and found["use_liger_kernel"]
    if "lora" in name:
        assert found["lora_rank"] == 64 and found["lora_target_modules"] == ["all-linear"]
    else:
        assert found["lora_rank"] == 0 and "8bit" in found["optim"]


def test_there_is_a_recipe_for_each_model_and_way() -> None:
    assert RECIPES == [
        "demo.yaml",
        "on-policy-distillation.yaml",
        "qwen2.5-7b-lora.yaml",
        "qwen2.5-7b.yaml",
        "qwen3-4b-lora.yaml",
        "qwen3-4b.yaml",
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_writes_to_a_folder_of_its_own(name: str, settings: Any) -> None:
    folder = settings(name)["output_dir"]
    assert folder == f"runs/{name.removesuffix('.yaml')}"


def test_no_and_true_mean_what_they_say(settings: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """YAML takes both for booleans, whatever the field."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    fields = ("save_strategy: no", "eval_strategy: no", "logging_strategy: no", "log_completions: true")
    recipe.write_text("\n".join(("model: m", "train_file: f", "use_cpu: true", *fields)))
    found = settings(str(recipe))
    assert [found[f"{kind}_strategy"] for kind in ("save", "eval", "logging")] == ["no", "no", "no"]
    assert found["log_completions"] == 1


def test_log_completions_may_be_true_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setattr(run, "train", lambda *settings, **_: handed.append(settings[-1].log_completions))
    for value in ("true", "False", "3"):
        assert cli.main(["train", str(EXAMPLES / "demo.yaml"), "--log_completions", value]) == 0
    assert handed == [1, 0, 3]
