"""From `module:function`, as settings name a function of a user's own, to the function."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from sdft.errors import UsageError


def imported(setting: str, name: str, place: str) -> Callable[..., Any]:
    """The function at `place`, module:function, which a setting calls `name`; UsageError where it cannot be had."""
    module, _, path = place.partition(":")
    sys.path.insert(0, os.getcwd())  # a command's own folder is there in place of it
    try:
        function = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as error:  # a module is a user's code, and may raise anything
        raise UsageError(f"{setting} is {name!r}, which cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise UsageError(f"{setting} is {name!r}; it must be a function, and {path} is a {type(function).__name__}")
    found: Callable[..., Any] = function
    return found
