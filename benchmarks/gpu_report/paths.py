"""A report is sent to others: of the paths in it, what lies above the checkout or a package's folder is cut."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: The folders of an absolute path, which is no part of a URL or of another path; and those above installed packages.
FOLDERS = r"(?<![\w/.-])~?/(?!/)(?:[^\s/'\"`:,;()<>]+/)"
ABSOLUTE = re.compile(f"{FOLDERS}+")
PACKAGES = re.compile(f"{FOLDERS}*?(?:site|dist)-packages/")


HOME = re.compile(re.escape(str(Path.home())) + r"(?![\w-])")


def without_paths(text: str) -> str:
    """The text, in which the folders of absolute paths are `…/`."""
    if "/" not in text:
        return text
    return ABSOLUTE.sub("…/", PACKAGES.sub("", HOME.sub("~", text.replace(f"{ROOT}/", ""))))
