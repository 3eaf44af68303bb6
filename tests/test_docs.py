"""The pages of docs/: what they link is there, what they name exists, what they show runs, and the site builds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.test_readme import FENCE, FIELDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if "gpu" not in page.relative_to(DOCS).parts]  # the others are made by the GPU report
TRAINER = {"total_flos", *(f"train_{name}" for name in ("runtime", "loss", "samples_per_second", "steps_per_second"))}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_of(nav: Any) -> Iterator[str]:
    """The pages that a part of the navigation has."""
    if isinstance(nav, str):
        yield nav
    for part in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from pages_of(part)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def test_the_navigation_has_every_page_once() -> None:
    assert sorted(pages_of(SITE["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_and_images_are_there(page: Path) -> None:
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        path = target.partition("#")[0]
        assert not path or re.match(r"\w+:", path) or (page.parent / path).exists(), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_every_table_has_a_head(page: Path) -> None:
    """An empty line ends a table, and rows behind it are shown as text with bars in it."""
    tables = re.findall(r"(?:^\|.*\n)+", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    assert [table for table in tables if not re.match(r".*\n\|[-:| ]+\|\n", table)] == []


@pytest.fixture(scope="module")
def sources() -> str:
    """All that a page may name: the packages, the benchmarks, the tests' and the examples' files."""
    files = [
        path for folder in ("sdft", "sdft_kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    files += [ROOT / "sdft_kernels" / "backends" / "cpu" / "kernels.c", ROOT / "pyproject.toml", ROOT / "mkdocs.yml"]
    return "\n".join([*map(str, files), *(path.read_text(encoding="utf-8") for path in files)])


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_names_and_flags_on_a_page_exist(page: Path, sources: str) -> None:
    fields = TRAINER.union(*FIELDS.values())
    for code in re.findall(r"`([^`\n]+)`", without_code(page.read_text(encoding="utf-8"))):
        if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", code):
            assert code in fields or re.search(rf"\b{code}\b", sources), code
        elif setting := re.fullmatch(r"([a-z0-9]+(?:_[a-z0-9]+)*): \S.*", code):
            assert setting[1] in fields, code
        elif flag := re.fullmatch(r"--([a-z0-9]+(?:_[a-z0-9]+)+)( \S+)?", code):
            assert flag[1] in fields or f'"--{flag[1]}"' in sources, code


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_commands_and_recipes_on_a_page_are_ones_that_there_are(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            for field, value in yaml.safe_load(block).items():
                kind = (FIELDS["continual"] | FIELDS["train"])[field]
                kind.read(value if isinstance(value, list | dict) else str(value))
        commands = [line.partition("  #")[0] for line in block.splitlines() if line.startswith("sdft ")]
        for _, command, *words in map(shlex.split, commands if not language else []):
            for word in words:
                if word.startswith("--") and not word.startswith("--help"):
                    assert word[2:] in FIELDS[command], word


def test_the_recipe_tables_have_every_field() -> None:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(hooks)
    finally:
        sys.path[:] = before
    table = hooks.field_tables()
    own = [field for field in FIELDS["train"].values() if not field.inherited]
    assert len(own) > 40 and sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(f.name for f in own)
    assert hooks.rewritten("[a](../README.md#more) [b](../Makefile)", "data.md") == "[a](index.md#more) b"
    assert hooks.rewritten("[a](../gpu.md)", "reference/sdft.md") == "[a](../gpu.md)"
    assert hooks.rewritten("[C](../CHANGELOG.md) <!-- included -->\n", "changelog.md").startswith("# Changelog")


def test_the_code_of_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    token = {"divergence": [0.5, 0.25], "completion": "No.", "completion_ids": [1, 2]}
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "finished": 1.0}\n{"step": 1, "train_runtime": 1.0}\n')
    (run / "completions.jsonl").write_text(json.dumps({"step": 1, **token}) + "\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = [block for language, block in FENCE.findall((DOCS / "quickstart.md").read_text()) if language == "python"]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert names["out"].loss.isfinite() and names["hidden"].grad.isfinite().all()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for tool in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        try:
            found = importlib.util.find_spec(tool)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{tool} is not installed (pip install '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img)[^>]*\ssrc=\"https?:|<link[^>]*stylesheet[^>]*href=\"https?:", text), page
    reference = (tmp_path / "site" / "reference" / "sdft_kernels.html").read_text(encoding="utf-8")
    assert "student_hidden" in reference and "skew_reverse_kl" in reference and ":class:" not in reference


def test_the_loop_on_the_page_of_integrations_is_the_loss_of_full_logits() -> None:
    from tests.tiny import tiny_model

    page = (DOCS / "integrations.md").read_text(encoding="utf-8")
    (block,) = [block for language, block in FENCE.findall(page) if language == "python" and "def lined_up" in block]
    names: dict[str, Any] = {}
    exec(compile(block, "docs/integrations.md", "exec"), names)
    student, teacher = tiny_model(), tiny_model(seed=1)
    prompts, shown, completions = [[5, 6], [7, 8, 9]], [[5, 6, 7, 8], [9]], [[10, 11, 12], [13]]
    names["check_head"](student, prompts[0])
    loss = names["loss_of"](student, teacher, prompts, shown, completions)

    def log_probs(model: Any, prompts: list[list[int]]) -> torch.Tensor:
        logits = [
            model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return torch.cat(logits).log_softmax(-1)

    own, taught = log_probs(student, prompts), log_probs(teacher, shown)
    assert loss.item() == pytest.approx((own.exp() * (own - taught)).sum(-1).mean().item(), rel=1e-5)
