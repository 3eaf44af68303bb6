"""docs/architecture.md names what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    part = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("package", ["sdft", "sdft_kernels"])
def test_the_tree_has_every_file(package: str) -> None:
    table = PAGE.split(f"| `{package}/` | |")[1].split("\n\n")[0]
    listed = {name for line in table.splitlines()[2:] for name in names(line.split("|")[1])}
    for name in listed:
        assert (ROOT / package / name).exists(), name
    command = ["git", "ls-files", package]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for path in (Path(line).relative_to(package) for line in tracked):
        if path.name not in ("__init__.py", "py.typed"):
            assert any(path == Path(name) or Path(name) in path.parents for name in listed), path


def test_each_divergence_is_where_the_map_says() -> None:
    sources = {
        "definition": ["sdft_kernels/reference.py"],
        "torch": ["sdft_kernels/divergences.py", "sdft_kernels/coarse.py"],
        "C": ["sdft_kernels/backends/cpu/kernels.c"],
        "Triton": [f"sdft_kernels/backends/gpu/{name}.py" for name in ("divergence", "statistics", "math", "top")],
    }
    found = rows("From a formula to its code")
    assert len(found) == 8
    for _, *cells, test in found:
        for cell, files in zip(cells, sources.values(), strict=True):
            text = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
            for name in names(cell):
                assert re.search(rf"^(def|INLINE \w+|(static )?void) {name}\(", text, re.MULTILINE), name
        assert all((ROOT / "tests" / f"{name}.py").is_file() for name in names(test))


def test_other_names_on_the_page_are_in_the_code() -> None:
    sources = [path for path in ROOT.glob("sdft*/**/*") if path.suffix in (".py", ".c")]
    text = "\n".join([*(path.read_text("utf-8") for path in sources), *(str(path) for path in sources)])
    before, _, after = PAGE.partition("\n## From a formula to its code\n")
    for name in names(before.split("\n## One row of hidden states\n")[1] + after.split("\n## ")[1]):
        last = re.split(r"[./]", name.removesuffix(".py"))[-1].split("=")[0]
        assert re.search(rf"\b{re.escape(last)}\b", text) or (ROOT / name).exists(), name
