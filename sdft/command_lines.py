"""What each command is told, and the checks of it: everything that can be checked without torch and transformers.

A command is a function of its words and of when it began; it imports what it takes when it is called.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdft.settings.fields import Field
    from sdft.settings.recipe import Written

logger = logging.getLogger(__name__)

HELP_FLAGS = ("-h", "--help", "--help-all")
#: By each of these a user tells CUDA's allocator what to do. torch 2.11 and 2.13 read the first where the others, which
#: are older names for CUDA and for AMD's GPUs, are not set.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def _let_segments_grow() -> None:
    """Have CUDA's allocator extend its segments, rather than take new ones beside gaps in which nothing fits.

    Rollouts, scoring and learning ask for other sizes at every step. torch reads this when it first uses the device.
    Windows is left out: there torch warns that it cannot.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _train(argv: list[str], started: float) -> int:
    _let_segments_grow()
    from sdft.early_checks import check_package, check_packages_of, check_rows, check_vllm, check_writable
    from sdft.feedback.find import find_feedback
    from sdft.models.files import check_model, check_teacher, named_by
    from sdft.named_functions import imported
    from sdft.rows import rows_of_train
    from sdft.settings import help
    from sdft.settings.config import MethodSettings
    from sdft.settings.fields import own_fields, training_fields
    from sdft.settings.idle import OF_TRAINING, without_effect
    from sdft.settings.inherited import check_values
    from sdft.settings.inputs import (
        SEED,
        ColumnArguments,
        DataArguments,
        EvalArguments,
        LoraArguments,
        ModelArguments,
    )
    from sdft.settings.recipe import read
    from sdft.settings.rollouts import VLLM
    from sdft.settings.teachers import check_named
    from sdft.settings.token_weights import WEIGHTINGS

    fields = (
        own_fields(ModelArguments, LoraArguments, DataArguments, ColumnArguments, EvalArguments) | training_fields()
    )
    if _helped("sdft train", help.TRAIN, fields, argv):
        return 0
    given = read(argv, fields, command="sdft train")
    with given.located():
        model, lora = given.make(ModelArguments), given.make(LoraArguments)
        data, evaluation = given.make(DataArguments), given.make(EvalArguments)
        columns = given.make(ColumnArguments).columns
        method = given.make(MethodSettings)
        check_values(given.values)
        check_writable(str(method.output_dir))
        check_rows("train_file", data.train_file)
        check_rows("eval_file", evaluation.eval_file)
        check_rows("general_file", evaluation.general_file)
        check_model(model.model)
        check_named(method, method.teacher)
        if method.method == "sdft":
            find_feedback(method)
            if (name := method.token_weighting) not in WEIGHTINGS:
                imported("token_weighting", name, name)
        if method.teacher_model is not None and method.method == "sdft":
            with named_by("teacher_model"):
                check_teacher(method.teacher_model, method.teacher_bits)
        check_package("sdft train draws curves", "matplotlib")
        check_packages_of(given.values)
        if lora.lora_rank:
            check_package(f"lora_rank is {lora.lora_rank}", "peft")
        if method.rollout_backend == VLLM:
            check_vllm(method.rollout_server)
        rows = rows_of_train(data, evaluation, method, columns, given.values.get("seed", SEED))

        from sdft.settings.arguments import SDFTConfig

        config = given.make(SDFTConfig)
        of_config = without_effect(OF_TRAINING, config)  # which the trainer says
        for sentence in without_effect(OF_TRAINING, lora, evaluation, config):
            if sentence not in of_config:
                logger.warning(sentence)

        from sdft.commands.train import train
        from sdft.processes import part

        kinds = (
            ModelArguments,
            LoraArguments,
            DataArguments,
            ColumnArguments,
            EvalArguments,
            MethodSettings,
            SDFTConfig,
        )
        recipe = given.resolved(*kinds)
        told = ["sdft", "train", *argv]
        code = train(model, lora, rows, config, started=started, command=told, recipe=recipe)
        part()
        return code


