"""The two kinds of failure that a user sees as one clear line: what was asked for is wrong, or the run went wrong.

`sdft` (the command) ends with exit code 2 for the first and 1 for the second. Library users catch them as the
ValueError and RuntimeError that they are.
"""

import reprlib
from typing import Any


class UsageError(ValueError):
    """A setting, a recipe, a file or a row that cannot be used as it is."""


class SettingsError(UsageError):
    """Settings that do not go together, in the words of transformers, which name them anywhere in the sentence."""


class TrainingError(RuntimeError):
    """A run that cannot go on: a loss or a gradient that is no longer finite, a head that the loss cannot reproduce."""


class Diverged(TrainingError):
    """A loss or a gradient that is no longer finite."""


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises in the command: it ends as Ctrl-C would end it."""


def kind_of(value: object) -> str:
    """What kind of value it is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    for kind, words in (((int, float), "a number"), (str, "a text"), ((list, tuple), "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return words
    return f"a {type(value).__name__}"


def counted(number: int, noun: str) -> str:
    """The number and its noun, which takes an s unless there is one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown(value: Any, width: int = 60) -> str:
    """A value as an error shows it: what is long is cut."""
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # aliases can make a list that never ends
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"
