"""The samples of a step: who writes them, from which random numbers, and how many steps they serve."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft._compat import on_device
from sdft.attention import ShapesSeen
from sdft.batch import Sample, group, lay_out, parts_within
from sdft.checkpoints.runs import Runs
from sdft.data import Row
from sdft.errors import TrainingError
from sdft.evaluation.exam import Exam
from sdft.feedback.stage import FeedbackStage, Taught
from sdft.forward import Result, as_forward_of
from sdft.loss import completion_logprobs
from sdft.models.adapters import causal_lm
from sdft.progress.counts import Count, Watch
from sdft.progress.display import Progress
from sdft.progress.step_log import StepLog
from sdft.repeats import RepeatedRows
from sdft.rollouts.ahead import RolloutsAhead, Writing
from sdft.rollouts.engine import Engine
from sdft.rollouts.fitting import AsManyAsFit
from sdft.rollouts.generate import by_compiled_generate, write
from sdft.rollouts.interface import LENGTH, Backend, Completion, Request, Sampling
from sdft.rollouts.known_texts import KnownTexts
from sdft.rollouts.row_sampler import seed_of
from sdft.rollouts.writer import make_engine
from sdft.settings.rollouts import VLLM
from sdft.teacher import Teacher

logger = logging.getLogger(__name__)

#: Back-ends that draw from the student itself, whose probabilities in float32 are those of the loss.
EXACT = ("generate", "continuous")


class SamplingTrainer(Runs):
    """A `transformers.Trainer` whose model answers its own prompts."""

    progress = Progress()
    sampling: Sampling
    teacher: Teacher | None
    feedback: FeedbackStage | None
    step_log: StepLog
    exam: Exam
    engine: Engine | None = None
    ahead: RolloutsAhead | None = None
    reused: list[Sample] | None = None  # by the steps that the same samples serve
    write = staticmethod(write)  # which a benchmark may watch

    def show(self, progress: Progress) -> None:
        """Have `progress` told how far the step is that is under way."""
        self.progress, self.phases.told = progress, progress.phase

    @functools.cached_property
    def shapes(self) -> ShapesSeen:
        return ShapesSeen()

    @property
    def learner(self) -> nn.Module:
        """The model that learns, with its adapter where there is one."""
        return cast(nn.Module, self.model)

    @property
    def student(self) -> PreTrainedModel:
        """The transformers model that learns, without what distributed training and peft wrap around it."""
        return causal_lm(self.learner)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        group = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return RepeatedRows(len(rows), group, args.num_iterations, args.data_seed or args.seed)

    def step_samples(self, rows: list[Row]) -> list[Sample]:
        """A completion for each row: new ones, or those of the last step while they serve several."""
        iterations = self.args.num_iterations
        if iterations == 1 or self.args.method == "sft":
            return self.samples(rows)
        if self.reused is None or self.state.global_step % iterations == 0:
            self.reused = self.samples(rows)
            if any(sample.old_logprobs is None for sample in self.reused):  # and not those they were drawn with
                with self.phases("score"):
                    self.reused = self._with_old_logprobs(self.reused)
        return self.reused

    def _with_old_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probabilities that their tokens have now."""
        skip = self.args.skip_tokens
        scored: dict[int, Sample] = {}
        for members in group(samples, self.parts(samples, self.args.per_device_train_batch_size)):
            batch = on_device(self, lay_out(members, skip))
            score = functools.partial(completion_logprobs, self.student, batch, self.args, self.autocast_type)
            # Around the wrapper, too: DDP would wait for gradients.
            with torch.no_grad(), self.shapes.attention_for([batch], self.args.device):
                logprobs = as_forward_of(self.model_wrapped, self.learner, score)
            lengths = [len(sample.read().completion[skip:]) for sample in members]
            for one, values in zip(members, logprobs.split(lengths), strict=True):
                scored[id(one)] = dataclasses.replace(one, old_logprobs=values.tolist())
        return [scored[id(one)] for one in samples]

    @property
    def autocast_type(self) -> torch.dtype | None:
        """The type of mixed-precision products, None where there are none; `accelerate launch` may have set it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def step_batches(self, iterator: Iterator[list[Row]], count: int) -> list[list[Row]]:
        """The next `count` batches, fewer at the end of an epoch."""
        return list(itertools.islice(iterator, count)) if self.ahead is None else self.ahead.batches(iterator, count)

    def samples(self, rows: list[Row]) -> list[Sample]:
        """For "sdft", `rollouts_per_prompt` rollouts of each row, side by side; for "sft" its demonstration."""
        if self.args.method == "sft":
            return [Sample(row["prompt_ids"], row["completion_ids"], learned=row.get("learned")) for row in rows]
        asked = self._asked(rows)
        skip = self.args.skip_tokens
        completions = self.rollouts(asked)
        if self.teacher is not None:
            for completion in completions:
                self.teacher.check_reads(completion.tokens)
        samples = [
            Sample(
                row["prompt_ids"],
                completion.tokens,
                taught.prompt or row["prompt_ids"],
                row.get("completion_ids"),
                None if completion.logprobs is None else completion.logprobs[skip:],
                0.0 if self.args.mask_truncated_completions and completion.end == LENGTH else taught.weight,
                taught.log,
                row.get("learned"),
            )
            for (row, _), completion, taught in zip(asked, completions, self._taught(asked, completions), strict=True)
        ]
        if self.feedback is not None or self.args.mask_truncated_completions:
            self.step_log.add(left_out=sum(sample.weight == 0 for sample in samples))
        return samples

    def _taught(self, asked: list[tuple[Row, int]], completions: list[Completion]) -> list[Taught]:
        """What the teacher sees before each completion: what its row says, or what feedback makes of it now."""
        if self.feedback is None:
            return [Taught(row["teacher_prompt_ids"]) for row, _ in asked]
        with self.phases("feedback"):
            return self.feedback(asked, completions, self.state.global_step + 1)

    def say_nothing_to_learn(self) -> None:
        """Say of a step that no token of it counts, and why."""
        why = f"none of its completions is longer than skip_tokens, which is {self.args.skip_tokens}"
        if self.feedback is not None:
            why = f"feedback has left out all of its rollouts, or {why}"
        if self.args.mask_truncated_completions:
            why = f"mask_truncated_completions has left out all that were cut, or {why}"
        if self.is_world_process_zero():
            logger.warning("step %d has nothing to learn from: %s", self.state.global_step + 1, why)

    def _asked(self, rows: list[Row]) -> list[tuple[Row, int]]:
        """Each row as often as it is to have rollouts, with the rollout's place in the step's batch."""
        each = self.args.rollouts_per_prompt
        places = self._places(len(rows))
        return [(row, place * each + n) for row, place in zip(rows, places, strict=True) for n in range(each)]

    @property
    def corrects(self) -> bool:
        """Whether a token's loss is multiplied by its probability now over that with which it was drawn.

        "auto" does where the two differ by rounding alone: the same distribution, drawn from in less than float32 or
        by an engine that is not transformers.
        """
        args = self.args
        if args.method != "sdft" or args.rollout_correction != "auto":
            return args.method == "sdft" and args.rollout_correction == "truncate"
        same = not self.sampling.truncates and args.rollout_temperature == args.loss_temperature
        exact = self.autocast_type is None and self.student.dtype == torch.float32 and args.rollout_backend in EXACT
        return same and not exact and args.rollout_from == "student"

    def rollouts(self, asked: list[tuple[Row, int]]) -> list[Completion]:
        """A completion for each row, by the student or by the teacher who sees the row's demonstration.

        A row's random numbers depend on the seed, the step and its place in the step's batch.
        """
        step = self.state.global_step

        def watch(count: Count) -> bool:
            self.progress.rollouts(count, len(asked), len(asked) * self.sampling.max_new_tokens)
            return self.asked_to_stop

        def answer() -> list[Completion]:
            with self._writer() as (model, prompt_ids), self._backend(model) as backend:
                return self._writing(asked, step, model, prompt_ids, backend, watch)()

        with self.phases("rollout"):
            written = None if self.ahead is None else self.ahead.take(step)
            completions = self.with_student(answer) if written is None else written
        self.leave_if_asked()
        if self.args.rollout_correction == "truncate" and any(each.logprobs is None for each in completions):
            raise TrainingError(
                f"rollout_backend {self.args.rollout_backend!r} does not say with which probability it draws a token, "
                "and rollout_correction is 'truncate', which takes that; it may be none"
            )
        for (row, place), completion in zip(asked, completions, strict=True):
            self.known_texts.note(row, place % self.args.rollouts_per_prompt, completion)
        if self.ahead is not None:
            self.step_log.add(behind=0 if written is None else len(asked))
        self.step_log.add(
            completions=len(asked),
            completion_length=sum(len(completion.tokens) for completion in completions),
            finished=sum(completion.end != LENGTH for completion in completions),
        )
        with_drafts = [completion for completion in completions if completion.passes]
        self.step_log.add(
            drafted=sum(completion.drafted for completion in with_drafts),
            accepted=sum(completion.accepted for completion in with_drafts),
            passes=sum(completion.passes for completion in with_drafts),
            written_by_drafts=sum(len(completion.tokens) for completion in with_drafts),
        )
        return completions

    def _writing(
        self,
        asked: list[tuple[Row, int]],
        step: int,
        model: PreTrainedModel,
        prompt_ids: str,
        backend: str | Backend,
        watch: Watch,
    ) -> Writing:
        """What writes the rollouts of a step."""
        sampling = dataclasses.replace(self.sampling, watch=watch, logprobs=self.corrects)
        numbered = [(row, place % self.args.rollouts_per_prompt) for row, place in asked]
        seeds = [seed_of(self.args.seed, step, place) for _, place in asked]
        drafts = [self.known_texts.draft(row, number) for row, number in numbered]
        prompts = [row[prompt_ids] for row, _ in asked]
        return functools.partial(
            self.write,
            model,
            [Request(*each, self.known_texts.right) for each in zip(prompts, seeds, drafts, strict=True)],
            sampling,
            tokenizer=cast(PreTrainedTokenizerBase, self.processing_class),
            backend=backend,
            batch_size=self.rollouts_at_once,
        )

    def _write_ahead(self, rows: list[Row]) -> Writing:
        """What writes the rollouts of the next step, which has these rows, by the weights that the student has now."""
        asked, step, student = self._asked(rows), self.state.global_step + 1, self.student

        def watch(count: Count) -> bool:
            return self.asked_to_stop

        def push() -> Writing:
            with self._backend(student) as backend:
                return self._writing(asked, step, student, "prompt_ids", backend, watch)

        return self.with_student(push)

    @functools.cached_property
    def known_texts(self) -> KnownTexts:
        """What rollouts may resemble."""
        return KnownTexts(self.args.rollout_draft)

    @functools.cached_property
    def rollouts_at_once(self) -> int | AsManyAsFit | None:
        """How many rollouts are sampled at once; what is found out of the memory holds for the whole run."""
        size = self.args.rollout_batch_size
        return AsManyAsFit() if isinstance(size, str) else size

    def with_student(self, function: Callable[[], Result]) -> Result:
        """What `function` gives, in which the student may be called, in the run's precision.

        Where a sharded model has peft's wrapped around it, weights outside its layers are whole only in the forward
        pass of that.
        """
        with self.accelerator.autocast():
            if self.is_fsdp_enabled and self.learner is not self.student:
                return as_forward_of(self.model_wrapped, self.learner, function)
            return function()

    @contextlib.contextmanager
    def _writer(self) -> Iterator[tuple[PreTrainedModel, str]]:
        """The model that writes the rollouts, and the name of the prompt that it sees."""
        if self.teacher is not None and self.args.rollout_from == "teacher":
            with self.teacher.scoring() as model:
                yield model, "teacher_prompt_ids"
        else:
            yield self.student, "prompt_ids"

    def _backend(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[str | Backend]:
        """What samples the rollouts: a back-end, or an engine with the weights that the model has now."""
        if self.engine is not None:
            return self.engine.serving(model)
        compiles = self.args.rollout_compile and model.device.type == "cuda"
        return contextlib.nullcontext(by_compiled_generate if compiles else self.args.rollout_backend)

    @contextlib.contextmanager
    def answering(self, exam: Exam) -> Iterator[str | Backend]:
        """What writes the answers of an exam: what writes the rollouts; `generate` where vLLM has no room for them."""
        engine, backend = self.engine, self.args.rollout_backend
        if engine is not None and exam.longest <= engine.longest:
            with engine.serving(self.student) as answer:
                yield answer
        else:
            yield "generate" if backend == VLLM or self.args.method == "sft" else backend

    def make_engine(self, rows: Sequence[Row]) -> None:
        """Have vLLM serve the student, where it is to answer the prompts of these rows."""
        args = self.args
        if args.method != "sdft" or args.rollout_backend != VLLM or not rows:
            return
        longest = max(len(row["prompt_ids"]) for row in rows) + args.max_completion_length
        make = functools.partial(
            make_engine,
            args,
            self.student,
            longest=max(longest, self.exam.longest),
            dtype=self.autocast_type or self.student.dtype,
            probe=rows[0]["prompt_ids"],
        )
        self.engine = self.with_student(make)
        if args.rollout_lag:
            self.ahead = RolloutsAhead(self._write_ahead, self.phases)
            self.callback_handler.callbacks.insert(0, self.ahead)  # before others note how a step has ended

    def _places(self, count: int) -> list[int]:
        """The place in the step's batch, over all processes, of each of this process's rows.

        The sampler's batches go to the processes in turn.
        """
        size, processes, process = self.args.train_batch_size, self.args.world_size, self.args.process_index
        return [(n // size * processes + process) * size + n % size for n in range(count)]

    def parts(self, samples: list[Sample], most: int) -> int:
        """In how many groups of at most `most` samples each keeps to `max_forward_tokens`; as many in every process."""
        parts = -(-len(samples) // most)
        if self.args.max_forward_tokens is not None:
            parts = max(parts, parts_within(samples, self.args.max_forward_tokens))
            parts = int(self.accelerator.gather(torch.tensor([parts], device=self.args.device)).max())
        return parts
