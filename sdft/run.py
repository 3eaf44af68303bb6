"""What the commands do: train with a before and an after, and evaluate on its own."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from sdft.config import DataArguments, EvalArguments, EvalCommand, LoraArguments, ModelArguments, SDFTConfig
from sdft.data import Row, load_rows
from sdft.errors import UsageError
from sdft.evaluate import Answers, answer, contains, forgetting, prompts_for
from sdft.models import add_lora, load_model
from sdft.report import MetricsFile, ProgressBar, Summary, describe, draw_curves, loss_ends, table, write_summary
from sdft.signals import FinishOnSignal
from sdft.teacher import BaseTeacher
from sdft.templates import Message, parse_template
from sdft.trainer import SDFTTrainer


def train(
    of_model: ModelArguments,
    of_lora: LoraArguments,
    of_data: DataArguments,
    of_eval: EvalArguments,
    config: SDFTConfig,
    *,
    started: float,
) -> None:
    """`sdft train`: check everything, measure, train, measure again, and leave the model and the report."""
    _quiet()
    rows = load_rows(of_data.train_file)
    template = parse_template(config.teacher_template)
    exam = Exam(of_eval, config.per_device_eval_batch_size, template, silent=bool(config.disable_tqdm))
    folder = Path(str(config.output_dir))
    resume = checkpoint_to_resume(config.resume_from_checkpoint, folder)
    model, tokenizer = load_model(of_model.model, of_model.dtype, **of_model.trust)
    exam.check(model, tokenizer, as_teacher=True)
    try:
        trainer = SDFTTrainer(
            add_lora(model, of_lora),
            config,
            train_dataset=rows,
            eval_dataset=exam.eval_rows or None,
            processing_class=tokenizer,
        )
    except ValueError as error:  # settings that the Trainer finds do not go together
        raise UsageError(str(error)) from error
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsFile(folder))
    if not config.disable_tqdm:
        trainer.add_callback(ProgressBar())

    teacher = exam.held_out(trainer.student, tokenizer, "teacher, held-out prompts", as_teacher=True)
    before = exam.held_out(trainer.student, tokenizer, "before, held-out prompts")
    general_before = exam.general(trainer.student, tokenizer, "before, general prompts")
    train_started = time.perf_counter()
    with FinishOnSignal() as finish:
        trainer.add_callback(finish)
        trainer.train(resume_from_checkpoint=resume)
    if finish.stopped:
        if trainer.is_world_process_zero():
            step, of = trainer.state.global_step, trainer.state.max_steps
            print(
                f"stopped by SIGTERM after step {step} of {of}: checkpoint-{step} is in {folder}/; "
                "--resume_from_checkpoint last goes on from there"
            )
        return
    training_seconds = time.perf_counter() - train_started
    trainer.save_model()
    after = exam.held_out(trainer.student, tokenizer, "after, held-out prompts")
    general_after = exam.general(trainer.student, tokenizer, "after, general prompts")
    moved = None
    if general_before is not None:
        base = trainer.teacher.model if isinstance(trainer.teacher, BaseTeacher) and config.teacher == "base" else None
        if base is None:
            base = load_model(of_model.model, of_model.dtype, trainer.student.device, **of_model.trust)[0]
        moved = forgetting(
            trainer.student,
            base,
            general_before,
            batch_size=exam.batch_size,
            progress=exam.progress("divergence from the base model"),
        )
    if not trainer.is_world_process_zero():
        return

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
        general_before=_accuracy(general_before),
        general_after=_accuracy(general_after),
        general_divergence=moved,
        general_prompts=0 if general_before is None else len(general_before.right),
        training_seconds=training_seconds,
        total_seconds=time.perf_counter() - started,
    )
    draw_curves(folder, trainer.state.log_history, summary)
    write_summary(folder, summary)
    files = f"{folder}/ has the trained model, metrics.jsonl, summary.json and curves.png"
    print("", describe(summary), "", table(summary), "", files, sep="\n")


def evaluate(of_model: ModelArguments, of_eval: EvalArguments, of_command: EvalCommand) -> None:
    """`sdft eval`: the accuracy of a model, of the model as a teacher, and its divergence from a base model."""
    _quiet()
    exam = Exam(of_eval, of_command.per_device_eval_batch_size, parse_template(of_command.teacher_template))
    if not exam.eval_rows and not exam.general_rows:
        raise UsageError("eval_file and general_file are not set; at least one must be, or there is nothing to score")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(of_model.model, of_model.dtype, device, **of_model.trust)
    exam.check(model, tokenizer, as_teacher=of_command.teacher)
    held_out = exam.held_out(model, tokenizer, "held-out prompts")
    teacher = (
        exam.held_out(model, tokenizer, "teacher, held-out prompts", as_teacher=True) if of_command.teacher else None
    )
    general = exam.general(model, tokenizer, "general prompts")
    lines = []
    if held_out is not None:
        lines.append(f"held-out prompts answered exactly ({len(held_out.right)}): {held_out.accuracy:.1%}")
    if teacher is not None:
        lines.append(f"the same, shown the demonstration ({len(teacher.right)}): {teacher.accuracy:.1%}")
    if general is not None and general.right:
        lines.append(f"general prompts answered ({len(general.right)}): {general.accuracy:.1%}")
    if general is not None and of_command.base_model not in (None, of_model.model):
        base, _ = load_model(of_command.base_model, of_model.dtype, device, **of_model.trust)
        base_answers = exam.general(base, tokenizer, "base model, general prompts")
        assert base_answers is not None
        moved = forgetting(
            model,
            base,
            base_answers,
            batch_size=exam.batch_size,
            progress=exam.progress("divergence from the base model"),
        )
        lines.append(f"divergence from {of_command.base_model}: {moved:.3f} nats a token")
    print("\n".join(lines))


class Exam:
    """The held-out and general prompts of a run, read and checked once, put to a model as often as asked."""

    def __init__(
        self, settings: EvalArguments, batch_size: int, template: list[Message], *, silent: bool = False
    ) -> None:
        self.settings, self.batch_size, self.template, self.silent = settings, batch_size, template, silent
        self.eval_rows: list[Row] = []
        self.general_rows: list[Row] = []
        if settings.eval_file:
            self.eval_rows = load_rows(settings.eval_file, need=("prompt", "answer"))
        if settings.general_file:
            self.general_rows = load_rows(settings.general_file, need=("prompt",))
        self.has_demonstrations = bool(self.eval_rows) and all(row.get("demonstration") for row in self.eval_rows)

    def progress(self, description: str) -> str | None:
        """The description of a progress bar, or None for no bar."""
        return None if self.silent else description

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, as_teacher: bool) -> None:
        """Find a prompt that is too long for the model before anything runs."""
        prompts_for(model, tokenizer, self.eval_rows, self.settings.eval_completion_length)
        prompts_for(model, tokenizer, self.general_rows, self.settings.general_completion_length)
        if as_teacher and self.has_demonstrations:
            prompts_for(model, tokenizer, self.eval_rows, self.settings.eval_completion_length, self.template)

    def held_out(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: str, *, as_teacher: bool = False
    ) -> Answers | None:
        if not self.eval_rows or (as_teacher and not self.has_demonstrations):
            return None
        return answer(
            model,
            tokenizer,
            self.eval_rows,
            max_new_tokens=self.settings.eval_completion_length,
            batch_size=self.batch_size,
            template=self.template if as_teacher else None,
            progress=self.progress(progress),
        )

    def general(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: str) -> Answers | None:
        if not self.general_rows:
            return None
        return answer(
            model,
            tokenizer,
            self.general_rows,
            max_new_tokens=self.settings.general_completion_length,
            batch_size=self.batch_size,
            scorer=contains,
            progress=self.progress(progress),
        )


def checkpoint_to_resume(wanted: str | None, folder: Path) -> str | None:
    """The checkpoint folder that `resume_from_checkpoint` names; "last" is the newest in the output folder."""
    if wanted is None:
        return None
    if wanted != "last":
        found = wanted if Path(wanted).is_dir() else None
    else:
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise UsageError(
            f"resume_from_checkpoint is {wanted!r}, and there is no such checkpoint (output_dir is {folder})"
        )
    return found


def _accuracy(answers: Answers | None) -> float | None:
    return None if answers is None else answers.accuracy


def _quiet() -> None:
    """Leave the terminal to the run's own progress and table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
