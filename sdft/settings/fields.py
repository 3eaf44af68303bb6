"""The fields that a command takes, and how each reads a value, found out without importing transformers.

The method's own fields are dataclass fields. Those of `transformers.TrainingArguments` are read from its source, which
takes a twentieth of a second where importing it takes five.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdft.errors import UsageError, shown
from sdft.settings.checks import chosen
from sdft.settings.config import MethodSettings
from sdft.settings.inherited import CHOICES, help_here

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Field:
    """A field: the kinds of value it may have, its choices where only those are allowed, and what --help says."""

    name: str
    kinds: frozenset[str]
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""
    inherited: bool = False
    items: str = "texts"  # what a list has

    @property
    def is_switch(self) -> bool:
        """Whether naming it on the command line is enough."""
        return "bool" in self.kinds

    @property
    def is_list(self) -> bool:
        """Whether it takes several words of the command line."""
        return "list" in self.kinds and "str" not in self.kinds

    def read(self, value: Any) -> Any:
        """What a text, a list, a mapping or None stands for; UsageError where the field cannot have it."""
        kinds = self.kinds
        if value is None or (value == "null" and "None" in kinds):  # as a recipe says it, in a flag too
            if "None" not in kinds:
                raise UsageError(f"{self.name} is not set; it must have a value, or be left out for the default")
            return None
        if isinstance(value, list | dict):
            if type(value).__name__ in kinds:
                return value
            if not kinds & {"list", "dict"}:
                raise UsageError(f"{self.name} is {shown(value)}; it must be a single value")
            raise self._refusal(value)
        if self.choices:
            if value.lower() in NO and "no" in self.choices:
                return "no"
            return chosen(self.name, value, self.choices)
        try:
            return self._from_text(value)
        except (ValueError, RecursionError):
            raise self._refusal(value) from None

    def _from_text(self, text: str) -> Any:
        for kind, opens in ((dict, "{"), (list, "[")):
            if kind.__name__ in self.kinds and text.lstrip().startswith(opens):
                with contextlib.suppress(yaml.YAMLError):  # which JSON is, too
                    if isinstance(found := yaml.safe_load(text), kind):
                        return found
                if kind is dict:
                    raise ValueError
        if "str" in self.kinds:
            return int(text) if "int" in self.kinds and text.isdecimal() else text
        if "int" in self.kinds and text.lower() not in (*YES[:-1], *NO[:-1]):
            return int(text)
        if "float" in self.kinds:
            return float(text)
        if self.is_switch and text.lower() in (*YES, *NO):
            return text.lower() in YES
        raise ValueError

    def _refusal(self, value: Any) -> UsageError:
        words = {
            "float": "a number",
            "int": "a whole number",
            "bool": "true or false",
            "list": f"a list of {self.items}",
            "dict": "a mapping",
            "str": "a text",
        }
        allowed = [text for kind, text in words.items() if kind in self.kinds]
        if not allowed:
            return UsageError(f"{self.name} is {shown(value)}; it can only be set from Python")
        return UsageError(f"{self.name} is {shown(value)}; it must be {' or '.join(allowed)}")


def own_fields(*settings: Any) -> dict[str, Field]:
    """The fields of dataclasses of `sdft.settings.config` by name."""
    found = {}
    for field in (field for each in settings for field in dataclasses.fields(each)):
        default = None if field.default is dataclasses.MISSING else field.default
        kinds, items = str(field.type), {"list[int]": "whole numbers", "list[dict": "messages"}
        items_of = next((name for kind, name in items.items() if kind in kinds), "texts")
        found[field.name] = Field(field.name, _kinds(kinds), (), default, field.metadata["help"], items=items_of)
    return found


def training_fields() -> dict[str, Field]:
    """The fields of `SDFTConfig` by name: the method's, then those of `transformers.TrainingArguments`."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("transformers is not installed, which training takes: pip install 'sdft-kernels[train]'")
    folder = Path(spec.submodule_search_locations[0])
    classes = {
        node.name: node
        for name in ("trainer_utils.py", "training_args.py")
        for node in ast.parse((folder / name).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    found = own_fields(MethodSettings)
    for name, annotation, value in _assignments(classes["TrainingArguments"]):
        kinds = _kinds(annotation)
        enums = [classes[kind] for kind in kinds if kind in classes]
        choices = tuple(ast.literal_eval(value) for enum in enums for value in _values(enum)) or CHOICES.get(name, ())
        default, text = _default_and_help(value)
        found.setdefault(name, Field(name, kinds, choices, default, help_here(name, text), inherited=True))
    # transformers 5.17 has it by an older name alone; see sdft._compat.
    found.setdefault(
        "activation_checkpointing",
        Field("activation_checkpointing", frozenset({"bool"}), default=False, inherited=True),
    )
    return found


def _kinds(annotation: str) -> frozenset[str]:
    """The names of the types in a union, without what is in their brackets."""
    depth, bare = 0, ""
    for character in annotation:
        depth += (character == "[") - (character == "]")
        if depth == 0 and character != "]":
            bare += character
    return frozenset(part.strip() for part in bare.split("|"))


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, str, ast.expr | None]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, ast.unparse(line.annotation), line.value


def _values(enum: ast.ClassDef) -> Iterator[ast.expr]:
    return (line.value for line in enum.body if isinstance(line, ast.Assign))


def _default_and_help(value: ast.expr | None) -> tuple[Any, str]:
    """The default and the help text of `field(default=..., metadata={"help": ...})`, where they are literals."""
    given = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    metadata = given.get("metadata")
    if isinstance(metadata, ast.Dict):
        texts = {ast.unparse(key): text for key, text in zip(metadata.keys, metadata.values, strict=True) if key}
        given["help"] = texts["'help'"]
    return _literal(given.get("default")), _literal(given.get("help")) or ""


def _literal(node: ast.expr | None) -> Any:
    """What an expression stands for, where it needs no code to be run; else None."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
