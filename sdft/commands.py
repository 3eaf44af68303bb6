"""What the commands do: train with a before and an after, and evaluate on its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging

from sdft.checkpoints.claim import CHECKPOINTS, Claim, claimed
from sdft.checkpoints.files import failing_clearly, remove_checkpoints, write_text
from sdft.checkpoints.resume import steps_done
from sdft.checkpoints.signals import FinishOnSignal
from sdft.data import WHERE, Row
from sdft.errors import SettingsError, UsageError, counted
from sdft.evaluation.answers_file import AnswersFile
from sdft.evaluation.exam import Answers, Exam, Made, complete, prompts_for
from sdft.evaluation.report import (
    SUMMARY_FILE,
    MetricsFile,
    Scores,
    Summary,
    cut_answers,
    describe,
    draw_curves,
    loss_ends,
    score_lines,
    table,
    write_summary,
    wrong_answers,
)
from sdft.models.adapters import add_lora
from sdft.models.files import check_apart
from sdft.models.load import load_model
from sdft.progress.display import Display
from sdft.rows import Rows
from sdft.settings.commands import EvalCommand, GenerateCommand
from sdft.settings.config import LoraArguments, ModelArguments, SDFTConfig
from sdft.settings.recipe import RESOLVED_FILE
from sdft.teacher import Teacher
from sdft.templates import TEMPLATES, Message, parse_template
from sdft.trainer import SDFTTrainer


def train(
    of_model: ModelArguments,
    of_lora: LoraArguments,
    rows: Rows,
    config: SDFTConfig,
    *,
    started: float,
    command: Sequence[str] = (),
    recipe: str = "",
) -> int:
    """`sdft train`: check everything, measure, train, measure again, and leave the model and the report.

    The exit code: that of Ctrl-C where it ended the run, and 0. `command` is what was asked for, to say how to go on,
    and `recipe` all of the settings, to be left beside the model.
    """
    _quiet()
    if of_lora.lora_rank:
        check_apart(of_model.model, Path(str(config.output_dir)))
    with claimed(
        str(config.output_dir),
        config.resume_from_checkpoint,
        overwrite=config.overwrite_output_dir,
        main=config.process_index == 0,
        allow_pickle=of_model.allow_pickle,
    ) as claim:
        return _train(of_model, of_lora, rows, config, claim, started, command, recipe)


def _train(
    of_model: ModelArguments,
    of_lora: LoraArguments,
    rows: Rows,
    config: SDFTConfig,
    claim: Claim,
    started: float,
    command: Sequence[str],
    recipe: str,
) -> int:
    template = parse_template(config.teacher_template)
    exam = Exam(
        rows.held_out or None,
        rows.general or None,
        config,
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        silent=bool(config.disable_tqdm),
    )
    as_it_goes = config.eval_strategy != "no"
    if as_it_goes and not exam.eval_rows and not exam.general_rows:
        raise UsageError(
            "eval_strategy asks for evaluation during training, and eval_file and general_file are not set; at least "
            "one must be, or there is nothing to evaluate on"
        )
    metric = config.metric_for_best_model
    for name, rows_of, file in (
        ("accuracy", exam.eval_rows, "eval_file"),
        ("forgetting", exam.general_rows, "general_file"),
    ):
        if as_it_goes and metric == name and not rows_of:
            raise UsageError(f"metric_for_best_model is {metric!r}, which is measured on {file}, and that is not set")
    shown = [template] if exam.has_demonstrations else []
    folder = Path(str(config.output_dir))
    model, tokenizer = load_model(of_model.model, of_model.dtype, **of_model.trust)
    exam.check(model, tokenizer, shown)
    try:
        trainer = SDFTTrainer(
            add_lora(model, of_lora),
            config,
            train_dataset=rows.train,
            eval_dataset=exam.eval_rows or None,
            processing_class=tokenizer,
            general_dataset=exam.general_rows if as_it_goes and exam.general_rows else None,
        )
    except UsageError:
        raise
    except ValueError as error:  # settings that the Trainer finds do not go together
        raise SettingsError(str(error)) from error
    resume, done = claim.resume, max(claim.steps, steps_done(claim.resume) if claim.resume else 0)
    if done and (folder / SUMMARY_FILE).is_file() and done >= trainer.total_steps():
        if trainer.is_world_process_zero():
            print(f"the run is complete, with {trainer.total_steps()} steps: {folder}/ is left as it is")
        return 0
    if done and resume is None:
        raise UsageError(
            f"resume_from_checkpoint is {config.resume_from_checkpoint!r}, and the run in {folder} ended after {done} "
            f"of what are now {trainer.total_steps()} steps and left no checkpoint; save_steps of the first run must "
            "divide its max_steps for one to be left"
        )
    if resume and trainer.is_world_process_zero():
        print(f"going on from {resume}, after step {done} of {trainer.total_steps()}")
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsFile(folder))
    display = Display(silent=bool(config.disable_tqdm))
    trainer.add_callback(display)

    def held_out(progress: str, template: list[Message] | None = None) -> Answers | None:
        with trainer.phases("eval"):
            return trainer.with_student(lambda: exam.held_out(trainer.student, tokenizer, progress, template))

    def general(progress: str) -> Answers | None:
        with trainer.phases("eval"):
            return trainer.with_student(lambda: exam.general(trainer.student, tokenizer, progress))

    teacher = held_out("teacher, held-out prompts", template) if shown else None
    before = held_out("before, held-out prompts")
    general_before = general("before, general prompts")
    train_started = time.perf_counter()
    with contextlib.closing(display), FinishOnSignal(silent=not trainer.is_world_process_zero()) as finish:
        trainer.add_callback(finish)
        trainer.show(display)
        trainer.train(resume_from_checkpoint=resume)
        training_seconds = time.perf_counter() - train_started
        if not finish.stopped:
            trainer.save_model()
            if trainer.is_world_process_zero():
                with failing_clearly(RESOLVED_FILE, str(folder)):
                    write_text(folder / RESOLVED_FILE, recipe)
    if finish.stopped or finish.late:
        if trainer.is_world_process_zero():
            print(_stopped(trainer, folder, finish, command))
        return 128 + signal.SIGINT if finish.stopped == signal.SIGINT else 0
    after = held_out("after, held-out prompts")
    general_after = general("after, general prompts")
    moved = None
    if general_before is not None:
        start = trainer.start or Teacher(
            load_model(of_model.model, of_model.dtype, trainer.student.device, **of_model.trust)[0]
        )
        with trainer.phases("eval"):
            moved = trainer.with_student(lambda: trainer.moved(exam, start))
    spent = trainer.step_log.spent()
    if not trainer.is_world_process_zero():
        return 0

    loss_first, loss_last = loss_ends(trainer.state.log_history)
    distilled = config.method == "sdft"
    summary = Summary(
        model=of_model.model,
        method=config.method,
        divergence=config.divergence if distilled else None,
        teacher=config.teacher if distilled else None,
        steps=trainer.state.global_step,
        loss_first=loss_first,
        loss_last=loss_last,
        accuracy_before=_accuracy(before),
        accuracy_after=_accuracy(after),
        accuracy_teacher=_accuracy(teacher),
        held_out_prompts=len(exam.eval_rows),
        general_accuracy_before=_accuracy(general_before),
        general_accuracy_after=_accuracy(general_after),
        forgetting=moved,
        general_prompts=0 if general_before is None else len(general_before.right),
        training_seconds=training_seconds,
        total_seconds=time.perf_counter() - started,
        scorer=config.scorer,
        general_scorer=config.general_scorer,
        **spent,
    )
    with failing_clearly("the report", str(folder)):
        draw_curves(folder, trainer.state.log_history, summary)
        write_summary(folder / SUMMARY_FILE, summary)
    claim.finish(trainer.state.global_step)
    if not _is_asked_for(trainer):
        remove_checkpoints(folder, [f"checkpoint-{trainer.state.global_step}"])
    print("", describe(summary), "", table(summary), "", left_in(folder), sep="\n")
    return 0


def _is_asked_for(trainer: SDFTTrainer) -> bool:
    """Whether the settings ask for a checkpoint of the last step; else the Trainer saves one all the same."""
    args, state = trainer.args, trainer.state
    last = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
    by_steps = args.save_strategy == "steps"
    return not by_steps or state.global_step % state.save_steps == 0 or state.best_model_checkpoint == last


def left_in(folder: Path) -> str:
    """What a run has left in its folder, and how much of the disk its parts take."""
    checkpoints = sorted(folder.glob(CHECKPOINTS), key=lambda path: int(path.name.split("-")[1]))
    kept = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size / 2**20 for path in kept}
    of_checkpoints = sum(size for path, size in sizes.items() if any(each in path.parents for each in checkpoints))
    line = (
        f"{folder}/ has the trained model, {RESOLVED_FILE}, metrics.jsonl, summary.json and curves.png "
        f"({sum(sizes.values()) - of_checkpoints:.0f} MiB)"
    )
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        line += f", and to go on from {names} ({of_checkpoints:.0f} MiB)"
    return line


def evaluate(of_model: ModelArguments, rows: Rows, of_command: EvalCommand) -> None:
    """`sdft eval`: the accuracy of a model, of the model as a teacher, and its divergence from a base model."""
    _quiet()
    exam = Exam(
        rows.held_out or None,
        rows.general or None,
        of_command,
        batch_size=of_command.per_device_eval_batch_size,
        seed=of_command.seed,
    )
    has_base = of_command.base_model not in (None, of_model.model)
    templates = teacher_templates(of_command.teacher_template) if of_command.teacher else {}
    device = _device()
    model, tokenizer = load_model(of_model.model, of_model.dtype, device, **of_model.trust)
    exam.check(model, tokenizer, list(templates.values()))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswersFile(of_command.output_file)) if of_command.output_file else None

        def into_file(order: int, name: str) -> Made | None:
            if file is None:
                return None
            return lambda number, row, *answer: file.add((order, number), _record(name, row, *answer))

        held_out = exam.held_out(model, tokenizer, "held-out prompts", made=into_file(0, "held-out"))
        teachers = {
            name: exam.held_out(
                model,
                tokenizer,
                f"teacher ({name}), held-out prompts",
                template,
                made=into_file(1 + order, f"teacher ({name})"),
            )
            for order, (name, template) in enumerate(templates.items())
        }
        general = exam.general(model, tokenizer, "general prompts", made=into_file(1 + len(templates), "general"))
    moved = None
    if general is not None and has_base:
        base, _ = load_model(str(of_command.base_model), of_model.dtype, device, **of_model.trust)
        moved = exam.forgetting(model, tokenizer, Teacher(base))
    scores = Scores(
        model=of_model.model,
        accuracy=_accuracy(held_out),
        accuracy_by_template={name: _accuracy(answers) for name, answers in teachers.items()},
        held_out_prompts=len(exam.eval_rows),
        scorer=of_command.scorer,
        general_accuracy=_accuracy(general),
        general_prompts=0 if general is None else len(general.right),
        general_scorer=of_command.general_scorer,
        base_model=of_command.base_model if has_base else None,
        forgetting=moved,
    )
    lines = score_lines(scores)
    if general is not None and of_command.base_model is None:
        lines.append("forgetting was not measured: base_model is not set, the model to measure it from")
    if held_out is not None:
        asked = [row for row in exam.eval_rows for _ in range(of_command.eval_samples)]
        lines += wrong_answers(list(zip(asked, held_out.texts, held_out.right, strict=True)))
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


def teacher_templates(wanted: list[Message] | str | None) -> dict[str, list[Message]]:
    """The templates to measure the teacher under: the built-in one called `wanted`, or all of them and one's own."""
    if isinstance(wanted, str) and wanted in TEMPLATES:
        return {wanted: TEMPLATES[wanted]}
    own = {} if wanted is None else {"your own": parse_template(wanted)}
    return {**TEMPLATES, **own}


