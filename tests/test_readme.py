"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdft import cli
from sdft.early_checks import check_readable
from sdft.settings.commands import DataCommand, EvalCommand, GenerateCommand, PlanCommand, ReportCommand
from sdft.settings.continual import fields_of_continual
from sdft.settings.fields import own_fields, training_fields
from sdft.settings.inputs import ColumnArguments, DataArguments, EvalArguments, LoraArguments, ModelArguments
from tests.cases import relative_error

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [block for named, block in FENCE.findall(README) if named == language]


LINES = [line.partition("  #")[0].strip() for block in blocks("") for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("sdft ")]
FIELDS = {
    "train": own_fields(ModelArguments, LoraArguments, DataArguments, ColumnArguments, EvalArguments)
    | training_fields(),
    "eval": own_fields(ModelArguments, EvalArguments, ColumnArguments, EvalCommand),
    "generate": own_fields(ModelArguments, ColumnArguments, GenerateCommand),
    "data": own_fields(DataArguments, ColumnArguments, DataCommand),
    "plan": own_fields(ModelArguments, LoraArguments, PlanCommand) | training_fields(),
    "report": own_fields(ReportCommand),
    "continual": fields_of_continual(),
}


def test_the_loss_is_what_it_replaces() -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks("python"):
        exec(block, names)
    out, expected = names["out"], names["expected"]
    assert relative_error(out.loss, expected) < 1e-5
    gradient = names["hidden"].grad.clone()
    names["hidden"].grad = None
    torch.set_flush_denormal(
        True
    )  # logits this far apart have many, and each takes a processor a hundred times as long
    try:
        expected.backward()
    finally:
        torch.set_flush_denormal(False)
    assert relative_error(gradient, names["hidden"].grad) < 1e-4


def test_the_recipe_has_fields_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (recipe,) = (yaml.safe_load(block) for block in blocks("yaml"))
    assert recipe.keys() <= FIELDS["train"].keys()
    for name, value in recipe.items():
        FIELDS["train"][name].read(str(value))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_there_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, name, *words = shlex.split(command)
    if name == "env" or "--help" in words:
        assert cli.main([name, *words]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5
        return
    for word in words:
        if word.startswith("--"):
            assert word[2:] in FIELDS[name], word
        elif word.endswith(".yaml") and "/" in word:
            check_readable("recipe", str(ROOT / word))


def test_settings_and_pages_that_are_named_are_there() -> None:
    table = README.split("\n## What settings cost and give\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(named) == 10 and named[0] == "max_forward_tokens" and set(named) <= FIELDS["train"].keys()
    for page in re.findall(r"\]\(([^)]+)\)", README):
        assert page.startswith("https://") or (ROOT / page).exists(), page
