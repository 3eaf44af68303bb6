"""Files that are whole or not there: everything is written under `.saving`, then renamed to where it belongs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

STAGING = ".saving"


@contextlib.contextmanager
def staging(folder: str, *, owner: bool = True) -> Iterator[str]:
    """`folder`/.saving, empty; removed at the end with whatever was not moved out of it.

    Of several processes that write into it, one is the owner, who makes it and removes it.
    """
    path = os.path.join(folder, STAGING)
    if owner:
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
    try:
        yield path
    finally:
        if owner:
            shutil.rmtree(path, ignore_errors=True)


def publish_folder(staged: str, final: str) -> None:
    """Give a finished folder its name; one that has the name already moves out of the way and goes with the staging."""
    if os.path.isdir(final):
        os.rename(final, staged + ".replaced")
    os.rename(staged, final)


def publish_files(staged: str, final: str) -> None:
    """Move each finished file into `final`, replacing the file of that name."""
    for name in sorted(os.listdir(staged)):
        os.replace(os.path.join(staged, name), os.path.join(final, name))


@contextlib.contextmanager
def in_one_move(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, or goes if something went wrong."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.saving")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one move."""
    with in_one_move(path) as beside:
        beside.write_text(text, encoding="utf-8")
