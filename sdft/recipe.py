"""From a YAML recipe and `--field value` flags to settings; flags win over the recipe, the recipe over defaults.

Fields are those of the dataclasses in `sdft.config`, parsed by transformers' HfArgumentParser. Every mistake is a
UsageError of one sentence; an unknown field names the closest one there is.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from sdft.config import SDFTConfig
from sdft.errors import UsageError

# What --help shows of the many fields that come from transformers.TrainingArguments; all of them are accepted.
_OFTEN_SET = frozenset(
    {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "activation_checkpointing",
        "use_liger_kernel",
        "seed",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "per_device_eval_batch_size",
        "eval_strategy",
        "eval_steps",
        "report_to",
        "use_cpu",
    }
)


class RecipeParser(HfArgumentParser):
    """HfArgumentParser whose errors are UsageErrors and whose help keeps to what is often set."""

    def __init__(self, dataclasses: Sequence[Any], **options: Any) -> None:
        super().__init__(dataclasses, allow_abbrev=False, formatter_class=_HelpFormatter, **options)
        inherited = {field.name for field in fields(TrainingArguments)} if SDFTConfig in dataclasses else set()
        shown = _OFTEN_SET | {"output_dir", "learning_rate", "num_train_epochs", "logging_steps"}
        for action in self._actions:
            is_negation = bool(action.option_strings) and action.option_strings[0].startswith("--no_")
            if is_negation or action.dest in inherited - shown:
                action.help = argparse.SUPPRESS
            if action.dest == "log_completions":
                action.type = _every
        self._optionals._group_actions.sort(key=lambda action: action.dest in inherited)  # the method's own come first

    def error(self, message: str) -> Any:
        raise UsageError(message)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} VALUE"


def parse(
    parser: RecipeParser,
    argv: Sequence[str],
    *,
    ignored: Collection[str] = (),
    adapt: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, ...]:
    """The parser's dataclasses, filled from the recipe that `argv` names first and from its flags.

    A recipe may also have the `ignored` fields, which are set aside where the parser does not know them: they belong
    to another command. `adapt` changes the recipe in place before it is used.
    """
    parser.add_argument("recipe", nargs="?", help=argparse.SUPPRESS)
    given, unknown = parser.parse_known_args(argv)
    path = given.recipe
    known = [field.name for dataclass in parser.dataclass_types for field in fields(dataclass) if field.init]
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])  # its value may look like a recipe
        if not flag.startswith("-"):
            raise UsageError(f"{flag!r} is one argument too many: there is one recipe, and every --field has one value")
        name = flag.lstrip("-").split("=")[0].replace("-", "_")
        raise UsageError(f"unknown field {flag.split('=')[0]!r}{_suggestion(name, known, parser.prog, '--')}")
    if path is not None:
        recipe = read_recipe(path)
        for name in recipe:
            if name not in known and name not in ignored:
                raise UsageError(f"{path}: unknown field {name!r}{_suggestion(name, known, parser.prog)}")
        if adapt is not None:
            adapt(recipe)
        hints = {k: v for dataclass in parser.dataclass_types for k, v in get_type_hints(dataclass).items()}
        parser.set_defaults(**{n: _as_default(n, v, hints[n], path) for n, v in recipe.items() if n in known})
    try:
        *settings, _ = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    except UsageError:
        raise
    except (ValueError, ImportError) as error:  # what TrainingArguments finds wrong
        raise UsageError(" ".join(str(error).split())) from error
    return tuple(settings)


def read_recipe(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UsageError(f"{path} is not there: no such recipe")
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} is not a recipe: it must be lines of the form 'field: value'")
    return {str(name): value for name, value in recipe.items()}


def _as_default(name: str, value: Any, hint: Any, path: str) -> Any:
    """A recipe's value as the parser's default: scalars as text, so that they are checked as a flag's value is."""
    if isinstance(value, list | dict):
        if not any(kind in str(hint) for kind in ("list", "dict")):
            raise UsageError(f"{path}: {name} is {value!r}; it must be a single value")
        return value
    if value is None and type(None) not in get_args(hint):
        raise UsageError(f"{path}: {name} is not set; it must have a value, or be left out for the default")
    if value is False and name.endswith("_strategy"):  # what YAML makes of no
        return "no"
    return None if value is None else str(value)


def _every(value: str) -> int:
    """Every so many steps; true is every step and false is none."""
    switch = {"true": 1, "false": 0}.get(value.lower())
    try:
        return int(value) if switch is None else switch
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it is {value!r}; it must be a whole number, true or false") from error


def _suggestion(name: str, known: Sequence[str], command: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; see {command} --help for the fields there are"
