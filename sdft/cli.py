"""The `sdft` command: what it is told, and how it ends.

Exit codes: 0 done (or training stopped by SIGTERM and saved), 1 the run went wrong, 2 it was asked for something that
cannot be, 130 interrupted by Ctrl-C, 143 ended by SIGTERM. A mistake is one line on stderr. Everything that takes long
to import is imported only once a command is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from sdft.errors import Terminated

HELP = """\
usage: sdft COMMAND ...

Self-distillation fine-tuning: a language model learns from demonstrations by becoming its own teacher.

commands:
  train     train a model on demonstrations by a recipe
  eval      score a model on held-out prompts, and measure what it forgot
  generate  let a model answer a prompt, or a file of them

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --learning_rate 1e-4 --output_dir runs/faster
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl
  sdft generate --model runs/demo --prompt "Ring Tomas for me."
  sdft train --help
"""

TRAIN_HELP = """\
Train a model on demonstrations. Every field can stand in the recipe (field: value) or on the command line, which wins.

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --divergence reverse_kl --max_steps 100 --output_dir runs/reverse
  sdft train examples/demo.yaml --method sft --output_dir runs/sft
  sdft train examples/demo.yaml --resume_from_checkpoint last
  sdft train examples/demo.yaml --eval_strategy steps --eval_steps 10
  sdft train --model Qwen/Qwen2.5-0.5B-Instruct --train_file mine.jsonl --output_dir runs/mine
"""

TRAIN_MORE = """\
Every field of transformers.TrainingArguments is accepted, those not shown here included:
https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""

EVAL_HELP = """\
Score a model: its answers to held-out prompts, and how far it has moved from its base model on general ones.
With --teacher, also the answers it gives when shown the demonstrations, in each form that they can be shown in: what
the teacher cannot do with a demonstration, the student cannot learn from it.

examples:
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl --eval_completion_length 18
  sdft eval examples/demo.yaml --model runs/demo
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl --scorer json
  sdft eval --model runs/demo --eval_file mine.jsonl --scorer choice --eval_temperature 0.7 --eval_samples 8
  sdft eval examples/demo.yaml --teacher
  sdft eval examples/demo.yaml --teacher --teacher_template turn
"""

GENERATE_HELP = """\
Let a model answer: one prompt, whose answer is printed, or a file of prompts, whose answers are written to another.

examples:
  sdft generate --model runs/demo --prompt "Ring Tomas for me."
  sdft generate --model smollm2-135m-instruct --prompt "Name three rivers." --temperature 0.7 --top_p 0.9
  sdft generate --model runs/demo --prompt_file examples/general_prompts.jsonl --output_file answers.jsonl
  sdft generate examples/demo.yaml --model runs/demo --prompt "Play some Mozart."
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; it may be train, eval or generate", 2)
    try:
        with _terminable():
            return _run(command, rest, started)
    except Terminated:
        return _fail("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated, unless it is dealt with or ignored already."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(command: str, rest: list[str], started: float) -> int:
    # Before torch starts its threads: ones that spin while they wait make a step on the CPU ten times slower as soon
    # as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from safetensors import SafetensorError

    from sdft.errors import TrainingError, UsageError

    try:
        return COMMANDS[command](rest, started) or 0
    except UsageError as error:
        return _fail(str(error), 2)
    except (TrainingError, OSError, SafetensorError) as error:
        return _fail(str(error), 1)


def _train(argv: list[str], started: float) -> int:
    from sdft.config import DataArguments, EvalArguments, LoraArguments, ModelArguments, SDFTConfig
    from sdft.recipe import RecipeParser, parse
    from sdft.run import train

    parser = RecipeParser(
        [ModelArguments, LoraArguments, DataArguments, EvalArguments, SDFTConfig],
        prog="sdft train",
        usage="sdft train [RECIPE.yaml] [--field value ...]",
        description=TRAIN_HELP,
        epilog=TRAIN_MORE,
    )
    return train(*parse(parser, argv), started=started, command=["sdft", "train", *argv])


def _eval(argv: list[str], started: float) -> None:
    from sdft.config import EvalArguments, EvalCommand, ModelArguments
    from sdft.recipe import RecipeParser, parse
    from sdft.run import evaluate
    from sdft.templates import TEMPLATES

    def adapt(recipe: dict[str, Any]) -> None:
        if "model" in recipe:
            recipe.setdefault("base_model", recipe["model"])
        recipe.pop("teacher", None)  # in a recipe it is who scores the rollouts, here whether to score the teacher
        # As a flag a name means that form alone. The recipe's is the one it trains with, and is measured with the rest.
        if str(recipe.get("teacher_template")) in TEMPLATES:
            del recipe["teacher_template"]

    parser = RecipeParser(
        [ModelArguments, EvalArguments, EvalCommand],
        prog="sdft eval",
        usage="sdft eval [RECIPE.yaml] [--field value ...]",
        description=EVAL_HELP,
    )
    evaluate(*parse(parser, argv, ignored=_every_field(), adapt=adapt))


def _generate(argv: list[str], started: float) -> None:
    from sdft.config import GenerateCommand, ModelArguments
    from sdft.recipe import RecipeParser, parse
    from sdft.run import generate

    parser = RecipeParser(
        [ModelArguments, GenerateCommand],
        prog="sdft generate",
        usage="sdft generate [RECIPE.yaml] [--field value ...]",
        description=GENERATE_HELP,
    )
    generate(*parse(parser, argv, ignored=_every_field()))


def _every_field() -> set[str]:
    """The names of all fields of all commands: a recipe may have them, whichever command it is given to."""
    from dataclasses import fields, is_dataclass

    from sdft import config

    return {field.name for kind in vars(config).values() if is_dataclass(kind) for field in fields(kind)}


COMMANDS: dict[str, Callable[[list[str], float], int | None]] = {"train": _train, "eval": _eval, "generate": _generate}


def _fail(message: str, code: int) -> int:
    print(f"sdft: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
