"""`SDFTTrainer`: self-distillation fine-tuning (arXiv 2601.19897) as a `transformers.Trainer`.

Each optimizer step: the student answers the step's prompts, the teacher, who sees the demonstrations, scores the
answers token by token, and the student moves towards the teacher. Only what is particular to that is here: the
rollouts where the Trainer collects a step's micro-batches (`get_batch_samples`), the loss (`compute_loss`), the
teacher beside the student, and what checkpoints carry of both (`sdft.checkpoints` keeps them whole). The loss is the
mean over the step's tokens, whatever the accumulation and the number of processes.

The teacher is made from the model that the trainer is given. A resumed run therefore takes the original model again,
not the checkpoint, and loads the checkpoint into the student.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from sdft._compat import is_compiled, use_one_gpu
from sdft.batch import Batch, Sample, count_items, demonstrations_of, group, lay_out
from sdft.data import Row, encode_prompt
from sdft.early_checks import check_writable
from sdft.errors import Diverged, UsageError
from sdft.evaluation.completion_log import CompletionsFile
from sdft.evaluation.exam import Exam
from sdft.feedback.interface import FeedbackFunction
from sdft.feedback.stage import stage_of
from sdft.forward import as_forward_of
from sdft.head import backbone, check_head, check_same_in_training
from sdft.launch import installed, prepare, switch_off_dropout
from sdft.loss import StepLoss, demonstration_loss, distillation_loss
from sdft.models.adapters import adapted, causal_lm, check_adapters, check_new_tokens, has_adapter
from sdft.models.load import eos_token_ids, limits, load_model
from sdft.progress.collapse import CollapseWatch
from sdft.progress.step_log import StepLog
from sdft.prompt_cache import PromptCache, check_prompt_cache
from sdft.repeats import load_samples, save_samples
from sdft.rollouts.interface import Sampling
from sdft.rows import training_rows
from sdft.samples import SamplingTrainer
from sdft.settings.config import SDFTConfig
from sdft.settings.inherited import check_arguments
from sdft.teacher import AdapterOffTeacher, BaseTeacher, Teacher, TeacherFollows, trains_beside_adapter
from sdft.teacher_model import GivenTeacher, other_teacher, teacher_of
from sdft.token_weights import weighting_of

logger = logging.getLogger(__name__)


class SDFTTrainer(SamplingTrainer):
    """Trains a causal language model on rows of `prompt` and `demonstration`.

    `model` is a transformers model, with a peft adapter or without, or a name for `sdft.load_model`;
    `peft_config` gives it an adapter. What trains is the adapter where there is one. `processing_class` is the
    tokenizer (found with a name);
    `train_dataset` a `datasets.Dataset`, a list of rows, or a file's name; `eval_dataset` the same with
    `prompt` and `answer`, for the accuracy that `evaluate` reports; `general_dataset` the same with `prompt`, of other
    kinds, for how far the model has moved from where it started. An `exam` has the two in one, read and checked
    before; the starting model is then kept only where `eval_strategy` asks for it. `teacher_model`, where the teacher
    is 'model', is one, which is frozen; or a name; or a model with its tokenizer, which then is compared with the
    model's own on every row. `feedback` is a function (`sdft.feedback`) that says, once a step's rollouts are written,
    what the teacher sees of each. Other arguments are the Trainer's.

    >>> SDFTTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", SDFTConfig(), train_dataset=rows).train()
    """

    args: SDFTConfig

    def __init__(
        self,
        model: nn.Module | str,
        args: SDFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        peft_config: Any = None,
        general_dataset: Any = None,
        exam: Exam | None = None,
        teacher_model: GivenTeacher = None,
        feedback: FeedbackFunction | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or SDFTConfig()
        if not isinstance(args, SDFTConfig):
            raise UsageError(f"args is a {type(args).__name__}; it must be an SDFTConfig, which has its fields")
        check_arguments(kwargs)
        check_writable(str(args.output_dir))
        learner, processing_class = model_and_tokenizer(model, processing_class)
        check_adapters(learner)
        bare = causal_lm(learner)
        self.sampling = sampling_by(args, bare, processing_class)
        rows, other = None, other_teacher(teacher_model, args, bare, processing_class)
        seen = limits(bare) if other is None else other.reads.limits
        self.feedback = stage_of(feedback, args, processing_class, seen)
        weighting_of(args)
        if train_dataset is not None:
            ends = eos_token_ids(bare, processing_class)
            rows = training_rows(train_dataset, args, processing_class, ends, limits(bare), other and other.reads)
        keeps_start = exam is None or args.eval_strategy != "no"
        if exam is None:
            exam = exam_by(args, eval_dataset, general_dataset)
            exam.check(bare, processing_class)
        self.exam = exam
        if args.freeze_embeddings:
            bare.get_input_embeddings().requires_grad_(False)
        if peft_config is not None:
            set_seed(args.seed)  # of which the adapter begins
            learner = adapted(bare, peft_config)
        check_new_tokens(learner)
        switch_off_dropout(learner)
        use_one_gpu(args)  # several GPUs take `accelerate launch`: DataParallel cannot split our batches
        # Our forwards say what they want, and the saved model should generate as fast as before.
        args.use_cache = getattr(bare.config.get_text_config(), "use_cache", True)
        with installed("the settings ask for something"):
            super().__init__(
                model=learner,
                args=args,
                data_collator=keep_rows,
                train_dataset=rows,
                # The Trainer evaluates only where it has a dataset to; for us general prompts are enough.
                eval_dataset=self.exam.eval_rows or self.exam.general_rows or None,
                processing_class=processing_class,
                **kwargs,
            )
        prepare(self, corrects=self.corrects)
        if not self.place_model_on_device and not self.is_model_parallel:
            # The Trainer would leave that until training starts, and teachers are copied before.
            nn.Module.to(self.learner, args.device)
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the step's tokens; the Trainer need not
        tokens = self._some_tokens(rows)
        if tokens:
            check_head(self.student, tokens, self.autocast_type)
            check_same_in_training(self.student, tokens, self.autocast_type)
        self.add_callback(CollapseWatch(args.stop_on_collapse))
        self.step_log = StepLog(self.accelerator, self.phases, args.max_completion_length)
        self.teacher = None
        if args.method == "sdft":
            self.teacher = teacher_of(args, self.learner, other, tokens, self.autocast_type)
            self.add_callback(TeacherFollows(self.teacher, args.ema_interval))
        penalised = args.method == "sft" and args.base_kl_weight > 0
        self.starting_model = self._starting_model(penalised or (keeps_start and bool(exam.general_rows)))
        self.prompt_cache = self._prompt_cache(rows)
        self.completions: CompletionsFile | None = None
        if args.method == "sdft" and args.log_completions:
            folder = str(args.output_dir)
            self.completions = CompletionsFile(folder, args.log_completions, processing_class, args.skip_tokens)
            self.add_callback(self.completions)
        self.make_engine(rows or [])
        self._pieces = (0, 0)

    def _some_tokens(self, rows: Sequence[Row] | None) -> list[int]:
        """A few tokens to find out with what the model is, where there is any text to have them from."""
        if rows is not None:
            return rows[0]["prompt_ids"][:16]
        if self.exam.general_rows:
            tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
            return encode_prompt(self.exam.general_rows[0]["prompt"], tokenizer)[:16]
        return []

    def _starting_model(self, kept: bool) -> Teacher | None:
        """What lends the model that training starts from; where that takes a copy, only if it is to be kept."""
        if self.teacher is not None and self.args.teacher == "base":
            return self.teacher
        if has_adapter(self.learner) and trains_beside_adapter(self.learner) is None:
            return AdapterOffTeacher(self.learner)
        return BaseTeacher(self.learner, offload=self.args.teacher_offload) if kept else None

    def _prompt_cache(self, rows: Sequence[Row] | None) -> PromptCache | None:
        """Where the teacher finds prompts that it has read before, if any are to be kept."""
        if self.teacher is None or not rows or not self.args.teacher_cache_gib:
            return None
        with self.teacher.scoring() as model:
            check_prompt_cache(model, backbone(model), rows[0]["prompt_ids"][:16], self.autocast_type)
        return PromptCache(int(self.args.teacher_cache_gib * 2**30))

    # One optimizer step: rollouts, layout, loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The step's micro-batches, with the students' answers in them, and what its summed loss is divided by."""
        batches = self.step_batches(epoch_iterator, num_batches)
        if not batches:
            return [], None
        self.use_weights("train")
        samples = self.step_samples([row for batch in batches for row in batch])
        micro_batches = [self._in_pieces(members) for members in group(samples, len(batches))]
        pieces = [piece for micro_batch in micro_batches for piece in micro_batch]
        parts = [pieces, [demonstrations_of(piece) for piece in pieces]]
        items = torch.tensor([sum(count_items(b) for b in part if b) for part in parts], device=device)
        if self.args.average_tokens_across_devices:
            items = self.accelerator.reduce(items, "sum")
        if not items[0]:
            self.say_nothing_to_learn()
        items, demonstration_items = items.clamp(min=torch.finfo(items.dtype).tiny).unbind()
        for piece in pieces:
            piece["demonstration_items"] = demonstration_items
        self._pieces = (0, len(pieces))
        self.phases.begin("learn")
        return micro_batches, items

    def _in_pieces(self, samples: list[Sample]) -> list[Batch]:
        """A micro-batch, laid out in pieces that keep to `max_forward_tokens`."""
        parts = self.parts(samples, len(samples))
        return [
            lay_out(members, self.args.skip_tokens, self.args.loss_normalisation) | {"samples": members}
            for members in group(samples, parts)
        ]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """A micro-batch's loss and gradients, piece by piece; processes exchange whole gradients after the last."""
        losses = []
        with self.shapes.attention_for(inputs, self.args.device):
            for piece in inputs[:-1]:
                # Sharded gradients are exchanged at once: they would be whole in every process until then.
                with contextlib.nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, piece, num_items_in_batch))
            losses.append(super().training_step(model, inputs[-1], num_items_in_batch))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        return sum(super(SDFTTrainer, self).floating_point_ops(piece) for piece in inputs)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for piece in inputs:
            super()._track_num_input_tokens(piece)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of the step's mean loss that a micro-batch, or a piece of one, has."""
        module = self.accelerator.unwrap_model(model)
        share = self.args.demonstration_weight
        items = count_items(inputs) if num_items_in_batch is None else num_items_in_batch

        def forward() -> StepLoss:
            student = causal_lm(module)
            if self.teacher is None:
                base = self.starting_model if self.args.base_kl_weight else None
                timed = self.phases("score")
                out = demonstration_loss(student, inputs, self.args, self.autocast_type, base, timed=timed)
                return StepLoss(out.total / items, out.sums)
            logged = self.completions is not None and self.completions.wants(self.state.global_step + 1)
            out = distillation_loss(
                student,
                self.teacher,
                inputs,
                self.args,
                self.autocast_type,
                per_token=logged,
                prompts=self.prompt_cache,
                timed=self.phases("score"),
            )
            loss = out.total / items
            if share:
                shown = demonstration_loss(student, demonstrations_of(inputs), self.args, self.autocast_type)
                loss = (1 - share) * loss + share * shown.total / inputs["demonstration_items"]
            return StepLoss(loss, out.sums, out.tokens)

        step_loss = as_forward_of(model, module, forward)
        self._pieces = (self._pieces[0] + 1, self._pieces[1])
        self.progress.learned(*self._pieces)
        if self.completions is not None and step_loss.tokens is not None:
            self.completions.add(inputs["samples"], step_loss.tokens)
        self.step_log.add(tokens=inputs["labels"].numel(), **step_loss.sums)
        loss = step_loss.total
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: training stopped before the weights "
                "took it in (a lower learning_rate or a stricter max_grad_norm may help)"
            )
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.autocast_type == torch.float16  # then the scaler skips such steps
        if not scaled and not torch.isfinite(torch.as_tensor(norm)):
            raise Diverged(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}: training stopped before "
                "the weights took it in"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.step_log:
            logs.update(self.step_log.line())
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What the model can do and what it has forgotten, where there are prompts to measure it on.

        `eval_accuracy`: the share of answers to held-out prompts that the scorer calls right. `eval_forgetting`: the
        mean divergence from the model that training started from on general prompts, in nats a token.
        """
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        exam = self.exam
        if eval_dataset is not None:
            exam = exam_by(self.args, eval_dataset)
            exam.check(self.student, tokenizer)

        def measure() -> dict[str, float | None]:
            with self.answering(exam) as backend:
                held_out = exam.held_out(self.student, tokenizer, backend=backend)
            return {
                "accuracy": None if held_out is None else held_out.accuracy,
                "forgetting": None if self.starting_model is None else self.forgetting(self.starting_model),
            }

        self.use_weights("eval")
        with self.phases("eval"):
            measured = self.with_student(measure)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items() if value is not None}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def forgetting(self, start: Teacher, *, shown: bool = False) -> float | None:
        """How far the student is from the model that training started from, on the general prompts."""
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        return self.exam.forgetting(self.student, tokenizer, start, self.autocast_type, shown=shown)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            "predict does not say how well a model answers; evaluate does, and sdft generate writes answers"
        )

    # Checkpoints: what is in them besides the Trainer's own

    def save_beside(self, folder: str) -> None:
        super().save_beside(folder)
        if self.reused is not None:
            save_samples(folder, self.args.process_index, self.reused)
        if self.args.should_save and self.teacher is not None:
            self.teacher.save(folder)

    def load_beside(self, folder: str) -> None:
        if self.teacher is not None:
            self.teacher.load(folder)
        self.reused = load_samples(folder, self.args.process_index)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:  # gathered from all processes: tied weights have come as two
            tied = self.student.all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)


def model_and_tokenizer(
    model: nn.Module | str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model that learns, loaded if it is given by name, and its tokenizer. UsageError for what cannot learn."""
    learner, own = (model, None) if isinstance(model, nn.Module) else load_model(model)
    tokenizer = tokenizer or own
    if is_compiled(learner):
        raise UsageError(
            "model is what torch.compile returns; it must be the model itself, which model.compile() or "
            "model.model.compile() compile in place"
        )
    if tokenizer is None:
        raise UsageError("processing_class is not set; it must be the model's tokenizer")
    return learner, tokenizer


def sampling_by(args: SDFTConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """How rollouts are sampled under the run's settings."""
    return Sampling(
        max_new_tokens=args.max_completion_length,
        eos_ids=eos_token_ids(model, tokenizer),
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        top_k=args.rollout_top_k,
        min_p=args.rollout_min_p,
        stop=tuple(args.rollout_stop or ()),
    )


def exam_by(args: SDFTConfig, held_out: Any, general: Any = None) -> Exam:
    """The prompts to evaluate on during training, under the run's settings and without progress bars of their own."""
    size, seed = args.per_device_eval_batch_size, args.seed
    return Exam(held_out, general, args, batch_size=size, seed=seed, silent=True)


def keep_rows(rows: list[Row]) -> Any:
    """A batch stays a list of rows until the rollouts are there."""
    return rows
