"""From `module:function`, as settings name a function of a user's own, to the function."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdft.errors import UsageError


def imported(setting: str, name: str, place: str) -> Callable[..., Any]:
    """The function at `place`, module:function, which a setting calls `name`; UsageError where it cannot be had."""
    module, _, path = place.partition(":")
    try:
        with _from_here():
            function = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # a module is a user's code, and may raise anything
        raise UsageError(f"{setting} is {name!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise UsageError(f"{setting} is {name!r}; it must be a function, and {path} is a {type(function).__name__}")
    found: Callable[..., Any] = function
    return found


def source_digest(place: str) -> str | None:
    """A digest of the file that module:function is in; None where it is not in one, or is no such name."""
    module, colon, _ = place.partition(":")
    try:
        with _from_here():
            found = importlib.util.find_spec(module) if colon else None
        return hashlib.sha256(Path(str(found and found.origin)).read_bytes()).hexdigest()
    except Exception:  # finding a module within a package imports the package, which may raise anything
        return None


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    """Modules in the working folder can be imported, as a command's own folder stands in place of it."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())