def _eval(argv: list[str], started: float) -> None:
    from sdft.early_checks import check_output_file, check_rows, check_vllm
    from sdft.models.files import check_model, check_teacher, named_by
    from sdft.rows import rows_of_eval
    from sdft.settings import help
    from sdft.settings.checks import matching
    from sdft.settings.commands import EvalCommand
    from sdft.settings.fields import own_fields
    from sdft.settings.idle import OF_EVAL, without_effect
    from sdft.settings.inputs import ColumnArguments, EvalArguments, ModelArguments
    from sdft.settings.recipe import read
    from sdft.settings.rollouts import VLLM
    from sdft.templates import PROMPT, TEMPLATES

    def adapt(recipe: dict[str, Written]) -> None:
        if "model" in recipe:
            recipe.setdefault("base_model", recipe["model"])
        recipe.pop("teacher", None)  # in a recipe it is who scores the rollouts, here whether to score the teacher
        # As a flag a name means that form alone. The recipe's is the one it trains with, and is measured with the rest.
        if "teacher_template" in recipe and matching(recipe["teacher_template"].value, (*TEMPLATES, PROMPT)):
            del recipe["teacher_template"]

    fields = own_fields(ModelArguments, EvalArguments, ColumnArguments, EvalCommand)
    if _helped("sdft eval", help.EVAL, fields, argv):
        return
    given = read(argv, fields, command="sdft eval", ignored=_every_field(), adapt=adapt)
    given = given.after_run()
    with given.located():
        model, evaluation = given.make(ModelArguments), given.make(EvalArguments)
        command = given.make(EvalCommand)
        check_rows("eval_file", evaluation.eval_file)
        check_rows("general_file", evaluation.general_file)
        inputs = [evaluation.eval_file, evaluation.general_file]
        check_output_file("output_file", command.output_file, inputs=inputs)
        check_output_file("summary_file", command.summary_file, inputs=[*inputs, command.output_file])
        check_model(model.model)
        if command.base_model:
            with named_by("base_model"):
                check_model(command.base_model)
        if command.teacher and command.teacher_model:
            with named_by("teacher_model"):
                check_teacher(command.teacher_model, command.teacher_bits)
        if command.rollout_backend == VLLM:
            check_vllm(command.rollout_server)
        rows = rows_of_eval(model, evaluation, command, given.make(ColumnArguments).columns)
        for sentence in without_effect(OF_EVAL, evaluation, command, only=given.flags):
            logger.warning(sentence)

        from sdft.commands.evaluate import evaluate

        evaluate(model, rows, command)


def _generate(argv: list[str], started: float) -> None:
    from sdft.data import load_rows
    from sdft.early_checks import check_output_file, check_rows, check_vllm
    from sdft.models.files import check_model
    from sdft.settings import help
    from sdft.settings.commands import GenerateCommand
    from sdft.settings.fields import own_fields
    from sdft.settings.idle import OF_GENERATE, without_effect
    from sdft.settings.inputs import ColumnArguments, ModelArguments
    from sdft.settings.recipe import read
    from sdft.settings.rollouts import VLLM

    fields = own_fields(ModelArguments, ColumnArguments, GenerateCommand)
    if _helped("sdft generate", help.GENERATE, fields, argv):
        return
    given = read(argv, fields, command="sdft generate", ignored=_every_field())
    given = given.after_run()
    with given.located():
        model, command = given.make(ModelArguments), given.make(GenerateCommand)
        check_rows("prompt_file", command.prompt_file)
        check_output_file("output_file", command.output_file, inputs=[command.prompt_file])
        check_model(model.model)
        if command.rollout_backend == VLLM:
            check_vllm(command.rollout_server)
        source = command.prompt_file or [{"prompt": command.prompt}]
        rows = load_rows(source, name="prompt", need=("prompt",), columns=given.make(ColumnArguments).columns)
        for sentence in without_effect(OF_GENERATE, command, only=given.flags):
            logger.warning(sentence)

        from sdft.commands.generate import generate

        generate(model, rows, command)


def _data(argv: list[str], started: float) -> None:
    from sdft.data import load_rows
    from sdft.early_checks import check_rows
    from sdft.errors import UsageError
    from sdft.models.files import check_model
    from sdft.rows import check_learned, needed, read_by_feedback
    from sdft.settings import help
    from sdft.settings.commands import DataCommand
    from sdft.settings.fields import own_fields
    from sdft.settings.idle import OF_DATA, without_effect
    from sdft.settings.inputs import ColumnArguments, DataArguments
    from sdft.settings.recipe import read

    fields = own_fields(DataArguments, ColumnArguments, DataCommand)
    if _helped("sdft data", help.DATA, fields, argv):
        return
    if argv and not argv[0].startswith("-") and not argv[0].lower().endswith((".yaml", ".yml")):
        if len(argv) > 1 and not argv[1].startswith("-"):
            files = ", ".join(itertools.takewhile(lambda word: not word.startswith("-"), argv))
            raise UsageError(f"{argv[1]!r} is one file too many; several are one list: --train_file '[{files}]'")
        argv = ["--train_file", *argv]
    given = read(argv, fields, command="sdft data", ignored=_every_field())
    with given.located():
        data, columns, command = given.make(DataArguments), given.make(ColumnArguments), given.make(DataCommand)
        check_rows("train_file", data.train_file)
        if command.model:
            check_model(command.model)
        need, others = needed(command), read_by_feedback(command)
        rows = load_rows(data.train_file, need=need, columns=columns.columns, seed=command.seed, read=others)
        check_learned(rows, command)
        for sentence in without_effect(OF_DATA, command, only=given.flags):
            logger.warning(sentence)

        from sdft.commands.data import show

        show(rows, command)


