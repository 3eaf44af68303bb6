"""Models that were read from GGUF files, kept as they were read: to unpack their weights takes up to a minute.

A model is kept in a folder of `cache_folder()` whose name depends on the file's path, size and time, the numbers' type
and the release of transformers. To delete what is kept, delete the folder; nothing else is in it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

from sdft.checkpoints.files import follow_umask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VARIABLE = "SDFT_CACHE_DIR"


def cache_folder() -> Path | None:
    """Where models are kept: $SDFT_CACHE_DIR, or sdft in the user's cache; None where that variable is empty."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE]).expanduser() if os.environ[VARIABLE] else None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdft"


def kept_model(file: Path, dtype: str) -> Path | None:
    """The folder in which the model of a GGUF file is kept, or would be; None where none is to be."""
    folder = cache_folder()
    if folder is None:
        return None
    found = file.stat()
    key = (str(file.resolve()), found.st_size, found.st_mtime_ns, dtype, transformers.__version__)
    return folder / f"{file.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"


def keep(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a model as `folder`, whole or not at all. That it cannot be is no error: it is read from its file again."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    staged = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            return
        staged = folder.with_name(f".saving-{uuid.uuid4().hex}")
        staged.mkdir()
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        follow_umask(staged)
        staged.rename(folder)
        staged = None
    except Exception:  # each writer has its own errors for a disk that is full
        return
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    say(f"kept it for next time in {folder} ({size / 2**20:.0f} MiB)")


def say(line: str) -> None:
    """A line for who waits at a terminal."""
    if sys.stderr.isatty():
        print(f"sdft: {line}", file=sys.stderr)
