"""What mkdocs does to a page of docs/ before it builds it, so that the same page also reads well in the repository.

- `[NAME](FILE) <!-- included -->`, for a whole page, becomes the file: the site has CONTRIBUTING.md, as the repository
  has it.
- `<!-- fields -->` becomes the tables of a recipe's fields, made of the dataclasses that `sdft train` reads.
- A link to a file outside docs/ goes to the page that includes the file. Where there is none, its text stays.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout, whatever is installed

#: Files outside docs/, and the pages that stand for them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "examples": "examples.md",
}
INCLUDED = re.compile(r"^\[[^\]]*\]\(([^)\s]+)\) <!-- included -->$", re.MULTILINE)
FIELDS = "<!-- fields -->"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page as it goes into the site."""
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, source: str) -> str:
    """A page's text with its markers filled in and its links kept inside the site; `source` is its path in docs/."""

    folder = PurePosixPath("docs", source).parent
    if only := INCLUDED.fullmatch(markdown.strip()):
        file = normpath(str(folder / only[1]))
        return linked((ROOT / file).read_text(encoding="utf-8"), PurePosixPath(file).parent, source)
    markdown = linked(markdown, folder, source)
    return markdown.replace(FIELDS, field_tables()) if FIELDS in markdown else markdown


def linked(markdown: str, folder: PurePosixPath, source: str) -> str:
    """The text of a file that lies in a folder of the repository, with links as they are from a page of the site."""

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return found[0]
        inside = normpath(str(folder / path))
        page = PAGES.get(inside, inside.removeprefix("docs/") if inside.startswith("docs/") else None)
        if page is None:
            return text
        there = relpath(page, str(PurePosixPath(source).parent))
        return f"[{text}]({there}{'#' if anchor else ''}{anchor})"

    parts = FENCE.split(markdown)  # every other one is a block of code
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def field_tables() -> str:
    """A table for each group of fields of `sdft train`: name, default, and what --help-all says."""
    from sdft.settings.config import EvalSettings, MethodSettings
    from sdft.settings.inputs import ColumnArguments, DataArguments, EvalArguments, LoraArguments, ModelArguments

    scoring = {field.name for field in dataclasses.fields(EvalSettings)}
    groups = {
        "The model": dataclasses.fields(ModelArguments),
        "An adapter": dataclasses.fields(LoraArguments),
        "Data": [each for kind in (DataArguments, ColumnArguments, EvalArguments) for each in dataclasses.fields(kind)],
        "Answers and their scoring": dataclasses.fields(EvalSettings),
        "Method and training": [each for each in dataclasses.fields(MethodSettings) if each.name not in scoring],
    }
    return "\n\n".join(f"## {title}\n\n{_table(fields)}" for title, fields in groups.items())


def _table(fields: Any) -> str:
    rows = ["| field | default | what it is |", "|---|---|---|"]
    for field in fields:
        help = field.metadata["help"].replace("|", "\\|")
        help = re.sub(r"\{(\w+)\}|\b\w*_\w+(?:\.\w+)*\b|skew_\*", lambda found: f"`{found[0]}`", help)
        rows.append(f"| `{field.name}` | {_default(field)} | {help} |")
    return "\n".join(rows)


def _default(field: Any) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory()
    if value in (None, ""):
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