def generate(of_model: ModelArguments, rows: list[Row], of_command: GenerateCommand) -> None:
    """`sdft generate`: a model's answer to one prompt, printed, or to each prompt of a file, written to another."""
    _quiet()
    model, tokenizer = load_model(of_model.model, of_model.dtype, _device(), **of_model.trust)
    prompts = prompts_for(model, tokenizer, rows, of_command.max_completion_length)
    texts: list[str] = []
    ended: list[bool] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(AnswersFile(of_command.output_file)) if of_command.output_file else None

        def made(number: int, completion: list[int], finished: bool) -> None:
            texts.append(str(tokenizer.decode(completion, skip_special_tokens=True)))
            ended.append(finished)
            if file is None:
                return
            given = {name: value for name, value in rows[number].items() if name != WHERE}
            file.add(number, {**given, "completion": texts[-1], "finished": finished})

        complete(
            model,
            tokenizer,
            prompts,
            max_new_tokens=of_command.max_completion_length,
            batch_size=of_command.per_device_eval_batch_size,
            temperature=of_command.temperature,
            top_p=of_command.top_p,
            top_k=of_command.top_k,
            seed=of_command.seed,
            progress="answers",
            made=made,
        )
    cut = cut_answers("", ended, "max_completion_length", of_command.max_completion_length)
    if of_command.output_file is None:
        print(texts[0])  # once the bar has gone
        print(*cut, sep="\n", end="\n" if cut else "", file=sys.stderr)  # the answer stays alone on stdout
    else:
        print(*cut, f"{of_command.output_file} has the answers to {counted(len(rows), 'prompt')}", sep="\n")


def _stopped(trainer: SDFTTrainer, folder: Path, finish: FinishOnSignal, command: Sequence[str]) -> str:
    """What a signal has left, and how to go on from it."""
    name = signal.Signals(finish.late or finish.stopped).name
    if finish.late:
        return f"{name} came after the last step: {folder}/ has the trained model, which was not measured again"
    step, of = trainer.state.global_step, trainer.state.max_steps
    if trainer.newest is None:
        return f"stopped by {name} before the first of {of} steps was done: there is nothing to go on from"
    newest = Path(trainer.newest)
    field = f"--resume_from_checkpoint {'last' if newest.parent.samefile(folder) else shlex.quote(str(newest))}"
    alone = command and trainer.args.world_size == 1
    return (
        f"stopped by {name} after step {step} of {of}: {newest.name} is in {newest.parent}/; to go on: "
        f"{shlex.join(command) if alone else 'the same command with'} {field}"
    )


def _accuracy(answers: Answers | None) -> float | None:
    return None if answers is None else answers.accuracy


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _quiet() -> None:
    """Leave the terminal to the run's own progress and table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft asks every model that it wraps by the old name (PeftModel.__init__), and transformers warns of that.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
