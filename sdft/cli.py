"""The `sdft` command: what it is told, and how it ends.

Exit codes: 0 done, 1 the run went wrong, 2 it was asked for something that cannot be, 130 interrupted. A mistake is
one line on stderr. Everything that takes long to import is imported only once a command is known.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

HELP = """\
usage: sdft COMMAND ...

Self-distillation fine-tuning: a language model learns from demonstrations by becoming its own teacher.

commands:
  train   train a model on demonstrations by a recipe
  eval    score a model on held-out prompts, and measure what it forgot

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --learning_rate 1e-4 --output_dir runs/faster
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl
  sdft train --help
"""

TRAIN_HELP = """\
Train a model on demonstrations. Every field can stand in the recipe (field: value) or on the command line, which wins.

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --divergence reverse_kl --max_steps 100 --output_dir runs/reverse
  sdft train examples/demo.yaml --method sft --output_dir runs/sft
  sdft train examples/demo.yaml --resume_from_checkpoint last
  sdft train --model Qwen/Qwen2.5-0.5B-Instruct --train_file mine.jsonl --output_dir runs/mine
"""

TRAIN_MORE = """\
Every field of transformers.TrainingArguments is accepted, those not shown here included:
https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""

EVAL_HELP = """\
Score a model: greedy answers to held-out prompts, and how far it has moved from its base model on general ones.

examples:
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl --eval_completion_length 18
  sdft eval examples/demo.yaml --model runs/demo
  sdft eval examples/demo.yaml --teacher --teacher_template turn
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in ("train", "eval"):
        return _fail(f"unknown command {command!r}; it may be train or eval", 2)
    try:
        return _run(command, rest, started)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _run(command: str, rest: list[str], started: float) -> int:
    # Before torch starts its threads: ones that spin while they wait make a step on the CPU ten times slower as soon
    # as another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from safetensors import SafetensorError

    from sdft.errors import TrainingError, UsageError

    try:
        (_train if command == "train" else _eval)(rest, started)
    except UsageError as error:
        return _fail(str(error), 2)
    except (TrainingError, OSError, SafetensorError) as error:
        return _fail(str(error), 1)
    return 0


def _train(argv: list[str], started: float) -> None:
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
    train(*parse(parser, argv), started=started)


def _eval(argv: list[str], started: float) -> None:
    from dataclasses import fields

    from sdft.config import DataArguments, EvalArguments, EvalCommand, LoraArguments, ModelArguments, SDFTConfig
    from sdft.recipe import RecipeParser, parse
    from sdft.run import evaluate

    parser = RecipeParser(
        [ModelArguments, EvalArguments, EvalCommand],
        prog="sdft eval",
        usage="sdft eval [RECIPE.yaml] [--field value ...]",
        description=EVAL_HELP,
    )
    of_train = {field.name for dataclass in (LoraArguments, DataArguments, SDFTConfig) for field in fields(dataclass)}
    ignored = of_train - {"teacher_template", "per_device_eval_batch_size"}
    evaluate(*parse(parser, argv, ignored=ignored, copied={"base_model": "model"}))


def _fail(message: str, code: int) -> int:
    print(f"sdft: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