def _plan(argv: list[str], started: float) -> None:
    from dataclasses import replace

    from sdft.early_checks import check_output_file, check_package
    from sdft.planning.devices import HARDWARE, memory_of
    from sdft.settings import help
    from sdft.settings.commands import PlanCommand
    from sdft.settings.config import MethodSettings
    from sdft.settings.fields import own_fields, training_fields
    from sdft.settings.inputs import LoraArguments, ModelArguments
    from sdft.settings.recipe import read
    from sdft.settings.teachers import check_named

    of_command = own_fields(PlanCommand)
    fields = own_fields(ModelArguments, LoraArguments) | training_fields() | of_command
    shown = own_fields(ModelArguments, LoraArguments, PlanCommand)
    if _helped("sdft plan", help.PLAN, fields if "--help-all" in argv else shown, argv):
        return
    given = read(argv, fields, command="sdft plan", ignored=_every_field())
    with given.located():
        model, lora = given.make(ModelArguments), given.make(LoraArguments)
        method = given.make(MethodSettings)
        check_named(method, method.teacher)
        command = given.make(PlanCommand)
        memory_of(command.gpu)
        check_output_file("output_file", command.output_file)
        check_output_file("plot_file", command.plot_file, inputs=[command.output_file])
        if command.plot_file:
            check_package(f"plot_file is {command.plot_file!r}", "matplotlib")
        if lora.lora_rank:
            check_package(f"lora_rank is {lora.lora_rank}", "peft")

        # What this machine has need not be what the planned one has.
        elsewhere = {name: value for name, value in given.values.items() if name not in HARDWARE}

        from sdft.settings.arguments import SDFTConfig

        config = replace(given, values=elsewhere).make(SDFTConfig)
        config.bf16 = bool(given.values.get("bf16"))

        from sdft.commands.plan import plan

        plan(model, lora, config, command)


def _report(argv: list[str], started: float) -> None:
    from sdft.commands.report import report
    from sdft.settings import help
    from sdft.settings.commands import ReportCommand
    from sdft.settings.fields import own_fields
    from sdft.settings.recipe import read

    fields = own_fields(ReportCommand)
    if _helped("sdft report", help.REPORT, fields, argv, takes="RUN_DIR ..."):
        return
    given = read(argv, fields, command="sdft report", words_of="run_dir")
    with given.located():
        report(given.make(ReportCommand))


def _continual(argv: list[str], started: float) -> int:
    _let_segments_grow()
    from sdft.early_checks import check_packages_of
    from sdft.settings import help
    from sdft.settings.commands import ContinualCommand
    from sdft.settings.continual import fields_of_continual, plan_of
    from sdft.settings.fields import own_fields
    from sdft.settings.recipe import read

    fields = fields_of_continual()
    shown = fields if "--help-all" in argv else own_fields(ContinualCommand)
    if _helped("sdft continual", help.CONTINUAL, shown, argv):
        return 0
    given = read(argv, fields, command="sdft continual")
    with given.located():
        plan = plan_of(given, fields)
        for method in plan.methods:
            with method.given.located():
                check_packages_of(method.given.values)

        from sdft.commands.continual import continual
        from sdft.processes import part

        code = continual(plan)
        part()
        return code


def _env(argv: list[str], started: float) -> None:
    from sdft.errors import UsageError

    if argv and argv[0] in HELP_FLAGS:
        print("usage: sdft env\n\nWhat is installed here, on which devices, and what the loss will run on.")
        return
    if argv:
        raise UsageError(f"{argv[0]!r} is one argument too many: sdft env takes none")
    from sdft.environment import lines

    print("\n".join(lines()))


COMMANDS: dict[str, Callable[[list[str], float], int | None]] = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "data": _data,
    "plan": _plan,
    "report": _report,
    "continual": _continual,
    "env": _env,
}


def _helped(
    command: str, description: str, fields: dict[str, Field], argv: list[str], takes: str = "[RECIPE.yaml]"
) -> bool:
    """Whether help was asked for, and printed."""
    from sdft.settings import help

    if not set(argv) & set(HELP_FLAGS):
        return False
    print(help.page(command, description, fields, everything="--help-all" in argv, takes=takes), end="")
    return True


def _every_field() -> set[str]:
    """The names of all fields of all commands: a recipe may have them, whichever command it is given to."""
    from dataclasses import fields, is_dataclass

    from sdft.settings import config, inputs
    from sdft.settings.fields import training_fields

    kinds = [*vars(config).values(), *vars(inputs).values()]
    own = {field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)}
    return own | training_fields().keys()
