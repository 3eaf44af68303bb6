"""`sdft train`: training with a before and an after."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sdft.checkpoints.claim import CHECKPOINTS, Claim, claimed
from sdft.checkpoints.files import failing_clearly, remove_checkpoints, write_text
from sdft.checkpoints.resume import steps_done
from sdft.checkpoints.signals import FinishOnSignal
from sdft.commands.shared import accuracy_of, quiet
from sdft.data import Row
from sdft.errors import SettingsError, UsageError, counted
from sdft.evaluation.exam import Answers, Exam
from sdft.evaluation.report import (
    MetricsFile,
    Summary,
    describe,
    draw_curves,
    loss_ends,
    table,
    write_summary,
)
from sdft.forward import Result
from sdft.models.adapters import add_lora
from sdft.models.files import check_apart
from sdft.models.load import load_model
from sdft.progress.display import Display
from sdft.report.page import page
from sdft.rows import Rows, can_ask_teacher
from sdft.run_files import CURVES_FILE, METRICS_FILE, REPORT_FILE, RESOLVED_FILE, SUMMARY_FILE
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments, ModelArguments
from sdft.settings.teachers import MODEL
from sdft.teacher import ModelTeacher, Teacher
from sdft.teacher_model import OtherModel, load_teacher, teachers_device
from sdft.templates import Message
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
    quiet()
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
    exam, distilled = exam_of(rows, config), config.method == "sdft"
    template = config.template
    asks_teacher = can_ask_teacher(exam.eval_rows, template) and config.feedback is None
    folder = Path(str(config.output_dir))
    model, tokenizer = load_model(of_model.model, of_model.dtype, **of_model.trust)
    taught_by = None
    if config.teacher == MODEL and distilled:
        taught_by = load_teacher(config, teachers_device(config), of_model.trust)
    exam.check(model, tokenizer, [template] if asks_teacher else [], taught_by and taught_by.model)
    set_seed(config.seed)  # of which an adapter begins
    trainer = trainer_of(add_lora(model, of_lora), tokenizer, rows, exam, config, taught_by)
    if nothing_is_left(trainer, claim, folder):
        return 0
    say_what_is_planned(trainer, of_model, of_lora)
    display = Display(silent=bool(config.disable_tqdm))
    trainer.add_callback(display)
    measure = Measure(trainer, exam)

    teacher = measure.teacher(template) if asks_teacher else None
    before, general_before = measure.held_out("before"), measure.general("before")
    exam.starting_answers = general_before
    train_started = time.perf_counter()
    with contextlib.closing(display), FinishOnSignal(silent=not trainer.is_world_process_zero()) as finish:
        trainer.add_callback(finish)
        trainer.show(display)
        trainer.train(resume_from_checkpoint=claim.resume)
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
    after, general_after = measure.held_out("after"), measure.general("after")
    forgetting = None if general_before is None else measure.forgetting(of_model)
    spent = trainer.step_log.spent()
    if not trainer.is_world_process_zero():
        return 0

    loss_first, loss_last = loss_ends(trainer.state.log_history)
    summary = Summary(
        model=of_model.model,
        method=config.method,
        divergence=config.divergence if distilled else None,
        teacher=config.teacher if distilled else None,
        teacher_model=config.teacher_model if distilled else None,
        steps=trainer.state.global_step,
        loss_first=loss_first,
        loss_last=loss_last,
        accuracy_before=accuracy_of(before),
        accuracy_after=accuracy_of(after),
        accuracy_teacher=accuracy_of(teacher),
        held_out_prompts=len(exam.eval_rows),
        general_accuracy_before=accuracy_of(general_before),
        general_accuracy_after=accuracy_of(general_after),
        forgetting=forgetting,
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
    with failing_clearly("the report", str(folder)):
        write_text(folder / REPORT_FILE, page([folder]))
    if not _is_asked_for(trainer):
        remove_checkpoints(folder, [f"checkpoint-{trainer.state.global_step}"])
    print("", describe(summary), "", table(summary), "", left_in(folder), sep="\n")
    return 0


def exam_of(rows: Rows, config: SDFTConfig) -> Exam:
    """The prompts to measure on before, after and in between; UsageError where what is asked for needs others."""
    exam = Exam(
        rows.held_out or None,
        rows.general or None,
        config,
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        silent=bool(config.disable_tqdm),
    )
    if config.eval_strategy == "no":
        return exam
    if not exam.eval_rows and not exam.general_rows:
        raise UsageError(
            "eval_strategy asks for evaluation during training, and eval_file and general_file are not set; at least "
            "one must be, or there is nothing to evaluate on"
        )
    metric = config.metric_for_best_model
    for name, rows_of, file in (
        ("accuracy", exam.eval_rows, "eval_file"),
        ("forgetting", exam.general_rows, "general_file"),
    ):
        if metric == name and not rows_of:
            raise UsageError(f"metric_for_best_model is {metric!r}, which is measured on {file}, and that is not set")
    return exam


def trainer_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    exam: Exam,
    config: SDFTConfig,
    taught_by: OtherModel | None = None,
) -> SDFTTrainer:
    """The trainer, which leaves the terminal to the command and writes metrics.jsonl."""
    try:
        trainer = SDFTTrainer(
            model,
            config,
            train_dataset=rows.train,
            processing_class=tokenizer,
            exam=exam,
            teacher_model=taught_by,
        )
    except UsageError:
        raise
    except ValueError as error:  # settings that the Trainer finds do not go together
        raise SettingsError(str(error)) from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsFile(Path(str(config.output_dir))))
    return trainer


def nothing_is_left(trainer: SDFTTrainer, claim: Claim, folder: Path) -> bool:
    """Whether the run is complete, which is said; UsageError where there are steps left and nothing to go on from."""
    resume, of, speaks = claim.resume, trainer.total_steps(), trainer.is_world_process_zero()
    done = max(claim.steps, steps_done(resume) if resume else 0)
    if done and (folder / SUMMARY_FILE).is_file() and done >= of:
        if speaks:
            print(f"the run is complete, with {counted(of, 'step')}: {folder}/ is left as it is")
        return True
    if done and resume is None:
        raise UsageError(
            f"resume_from_checkpoint is {trainer.args.resume_from_checkpoint!r}, and the run in {folder} ended after "
            f"{done} of what are now {of} steps and left no checkpoint; save_steps of the first run must divide its "
            "max_steps for one to be left"
        )
    if resume and speaks:
        print(f"going on from {resume}, after step {done} of {of}")
    return False


def say_what_is_planned(trainer: SDFTTrainer, of_model: ModelArguments, of_lora: LoraArguments) -> None:
    """On a GPU of its own, what a step is planned to take of it."""
    device = trainer.args.device
    if device.type != "cuda" or trainer.args.world_size > 1:
        return
    from sdft.planning.ahead import plan_ahead

    if line := plan_ahead(trainer, of_model.dtype, of_lora, torch.cuda.mem_get_info(device)[1]):
        print(line, flush=True)


class Measure:
    """The exam of a trainer's model, at any moment of its run; every process takes part."""

    def __init__(self, trainer: SDFTTrainer, exam: Exam) -> None:
        self.trainer, self.exam = trainer, exam
        self.tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)

    def held_out(self, when: str) -> Answers | None:
        """Answers to the held-out prompts."""
        return self._answers(self.exam.held_out, self.exam.eval_rows, f"{when}, held-out prompts")

    def teacher(self, template: list[Message]) -> Answers | None:
        """The teacher's answers to the held-out prompts under a template: before training that is the model itself,
        unless another one teaches it."""
        told, other = ("teacher, held-out prompts", template), self.trainer.teacher
        if not isinstance(other, ModelTeacher):
            return self._answers(self.exam.held_out, self.exam.eval_rows, *told)

        def measure() -> Answers | None:
            with other.scoring() as model:
                return self.exam.held_out(model, self.tokenizer, *told)

        return self._run(measure)

    def general(self, when: str) -> Answers | None:
        """Answers to the general prompts."""
        return self._answers(self.exam.general, self.exam.general_rows, f"{when}, general prompts")

    def _answers(self, ask: Callable[..., Answers | None], rows: list[Row], *told: Any) -> Answers | None:
        if not rows:
            return None

        def measure() -> Answers | None:
            with self.trainer.answering(self.exam) as backend:
                return ask(self.trainer.student, self.tokenizer, *told, backend=backend)

        return self._run(measure)

    def forgetting(self, of_model: ModelArguments) -> float | None:
        """Nats a token from the model that training started from, which is loaded again where nobody kept it."""
        start = self.trainer.starting_model or Teacher(
            load_model(of_model.model, of_model.dtype, self.trainer.student.device, **of_model.trust)[0]
        )
        return self._run(lambda: self.trainer.forgetting(start, shown=True))

    def _run(self, measure: Callable[[], Result]) -> Result:
        with self.trainer.phases("eval"):
            return self.trainer.with_student(measure)


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
        f"{folder}/ has the trained model, {RESOLVED_FILE}, {METRICS_FILE}, {SUMMARY_FILE}, {CURVES_FILE} and "
        f"{REPORT_FILE} ({sum(sizes.values()) - of_checkpoints:.0f} MiB)"
    )
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        line += f", and to go on from {names} ({of_checkpoints:.0f} MiB)"
    return line


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
