"""The rows of a command's files, read and checked before torch and transformers, which take seconds, are imported."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdft.data import COLUMNS, WHERE, Limits, Row, TeacherReads, check_options, encode_rows, load_rows, teacher_chat
from sdft.data.chats import can_be_shown
from sdft.data.columns import CONTEXT
from sdft.data.storage import Keep, on_disk
from sdft.errors import UsageError, counted
from sdft.evaluation.scorers import check_answers
from sdft.settings.commands import DataCommand, EvalCommand
from sdft.settings.config import EvalSettings, MethodSettings
from sdft.settings.feedback import FEEDBACKS
from sdft.settings.inputs import DataArguments, EvalArguments, ModelArguments
from sdft.templates import PROMPT, Message, parse_template, shows_demonstration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sdft.settings.arguments import SDFTConfig

logger = logging.getLogger(__name__)

Columns = Mapping[str, str] | None


@dataclass(frozen=True)
class Rows:
    """What is learned from, and the held-out and general prompts; none where there is no such file."""

    train: Sequence[Row] = field(default_factory=list)
    held_out: list[Row] = field(default_factory=list)
    general: list[Row] = field(default_factory=list)


def rows_of_train(
    of_data: DataArguments,
    of_eval: EvalArguments,
    settings: MethodSettings,
    columns: Columns = None,
    seed: int = 0,
) -> Rows:
    """The rows of `sdft train`; by `seed` those of a file are drawn of which a part is taken."""
    keep = kept_as(settings)
    given: dict[str, Any] = {"need": needed(settings), "read": read_by_feedback(settings)}
    train = load_rows(of_data.train_file, columns=columns, seed=seed, keep=keep, **given)
    held_out, general = exam_rows(of_eval.eval_file or None, of_eval.general_file or None, settings, columns)
    if settings.method == "sdft":
        shown = (row for row in train if settings.feedback is None or can_be_shown(row, settings.template))
        _check_teacher(shown, settings.template)
    check_learned(train, settings)
    if can_ask_teacher(held_out, settings.template):
        _check_teacher(held_out, settings.template)
    for name, asked in (("eval_file", held_out), ("general_file", general)):
        warn_of_trained(asked, train, name)
    return Rows(train, held_out, general)


def warn_of_trained(asked: Sequence[Row], train: Iterable[Row], name: str) -> None:
    """Say which prompts of an exam are learned from too: what is measured on them is no proof of anything learned."""
    prompts = {str(row["prompt"]) for row in asked}
    trained = {prompt for row in train if (prompt := str(row["prompt"])) in prompts} if prompts else set()
    if both := [row for row in asked if str(row["prompt"]) in trained]:
        logger.warning(
            "%d of the %s of %s are in train_file too, %s the first: the accuracy there says nothing of others",
            *(len(both), counted(len(asked), "prompt"), name, both[0][WHERE]),
        )


def kept_as(settings: MethodSettings) -> Keep:
    """Where the training rows are kept."""
    return on_disk(str(settings.output_dir)) if settings.rows_on_disk else list


def read_by_feedback(settings: MethodSettings | DataCommand) -> tuple[str, ...]:
    """Columns that would go before a prompt, and that a function of feedback may have for something else."""
    return CONTEXT if settings.feedback is not None and settings.method == "sdft" else ()


def learns_demonstrations(settings: MethodSettings | DataCommand) -> bool:
    """Whether cross-entropy counts."""
    return settings.method == "sft" or settings.demonstration_weight > 0


def check_learned(rows: Iterable[Row], settings: MethodSettings | DataCommand) -> None:
    """UsageError for a row without the demonstration that is to be learned."""
    if not learns_demonstrations(settings):
        return
    if bare := next((row for row in rows if row.get("demonstration") is None), None):
        raise UsageError(f"{bare[WHERE]} has no demonstration, which is what is to be learned")


def needed(settings: MethodSettings | DataCommand) -> tuple[str, ...]:
    """The fields that every row to learn from must have."""
    learned = learns_demonstrations(settings)
    shown = shows_demonstration(settings.template) and settings.feedback is None
    judged = FEEDBACKS.get(settings.feedback or "", ()) if settings.method == "sdft" else ()
    return ("prompt", *(("demonstration",) if learned or shown else ()), *judged)


def rows_of_eval(
    of_model: ModelArguments, of_eval: EvalArguments, of_command: EvalCommand, columns: Columns = None
) -> Rows:
    """The rows of `sdft eval`, which must have what is asked for."""
    held_out, general = exam_rows(of_eval.eval_file or None, of_eval.general_file or None, of_command, columns)
    if not held_out and not general:
        raise UsageError("eval_file and general_file are not set; at least one must be, or there is nothing to score")
    to_score = any(row.get("answer") for row in general)
    base = of_command.base_model
    if general and not to_score and (base is None or (base == of_model.model and not held_out)):
        raise UsageError(
            f"general_file is {of_eval.general_file!r}, whose rows have no answer, and base_model is {base!r}; there "
            "must be answers to score, or another model to measure forgetting from"
        )
    if of_command.teacher:
        if not held_out:
            raise UsageError(
                "teacher is True and eval_file is not set; it must be, for the teacher answers its prompts"
            )
        prompt_alone = of_command.teacher_model is not None and of_command.teacher_template in (None, PROMPT)
        for row in held_out if not prompt_alone else ():
            if not row.get("demonstration"):
                raise UsageError(f"teacher is True, and {row[WHERE]} has no demonstration for the teacher to see")
        if have_demonstrations(held_out):
            _check_teacher(held_out, parse_template("turn"))
    return Rows(held_out=held_out, general=general)


def exam_rows(
    held_out: Any, general: Any, settings: EvalSettings, columns: Columns = None
) -> tuple[list[Row], list[Row]]:
    """The held-out and the general prompts, each from what `load_rows` takes or None, with answers that can be found.

    The scorers of `settings` could find each in some completion.
    """
    found = tuple(
        [] if source is None else list(load_rows(source, name=name, need=need, columns=columns))
        for source, name, need in (
            (held_out, "eval_dataset", ("prompt", "answer")),
            (general, "general_dataset", ("prompt",)),
        )
    )
    for rows, setting in zip(found, ("scorer", "general_scorer"), strict=True):
        check_answers(rows, getattr(settings, setting), setting)
    return found[0], found[1]


def training_rows(
    source: Any,
    settings: SDFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: frozenset[int],
    limits: Limits,
    teacher: TeacherReads | None = None,
) -> Sequence[Row]:
    """The rows that a trainer learns from, with their token ids: from what `load_rows` takes, or rows read before.

    `teacher` is what a teacher reads that is another model.
    """
    check_options(
        tokenizer,
        chat_template_kwargs=settings.chat_template_kwargs,
        teacher_chat_template_kwargs=settings.teacher_chat_template_kwargs,
    )
    keep = kept_as(settings)
    given: dict[str, Any] = {"need": needed(settings), "read": read_by_feedback(settings)}
    rows = load_rows(source, name="train_dataset", keep=keep, **given)
    unused = sorted({name for row in rows for name in row} - {*COLUMNS, WHERE})
    if unused and settings.feedback is None:
        logger.warning("train_dataset has columns that are not used: %s", ", ".join(unused))
    return encode_rows(
        rows,
        tokenizer,
        method=settings.method,
        with_demonstration=settings.demonstration_weight > 0,
        with_draft=settings.rollout_draft == "demonstration",
        template=settings.template,
        eos_ids=eos_ids,
        max_completion_length=settings.max_completion_length,
        limits=limits,
        options=settings.chat_template_kwargs,
        teacher_options=settings.teacher_options,
        overlong=settings.overlong,
        teacher=teacher,
        feedback=settings.feedback is not None and settings.method == "sdft",
        keep=keep,
        silent=bool(settings.disable_tqdm) or settings.process_index > 0,
    )


def have_demonstrations(rows: Sequence[Row]) -> bool:
    """Whether a teacher can be shown the demonstration of every row."""
    return bool(rows) and all(row.get("demonstration") or row.get("teacher_prompt") for row in rows)


def can_ask_teacher(rows: Sequence[Row], template: list[Message]) -> bool:
    """Whether a teacher can be shown what the template has of every row."""
    return bool(rows) and (not shows_demonstration(template) or have_demonstrations(rows))


def _check_teacher(rows: Iterable[Row], template: list[Message]) -> None:
    for row in rows:
        teacher_chat(row, template)
