"""`SDFTTrainer`: self-distillation fine-tuning (arXiv 2601.19897) as a `transformers.Trainer`.

Each optimizer step: the student answers the step's prompts, the teacher, who sees the demonstrations, scores the
answers token by token, and the student moves towards the teacher. Only what is particular to that is here: the
rollouts where the Trainer collects a step's micro-batches (`get_batch_samples`), the loss (`compute_loss`), the
teacher beside the student, and checkpoints that carry the teacher and are never torn. The loss is the mean over the
step's tokens, whatever the accumulation and the number of processes.

The teacher is made from the model that the trainer is given. A resumed run therefore takes the original model again,
not the checkpoint, and loads the checkpoint into the student.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from sdft import checkpoint
from sdft.completions import CompletionsFile
from sdft.config import SDFTConfig
from sdft.data import Row, encode_rows, load_rows
from sdft.errors import TrainingError, UsageError
from sdft.evaluate import answer
from sdft.layout import Batch, Sample, group, split
from sdft.loss import StepLoss, check_head, demonstration_loss, distillation_loss
from sdft.models import context_length, eos_token_ids, load_model
from sdft.rollout import Sampling, finished, sample, seeded
from sdft.teacher import Teacher, make_teacher
from sdft.templates import parse_template

Result = TypeVar("Result")


class SDFTTrainer(Trainer):
    """Trains a causal language model on rows of `prompt` and `demonstration`.

    `model` is a model, or a name for `sdft.models.load_model`; `processing_class` its tokenizer (found with a name);
    `train_dataset` a `datasets.Dataset`, a list of rows, or a JSONL or Parquet file; `eval_dataset` the same with
    `prompt` and `answer`, for the greedy accuracy that `evaluate` reports. Other arguments are the Trainer's.

    >>> SDFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", SDFTConfig(), train_dataset=rows).train()
    """

    args: SDFTConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SDFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SDFTConfig()
        if isinstance(model, str):
            model, tokenizer = load_model(model)
            processing_class = processing_class or tokenizer
        if processing_class is None:
            raise UsageError("processing_class is not set; it must be the model's tokenizer")
        self.sampling = Sampling(
            max_new_tokens=args.max_completion_length,
            eos_ids=eos_token_ids(model, processing_class),
            temperature=args.rollout_temperature,
            top_p=args.rollout_top_p,
            top_k=args.rollout_top_k,
            min_p=args.rollout_min_p,
            stop=tuple(args.rollout_stop or ()),
        )
        rows = None if train_dataset is None else self._encode(train_dataset, model, args, processing_class)
        eval_rows = (
            None if eval_dataset is None else load_rows(eval_dataset, name="eval_dataset", need=("prompt", "answer"))
        )
        if args.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        switch_off_dropout(model)
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs take `accelerate launch`: DataParallel cannot split our batches
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            data_collator=keep_rows,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        model.config.use_cache = use_cache  # our forwards say what they want, and the saved model should generate fast
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the step's tokens; the Trainer need not
        if rows is not None:
            check_head(self.student, rows[0]["prompt_ids"][:16])
        self.teacher: Teacher | None = None
        if args.method == "sdft":
            self.teacher = make_teacher(args.teacher, self.student, args.ema_rate)
            self.add_callback(TeacherFollows(self.teacher))
        self.completions: CompletionsFile | None = None
        if args.method == "sdft" and args.log_completions:
            self.completions = CompletionsFile(
                str(args.output_dir), args.log_completions, processing_class, args.skip_tokens
            )
            self.add_callback(self.completions)
        self._sums: dict[str, Tensor] = {}
        self._saving_in: str | None = None

    @property
    def student(self) -> PreTrainedModel:
        """The model that learns, without what distributed training wraps around it."""
        return cast(PreTrainedModel, self.model)

    @staticmethod
    def _encode(source: Any, model: PreTrainedModel, args: SDFTConfig, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        return encode_rows(
            load_rows(source, name="train_dataset"),
            tokenizer,
            method=args.method,
            template=parse_template(args.teacher_template),
            eos_ids=eos_token_ids(model, tokenizer),
            max_completion_length=args.max_completion_length,
            context=context_length(model),
        )

    # One optimizer step: rollouts, layout, loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The step's micro-batches, with the students' answers in them, and the number of tokens in its loss."""
        batches: list[list[Row]] = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        samples = self.samples([row for batch in batches for row in batch])
        micro_batches = split(samples, len(batches), self.args.skip_tokens)
        if self.completions is not None and self.completions.wants(self.state.global_step + 1):
            for batch, members in zip(micro_batches, group(samples, len(batches)), strict=True):
                batch["samples"] = members
        tokens = torch.tensor(sum(batch["labels"].numel() for batch in micro_batches), device=device)
        if self.args.average_tokens_across_devices:
            tokens = self.accelerator.reduce(tokens, "sum")
        return micro_batches, tokens.clamp(min=1)

    def samples(self, rows: list[Row]) -> list[Sample]:
        """For "sdft", `rollouts_per_prompt` rollouts of each row, side by side; for "sft" its demonstration."""
        if self.args.method == "sft":
            return [Sample(row["prompt_ids"], row["completion_ids"]) for row in rows]
        rows = [row for row in rows for _ in range(self.args.rollouts_per_prompt)]
        completions = self.rollouts(rows)
        return [
            Sample(row["prompt_ids"], completion, row["teacher_prompt_ids"])
            for row, completion in zip(rows, completions, strict=True)
        ]

    def rollouts(self, rows: list[Row]) -> list[list[int]]:
        """A completion for each row, by the student or by the teacher who sees the row's demonstration."""
        started = time.perf_counter()
        device = self.args.device
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        by_teacher = self.teacher is not None and self.args.rollout_from == "teacher"
        with (
            seeded(device, self.args.seed, self.state.global_step, self.args.process_index),
            self.accelerator.autocast(),
        ):
            completions = sample(
                self.teacher.model if self.teacher is not None and by_teacher else self.student,
                [row["teacher_prompt_ids" if by_teacher else "prompt_ids"] for row in rows],
                self.sampling,
                tokenizer=tokenizer,
                backend=self.args.rollout_backend,
                batch_size=self.args.rollout_batch_size,
            )
        self._count(
            completions=len(rows),
            completion_length=sum(map(len, completions)),
            finished=sum(finished(completion, self.sampling, tokenizer) for completion in completions),
            rollout_seconds=time.perf_counter() - started,
        )
        return completions

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the mean loss over the step's tokens."""
        student = self.accelerator.unwrap_model(model)
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None

        def forward() -> StepLoss:
            if self.teacher is None:
                return demonstration_loss(student, inputs, self.args, autocast)
            return distillation_loss(
                student, self.teacher.model, inputs, self.args, autocast, per_token="samples" in inputs
            )

        step_loss = as_forward_of(model, student, forward)
        if self.completions is not None and "samples" in inputs:
            self.completions.add(inputs["samples"], step_loss.tokens)
        self._count(tokens=inputs["labels"].numel(), **step_loss.sums)
        loss = step_loss.total / (inputs["labels"].numel() if num_items_in_batch is None else num_items_in_batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: training stopped before the weights "
                "took it in (a lower learning_rate or a stricter max_grad_norm may help)"
            )
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):  # under fp16 the scaler skips such steps
            raise TrainingError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}: training stopped before "
                "the weights took it in"
            )
        return norm

    # What is logged

    def _count(self, **sums: Tensor | float) -> None:
        """Add to the sums whose means the next log shows."""
        for name, value in sums.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=self.args.device).detach()
            self._sums[name] = self._sums.get(name, 0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            values = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum").tolist()
            sums = dict(zip(names, values, strict=True))
            tokens, completions = sums.pop("tokens"), sums.pop("completions", 0.0)
            for name in ("student_entropy", "teacher_entropy"):
                if name in sums:
                    logs[name] = sums[name] / max(tokens, 1)
            if completions:
                logs["completion_length"] = sums["completion_length"] / completions
                logs["finished"] = sums["finished"] / completions
                logs["rollout_seconds"] = sums["rollout_seconds"] / self.accelerator.num_processes
            self._sums = {}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Greedy accuracy: the share of prompts whose answer is exactly the row's `answer`."""
        rows: Any = self.eval_dataset
        if eval_dataset is not None:
            rows = load_rows(eval_dataset, name="eval_dataset", need=("prompt", "answer"))
        answers = answer(
            self.student,
            cast(PreTrainedTokenizerBase, self.processing_class),
            rows,
            max_new_tokens=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
        )
        metrics = {f"{metric_key_prefix}_accuracy": answers.accuracy or 0.0}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints: whole or not there, the teacher in them

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        with self._staging(folder) as staging:
            staged, final = os.path.join(staging, name), os.path.join(folder, name)
            self._saving_in = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            if self.args.should_save:
                if self.teacher is not None:
                    self.teacher.save(staged)
                if self.state.best_model_checkpoint == staged:
                    self.state.best_model_checkpoint = final
                    self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.publish_folder(staged, final)
                rotate_checkpoints(folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_in is None:  # not before the checkpoint has its name
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _staging(self, folder: str) -> Iterator[str]:
        with checkpoint.staging(folder, owner=self.args.should_save) as path:
            self.accelerator.wait_for_everyone()
            yield path
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.teacher is not None:
            self.teacher.load(resume_from_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it, each file in one move."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = output_dir or str(self.args.output_dir)
        with self._staging(folder) as staged:
            super().save_model(staged, _internal_call=True)
            if self.args.should_save:
                checkpoint.publish_files(staged, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


class TeacherFollows(TrainerCallback):
    """Lets the teacher follow the student after each optimizer step."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.teacher.update(kwargs["model"])


def keep_rows(rows: list[Row]) -> Any:
    """A batch stays a list of rows until the rollouts are there."""
    return rows


def switch_off_dropout(model: nn.Module) -> None:
    """Student and teacher are compared token by token; dropout would be noise in what the student learns."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (its type is known at run time only)


def as_forward_of(wrapper: nn.Module, module: nn.Module, function: Callable[[], Result]) -> Result:
    """Run `function` as the forward pass of `wrapper`, so that DDP or FSDP around `module` sees and prepares it."""
    if wrapper is module:
        return function()
    own = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own

    def redirected() -> Result:
        restore()
        return function()

    module.forward = redirected
    try:
        return wrapper()
    finally:
        restore()
