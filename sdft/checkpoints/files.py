"""Files that are whole or not there: everything is written under `.saving`, then renamed to where it belongs.

What a rename makes visible has reached the disk before it (fsync), so that a machine that loses power leaves no
checkpoint with a good name and empty files, and what is removed loses its name before it loses its files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdft.errors import TrainingError

STAGING = ".saving"
REPLACED = ".replaced"
CONFIGURATIONS = ("adapter_config.json", "config.json")
WEIGHTS = ("adapter_model.*", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


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


@contextlib.contextmanager
def failing_clearly(what: str, folder: str) -> Iterator[None]:
    """TrainingError in one sentence if `what` cannot be written to `folder`.

    A full disk looks different to each writer: torch.save raises a RuntimeError, safetensors an error of its own, and
    everything else an OSError.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        from transformers.trainer_utils import get_last_checkpoint  # brings peft and models

        free = shutil.disk_usage(folder).free / 2**20 if os.path.isdir(folder) else 0.0
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        kept = f"{os.path.basename(last)} is whole" if last else "there was no checkpoint before it"
        reason = "the disk is full" if free < 1 else (str(error) or type(error).__name__).strip().splitlines()[0]
        raise TrainingError(
            f"{what} could not be written to {folder} ({free:.0f} MiB free): {reason}; {kept}"
        ) from error


def follow_umask(folder: str | Path) -> None:
    """Let others read the files as they may the folders, which were made under the umask: safetensors lets nobody."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(path.parent.stat().st_mode & 0o666)


def publish_folder(staged: str, final: str) -> None:
    """Give a finished folder its name; one that has the name already moves out of the way and goes with the staging.

    A run that is killed while neither has the name leaves the old one beside it, where `recover` finds it.
    """
    follow_umask(staged)
    for folder, _, names in os.walk(staged):
        for name in names:
            _sync(os.path.join(folder, name))
        _sync(folder)
    aside = final + REPLACED
    if os.path.isdir(final):
        os.rename(final, aside)
    os.rename(staged, final)
    _sync(os.path.dirname(final))
    if os.path.isdir(aside):
        os.rename(aside, staged + REPLACED)


def recover(folder: str | Path) -> None:
    """Give its name back to a checkpoint that was about to be replaced when its run was killed."""
    for aside in Path(folder).glob(f"checkpoint-*{REPLACED}"):
        final = aside.with_name(aside.name.removesuffix(REPLACED))
        if final.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                aside.rename(final)


def publish_files(staged: str, final: str) -> None:
    """Move each finished file into `final`, replacing the file of that name; a new model replaces an old one.

    A folder with an adapter's configuration is an adapter, whatever else is in it, and may be its model's folder too: a
    model removes what is left of an adapter, not the reverse. A configuration comes last and the old one goes first, so
    that a run which is killed in between leaves the old model or the new one.
    """
    names = sorted(os.listdir(staged), key=lambda name: (name in CONFIGURATIONS, name))
    follow_umask(staged)
    for name in names:
        _sync(os.path.join(staged, name))
        os.replace(os.path.join(staged, name), os.path.join(final, name))
    _sync(final)
    if "config.json" in names:
        for name in sorted(os.listdir(final), key=lambda name: (name not in CONFIGURATIONS, name)):
            if name not in names and any(fnmatch(name, pattern) for pattern in (*CONFIGURATIONS, *WEIGHTS)):
                os.remove(os.path.join(final, name))
                _sync(final)


def rotate(folder: str, limit: int | None, best: str | None, staged: str) -> None:
    """Keep the newest `limit` checkpoints (None or 0: all) and the best; the others move to the staging and go with it.

    Were they removed where they are, one that had lost half of its files could be taken for the newest.
    """
    if not limit or limit < 0:
        return
    from transformers.trainer_utils import sort_checkpoints

    checkpoints = sort_checkpoints(folder, use_mtime=True)
    kept = {checkpoints[-1], str(Path(best)) if best else checkpoints[-1]}
    for path in checkpoints[: len(checkpoints) - limit]:
        if path not in kept:
            os.rename(path, os.path.join(staged, f"{os.path.basename(path)}.old"))


def remove_checkpoints(folder: Path, names: Iterable[str]) -> None:
    """Remove those of the checkpoints that are there, so that none is ever there in part."""
    with staging(str(folder)) as staged:
        for name in names:
            if (folder / name).is_dir():
                (folder / name).rename(Path(staged) / name)


@contextlib.contextmanager
def in_one_move(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, or goes if something went wrong."""
    path = Path(path).resolve()  # a link stays a link
    beside = path.with_name(f".{path.name}.saving")
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in one move."""
    with in_one_move(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file in one move. A number that is not finite, which JSON has no word for, is null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: str | Path) -> None:
    """Have a file's contents, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
