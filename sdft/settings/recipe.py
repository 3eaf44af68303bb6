"""From a YAML recipe and `--field value` flags to settings; flags win over the recipe, the recipe over defaults.

Every mistake is a UsageError of one sentence that says where it is: a file's line, or a flag as it was typed. An
unknown field names the closest one there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sdft.errors import SettingsError, UsageError
from sdft.run_files import RESOLVED_FILE
from sdft.settings.fields import NO, YES, Field

Settings = TypeVar("Settings")

#: How files of other kinds are named, by their endings.
_ROWS = "files of rows are named by fields: --train_file, --eval_file, --general_file or --prompt_file"
NAMED_BY = {".jsonl": _ROWS, ".parquet": _ROWS, ".csv": _ROWS, ".gguf": "a model is named by --model"}

#: The tag of `<<`, which may be there several times.
MERGE = "tag:yaml.org,2002:merge"

#: What is not in a resolved recipe: a secret, and how the run was begun.
UNRESOLVED = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir")


@dataclass(frozen=True)
class Written:
    """A value as it was written: text (None, list or mapping in a recipe too), and where it stands."""

    value: Any
    place: str  # "recipe.yaml, line 7", or "--learning-rate"


@dataclass(frozen=True)
class Given:
    """What a recipe and flags say, read as each field takes it."""

    values: dict[str, Any]
    places: dict[str, str]

    @property
    def flags(self) -> list[str]:
        """The fields that the command line has set; a recipe's may be meant for another command."""
        return [name for name, place in self.places.items() if place.startswith("--")]

    def make(self, settings: type[Settings]) -> Settings:
        """A dataclass of the values that it has fields for."""
        names = {field.name for field in dataclasses.fields(settings) if field.init}  # type: ignore[arg-type]
        try:
            return settings(**{name: value for name, value in self.values.items() if name in names})
        except UsageError:
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:  # what TrainingArguments finds wrong
            message = re.sub(r"--(?=[a-z])", "", " ".join(str(error).split()))  # it names flags nobody has typed
            raise SettingsError(re.sub(r"\w+Strategy\.(\w+)", lambda found: found[1].lower(), message)) from error

    def after_run(self) -> Given:
        """With what the run that left the model told its chat template, where nothing else is said."""
        return dataclasses.replace(self, values={**chat_of_run(str(self.values.get("model", ""))), **self.values})

    def resolved(self, *settings: type) -> str:
        """A recipe that gives the same: every field of these dataclasses, by default where nothing was said."""
        values: dict[str, Any] = {}
        for field in (field for each in settings for field in dataclasses.fields(each) if field.init):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = self.values.get(field.name, default)
            values[field.name] = value.value if isinstance(value, enum.Enum) else value
        kept = {name: value for name, value in values.items() if name not in UNRESOLVED}
        return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Have a UsageError that begins with a field, or a SettingsError that has one, say where that was set."""
        try:
            yield
        except UsageError as error:
            message = _locate(str(error), self.places)
            if isinstance(error, SettingsError) and message == str(error):
                # Without backticks an ordinary word (model, seed) is taken for the word, not for the field.
                names = re.findall(r"(?<=`)[a-z]\w*(?=`)|[a-z]\w*[_\d]\w*", message)
                place = next((self.places[name] for name in names if name in self.places), None)
                message = f"{place}: {message}" if place else message
            raise UsageError(message) from error


def read(
    argv: Sequence[str],
    fields: Mapping[str, Field],
    *,
    command: str,
    ignored: Collection[str] = (),
    adapt: Callable[[dict[str, Written]], None] | None = None,
    words_of: str | None = None,
) -> Given:
    """The values that the recipe which `argv` names first, and its flags, give to `fields`.

    A recipe may also have the `ignored` fields, which are set aside where they are not among `fields`: they belong to
    another command. `adapt` changes what a recipe says before it is used. Of a command without a recipe `words_of` is
    the field, a list, that words before and between the flags belong to.
    """
    path, flags = read_flags(argv, fields, command, words_of)
    written: dict[str, Written] = {}
    if path is not None:
        written = read_recipe(path)
        for name, given in written.items():
            if name not in fields and name not in ignored:
                raise UsageError(f"{given.place}: unknown field {name!r}{suggestion(name, fields, command)}")
        if adapt is not None:
            adapt(written)
        written = {name: given for name, given in written.items() if name in fields}
    written.update(flags)
    places = {name: given.place for name, given in written.items()}
    try:
        return Given({name: fields[name].read(given.value) for name, given in written.items()}, places)
    except UsageError as error:
        raise UsageError(_locate(str(error), places)) from error


def chat_of_run(folder: str) -> dict[str, Any]:
    """What a run that left its model in this folder told the chat template; nothing where it is no run's."""
    try:
        recipe = yaml.safe_load((Path(folder) / RESOLVED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # no run's, or a name that is no path
        return {}
    names = ("chat_template_kwargs", "teacher_chat_template_kwargs")
    return {name: recipe[name] for name in names if isinstance(recipe, dict) and recipe.get(name) is not None}


def read_flags(
    argv: Sequence[str], fields: Mapping[str, Field], command: str, words_of: str | None = None
) -> tuple[str | None, dict[str, Written]]:
    """The recipe's path, if there is one, and the flags by the names of their fields."""
    path: str | None = None
    flags: dict[str, Written] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            if words_of is not None:
                flags.setdefault(words_of, Written([], f"--{words_of}")).value.append(word)
                continue
            if path is not None:
                raise UsageError(f"{word!r} is one argument too many: there is one recipe, and every --field one value")
            path = word
            continue
        flag, has_value, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switched_off = name.removeprefix("no_")
        if name not in fields and switched_off in fields and fields[switched_off].is_switch and not has_value:
            flags[switched_off] = Written("false", flag)
            continue
        if name not in fields or not flag.startswith("--"):
            raise UsageError(f"unknown field {flag!r}{suggestion(name, fields, command, '--')}")
        field = fields[name]
        values = [value] if has_value else []
        while words and not words[0].startswith("--") and (field.is_list or not values):
            if field.is_switch and not values and words[0].lower() not in (*YES, *NO) and "int" not in field.kinds:
                break  # the next word is another's
            values.append(words.pop(0))
        if not values and not field.is_switch:
            raise UsageError(f"{flag} has no value; it must have {'one or more' if field.is_list else 'one'}")
        flags[name] = Written(_listed(values) if field.is_list else values[0] if values else "true", flag)
    return path, flags


def _listed(words: list[str]) -> list[Any]:
    """The words of a list's flag, or the list that the only word is in JSON: a text may begin with a bracket."""
    with contextlib.suppress(ValueError):
        if len(words) == 1 and isinstance(found := json.loads(words[0]), list):
            return found
    return words


def read_recipe(path: str) -> dict[str, Written]:
    """What a recipe says by name: scalars as the text that stands there, so that a flag's value is read as they are."""
    if not Path(path).is_file():
        if Path(path).is_dir():
            raise UsageError(f"{path} is a folder; it must be a recipe, and a model is named by --model {path}")
        other = "; a recipe is a YAML file, and any other value follows the name of its field, as in --model NAME"
        is_yaml = Path(path).suffix.lower() in (".yaml", ".yml")
        raise UsageError(f"{path} is not there: no such recipe{'' if is_yaml else other}")
    if (kind := Path(path).suffix.lower()) in NAMED_BY:
        raise UsageError(f"{path} is no recipe, which is a YAML file; {NAMED_BY[kind]}")
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UsageError(f"{path} is not a recipe: it must be lines of the form 'field: value'")
        return _fields_of(node, loader, path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UsageError(f"{where}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not a recipe: it is nested too deeply") from error


def _fields_of(node: yaml.MappingNode, loader: yaml.SafeLoader, path: str) -> dict[str, Written]:
    found: dict[str, Written] = {}
    lines: dict[str, int] = {}
    for _, value in node.value:
        _check_once(value, path)
    for key, value in node.value:
        line = key.start_mark.line + 1
        place = f"{path}, line {line}"
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError(f"{place}: a field's name must be a word")
        name = key.value
        if name in found:
            raise UsageError(f"{place}: {name} is set twice; line {lines[name]} has set it before")
        lines[name] = line
        try:
            found[name] = Written(_value(value, loader), place)
            json.dumps(found[name].value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{place}: {name} has half of a surrogate pair, which is no character") from error
        except (ValueError, TypeError) as error:  # what looks like a date or a number and is none
            raise UsageError(f"{place}: {name} cannot be read: {error}") from error
    return found


def _check_once(node: yaml.Node, path: str) -> None:
    """UsageError where a mapping within a field's value has a key twice: YAML keeps the last, and says nothing."""
    waiting, seen = [node], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:  # an alias can make a mapping that has itself
            continue
        seen.add(id(each))
        if isinstance(each, yaml.SequenceNode):
            waiting += each.value
        if isinstance(each, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in each.value:
                name, line = str(key.value), key.start_mark.line + 1
                if key.tag != MERGE and isinstance(key, yaml.ScalarNode) and name in lines:
                    raise UsageError(f"{path}, line {line}: {name} is set twice; line {lines[name]} has set it before")
                lines[name] = line
                waiting += [key, value]


def _value(node: yaml.Node, loader: yaml.SafeLoader) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode) and all(isinstance(part, yaml.ScalarNode) for part in node.value):
        return [part.value for part in node.value]
    return loader.construct_object(node, deep=True)


def _locate(message: str, places: Mapping[str, str]) -> str:
    """The message, with the place where the field was set that is its first word."""
    name, space, rest = message.partition(" ")
    place = places.get(name)
    if place is None:
        return message
    return f"{place}{space}{rest}" if place.startswith("--") else f"{place}: {message}"


def suggestion(name: str, known: Collection[str], command: str, prefix: str = "") -> str:
    """What may be said of a name that is not known: the one that is closest, or where all of them are."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; see {command} --help-all for the fields there are"
