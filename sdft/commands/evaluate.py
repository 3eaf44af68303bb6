"""`sdft eval`."""

from __future__ import annotations

import contextlib
from typing import Any

from sdft.commands.shared import accuracy_of, device_here, quiet
from sdft.data import WHERE, Row
from sdft.evaluation.answers_file import AnswersFile
from sdft.evaluation.exam import Exam, Made
from sdft.evaluation.report import (
    Scores,
    cut_answers,
    score_lines,
    write_summary,
    wrong_answers,
)
from sdft.models.files import named_by
from sdft.models.load import load_model
from sdft.rollouts.writer import writer_for
from sdft.rows import Rows
from sdft.settings.commands import EvalCommand
from sdft.settings.inputs import ModelArguments
from sdft.settings.rollouts import VLLM
from sdft.teacher import Teacher
from sdft.teacher_model import load_teacher
from sdft.templates import PROMPT, PROMPT_ALONE, TEMPLATES, Message, parse_template


def evaluate(of_model: ModelArguments, rows: Rows, of_command: EvalCommand) -> None:
    """`sdft eval`: the accuracy of a model, of the model as a teacher, and its divergence from a base model."""
    quiet()
    exam = Exam(
        rows.held_out or None,
        rows.general or None,
        of_command,
        batch_size=of_command.per_device_eval_batch_size,
        seed=of_command.seed,
    )
    has_base = of_command.base_model not in (None, of_model.model)
    templates = teacher_templates(of_command, exam.has_demonstrations) if of_command.teacher else {}
    device = device_here()
    model, tokenizer = load_model(of_model.model, of_model.dtype, device, **of_model.trust)
    itself = of_command.teacher_model is None  # another model's prompts are checked when it is there
    exam.check(model, tokenizer, list(templates.values()) if itself else [])
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswersFile(of_command.output_file)) if of_command.output_file else None

        def into_file(order: int, name: str) -> Made | None:
            if file is None:
                return None
            return lambda number, row, *answer: file.add((order, number), _record(name, row, *answer))

        backend = stack.enter_context(writer_for(of_command, model, longest=exam.longest, probe=exam.first))
        held_out = exam.held_out(model, tokenizer, "held-out prompts", made=into_file(0, "held-out"), backend=backend)
        teacher, teachers_backend = model, backend
        if of_command.teacher and of_command.teacher_model is not None:
            teacher = load_teacher(of_command, device, of_model.trust).model
            teachers_backend = "generate" if of_command.rollout_backend == VLLM else backend
        teachers = {
            name: exam.held_out(
                teacher,
                tokenizer,
                f"teacher ({name}), held-out prompts",
                template,
                made=into_file(1 + order, f"teacher ({name})"),
                backend=teachers_backend,
            )
            for order, (name, template) in enumerate(templates.items())
        }
        general = exam.general(
            model, tokenizer, "general prompts", made=into_file(1 + len(templates), "general"), backend=backend
        )
    forgetting = None
    if general is not None and has_base:
        with named_by("base_model"):
            base, _ = load_model(str(of_command.base_model), of_model.dtype, device, **of_model.trust)
        forgetting = exam.forgetting(model, tokenizer, Teacher(base), shown=True)
    scores = Scores(
        model=of_model.model,
        accuracy=accuracy_of(held_out),
        accuracy_by_template={name: accuracy_of(answers) for name, answers in teachers.items()},
        held_out_prompts=len(exam.eval_rows),
        scorer=of_command.scorer,
        general_accuracy=accuracy_of(general),
        general_prompts=0 if general is None else len(general.right),
        general_scorer=of_command.general_scorer,
        base_model=of_command.base_model if has_base else None,
        forgetting=forgetting,
        teacher_model=of_command.teacher_model if of_command.teacher else None,
    )
    lines = score_lines(scores)
    if general is not None and of_command.base_model is None:
        lines.append("forgetting was not measured: base_model is not set, the model to measure it from")
    if held_out is not None:
        asked = [row for row in exam.eval_rows for _ in range(of_command.eval_samples)]
        whose = " of the model itself" if templates else ""
        lines += wrong_answers(list(zip(asked, held_out.texts, held_out.right, strict=True)), whose)
    lengths = (
        ("held-out prompts", held_out, "eval_completion_length"),
        *((f"held-out prompts as teacher ({name})", each, "eval_completion_length") for name, each in teachers.items()),
        ("general prompts", general, "general_completion_length"),
    )
    for what, answers, field in lengths:
        if answers is not None:
            lines += cut_answers(f"to {what}", answers.finished, field, getattr(of_command, field))
    if of_command.summary_file:
        write_summary(of_command.summary_file, scores)
    print("\n".join(lines))
    for name, what in ((of_command.output_file, "every answer"), (of_command.summary_file, "these numbers")):
        if name:
            print(f"{name} has {what}")


def _record(name: str, row: Row, text: str, right: bool | None, finished: bool) -> dict[str, Any]:
    """A line of the file of `sdft eval`."""
    return {
        "asked": name,
        "row": str(row[WHERE]),
        "prompt": row["prompt"],
        "answer": row.get("answer"),
        "completion": text,
        "finished": finished,
        "right": right,
    }


def teacher_templates(command: EvalCommand, demonstrations: bool) -> dict[str, list[Message]]:
    """The templates to measure the teacher under: the built-in one that is named, or all of them and one's own.

    Another model is asked the prompt alone as well, and shown `demonstrations` where there are any.
    """
    wanted, other_model = command.teacher_template, command.teacher_model is not None
    built_in = TEMPLATES if demonstrations else {}
    if other_model:
        built_in = {PROMPT: PROMPT_ALONE, **built_in}
    if isinstance(wanted, str) and wanted in built_in:
        return {wanted: built_in[wanted]}
    own = {} if wanted is None else {"your own": parse_template(wanted, other_model=other_model)}
    return {**built_in, **own}
