"""What the model can do, and what it has forgotten.

- Accuracy: answers to held-out prompts, greedy or sampled, right where a scorer (see `sdft.evaluation.scorers`) says
  so of them and the row's `answer`. Given a template, the same for the demonstration-conditioned teacher: what it
  cannot do, the student cannot learn from it.
- Forgetting: the mean over tokens of KL(start || model) on the greedy answers to general prompts of the model that
  training started from, in nats: how far the distribution has moved, at each token, where that model would have been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.batch import Sample, lay_out
from sdft.data import WHERE, Options, Row, check_ids, check_options, encode_prompt, teacher_chat
from sdft.evaluation.scorers import Scorer, exact, scorer_of
from sdft.forward import evaluating
from sdft.loss import divergence, teacher_view
from sdft.models.load import eos_token_ids, limits
from sdft.processes import each_batch, processes
from sdft.rollouts.generate import batches_by_length, sample
from sdft.rollouts.interface import Backend, Sampling, finished
from sdft.rollouts.row_sampler import seed_of
from sdft.rows import exam_rows, have_demonstrations
from sdft.settings.config import EvalSettings
from sdft.teacher import Teacher
from sdft.templates import Message

#: Told of each answer as soon as it is made: its number, its row, its text, whether it is right, if that is known, and
#: whether it is finished.
Made = Callable[[int, Row, str, bool | None, bool], None]


def prompts_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int,
    template: list[Message] | None = None,
    options: Options = None,
) -> list[list[int]]:
    """Token ids of the rows' prompts, or with a template of the teacher's prompts, checked against the context.

    `options` are what the chat template is told beside the messages.
    """
    encoded = []
    for row in rows:
        chat = teacher_chat(row, template) if template else row["prompt"]
        ids = encode_prompt(chat, tokenizer, row[WHERE], tools=row.get("tools"), options=options)
        kind = "teacher prompt" if template else "prompt"
        check_ids(row, kind, ids, tokenizer, max_new_tokens, limits(model))
        encoded.append(ids)
    return encoded


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    progress: str | None = None,
    share: bool = False,
    made: Callable[[int, list[int], bool], None] | None = None,
    stop: Sequence[str] = (),
    backend: str | Backend = "generate",
) -> list[list[int]]:
    """The completion of each prompt, in the prompts' order; batches hold prompts of similar length.

    It ends with an end token, or with one of the texts in `stop`.

    Greedy where `temperature` is None or 0; else sampled, from random numbers that depend on `seed` and the prompt's
    place alone and leave the caller's as they were. `backend` writes the completions. With `share`, processes share the
    prompts; see `sdft.processes`. `made` is told of each completion, by its prompt's number, as soon as its batch is
    done, and whether it is finished.
    """
    sampling = Sampling(max_new_tokens, eos_token_ids(model, tokenizer), stop=tuple(stop))
    if temperature:
        sampling = replace(sampling, temperature=temperature, top_p=top_p, top_k=top_k)

    def completed(numbers: list[int]) -> list[list[int]]:
        seeds = [seed_of(seed, number) for number in numbers]
        asked = [prompts[number] for number in numbers]
        outputs = sample(model, asked, sampling, tokenizer=tokenizer, seeds=seeds, backend=backend)
        if made is not None:
            for number, output in zip(numbers, outputs, strict=True):
                made(number, output, finished(output, sampling, tokenizer))
        return outputs

    batches = _batches(prompts, batch_size, share)
    completions: dict[int, list[int]] = {}
    for numbers, outputs in zip(batches, each_batch(batches, completed, share=share, progress=progress), strict=True):
        completions.update(zip(numbers, outputs, strict=True))
    return [completions[number] for number in range(len(prompts))]


@dataclass(frozen=True)
class Answers:
    """Answers to a set of rows: as token ids, as text, whether each is right (where rows have answers) and finished.

    Where a row is answered several times, its answers follow one another.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    texts: list[str]
    right: list[bool]
    finished: list[bool]

    @property
    def accuracy(self) -> float | None:
        return sum(self.right) / len(self.right) if self.right else None


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int,
    scorer: Scorer = exact,
    template: list[Message] | None = None,
    options: Options = None,
    temperature: float | None = None,
    samples: int = 1,
    seed: int = 0,
    progress: str | None = None,
    share: bool = False,
    made: Made | None = None,
    stop: Sequence[str] = (),
    backend: str | Backend = "generate",
) -> Answers:
    """Ask the model each row's prompt (with a template: the teacher's form of it) and score the answers.

    `samples` answers to each row, greedy ones or at a `temperature`, as `complete` has it.
    """
    rows = [row for row in rows for _ in range(samples)]
    prompts = prompts_for(model, tokenizer, rows, max_new_tokens, template, options)

    def tell(made: Made, number: int, completion: list[int], finished: bool) -> None:
        text, expected = str(tokenizer.decode(completion, skip_special_tokens=True)), rows[number].get("answer")
        made(number, rows[number], text, scorer(text, expected) if expected else None, finished)

    completions = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
        share=share,
        made=made and functools.partial(tell, made),
        stop=stop,
        backend=backend,
    )
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    scored = [(text, row["answer"]) for text, row in zip(texts, rows, strict=True) if row.get("answer")]
    right = [scorer(text, expected) for text, expected in scored]
    sampling = Sampling(max_new_tokens, eos_token_ids(model, tokenizer), stop=tuple(stop))
    ended = [finished(each, sampling, tokenizer) for each in completions]
    return Answers(prompts, completions, texts, right, ended)


@torch.no_grad()
def forgetting(
    model: PreTrainedModel,
    start: Teacher,
    answers: Answers,
    *,
    batch_size: int,
    progress: str | None = None,
    share: bool = False,
    autocast: torch.dtype | None = None,
) -> float:
    """The mean over tokens of KL(start || model), in nats, on the `answers` of the starting model.

    `start` lends that model, which may be the same one with its adapter off. With `share`, processes share the work;
    `autocast` is the type of mixed-precision products.
    """
    samples = [
        Sample(prompt, completion, prompt)
        for prompt, completion in zip(answers.prompts, answers.completions, strict=True)
    ]

    def summed_divergence(numbers: list[int]) -> float:
        batch = {k: v.to(model.device) for k, v in lay_out([samples[n] for n in numbers], skip_tokens=0).items()}
        with start.scoring() as base:
            seen = teacher_view(base, batch, autocast)
        out = divergence(model, seen, batch, autocast=autocast, divergence="forward_kl", reduction="sum")
        return float(out.loss)

    with evaluating(model):
        total = sum(each_batch(_batches(samples, batch_size, share), summed_divergence, share=share, progress=progress))
    return total / max(sum(map(len, answers.completions)), 1)


class Exam:
    """The held-out and general prompts of a run, read and checked once, put to a model as often as asked.

    Where there are several processes all must ask: each does its share, and all have the answers.
    `held_out` and `general` are what `load_rows` takes, or None; `settings` say how they are answered and scored.
    A bar shows the progress of what is given a name for it, unless `silent`.
    """

    def __init__(
        self,
        held_out: Any,
        general: Any,
        settings: EvalSettings,
        *,
        batch_size: int,
        seed: int,
        silent: bool = False,
    ) -> None:
        self.settings, self.batch_size, self.seed, self.silent = settings, batch_size, seed, silent
        self.eval_rows, self.general_rows = exam_rows(held_out, general, settings)
        self.has_demonstrations = have_demonstrations(self.eval_rows)
        self.starting_answers: Answers | None = None
        self.longest, self.first = 0, list[int]()  # tokens of a prompt and its answer, and a prompt, once checked

    def options(self, template: list[Message] | None = None) -> Options:
        """What the chat template is told: for the teacher under a template, else for the student."""
        return self.settings.chat_template_kwargs if template is None else self.settings.teacher_options

    def check(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        templates: Sequence[list[Message]] = (),
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """Find what cannot be asked, before anything runs.

        That is an option that the chat template does not read, and a prompt that is too long for the model, or for the
        teacher under a template. `teacher` is another model that teaches; without one it is the model itself.
        """
        check_options(
            tokenizer,
            chat_template_kwargs=self.settings.chat_template_kwargs,
            teacher_chat_template_kwargs=self.settings.teacher_chat_template_kwargs,
        )
        general, held_out = self.settings.general_completion_length, self.settings.eval_completion_length
        asked = [(prompts_for(model, tokenizer, self.general_rows, general, options=self.options()), general)]
        for template in (None, *templates):
            reader = model if template is None else teacher or model
            options = self.options(template)
            asked.append((prompts_for(reader, tokenizer, self.eval_rows, held_out, template, options), held_out))
        self.longest = max((len(prompt) + tokens for prompts, tokens in asked for prompt in prompts), default=0)
        self.first = next((prompt for prompts, _ in asked for prompt in prompts), [])

    def held_out(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: str | None = None,
        template: list[Message] | None = None,
        made: Made | None = None,
        backend: str | Backend = "generate",
    ) -> Answers | None:
        """The model's answers to the held-out prompts, with a template those of the teacher; None without prompts."""
        if not self.eval_rows:
            return None
        return answer(
            model,
            tokenizer,
            self.eval_rows,
            max_new_tokens=self.settings.eval_completion_length,
            batch_size=self.batch_size,
            scorer=scorer_of(self.settings.scorer),
            template=template,
            options=self.options(template),
            temperature=self.settings.eval_temperature,
            samples=self.settings.eval_samples,
            seed=self.seed,
            progress=self._progress(progress),
            share=True,
            made=made,
            stop=self.settings.eval_stop or (),
            backend=backend,
        )

    def general(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: str | None = None,
        made: Made | None = None,
        backend: str | Backend = "generate",
    ) -> Answers | None:
        """The model's greedy answers to the general prompts; None without prompts."""
        if not self.general_rows:
            return None
        return answer(
            model,
            tokenizer,
            self.general_rows,
            max_new_tokens=self.settings.general_completion_length,
            batch_size=self.batch_size,
            scorer=scorer_of(self.settings.general_scorer, "general_scorer"),
            options=self.options(),
            progress=self._progress(progress),
            share=True,
            made=made,
            stop=self.settings.eval_stop or (),
            backend=backend,
        )

    def forgetting(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        start: Teacher,
        autocast: torch.dtype | None = None,
        *,
        shown: bool = False,
    ) -> float | None:
        """How far the model has moved from the starting one on the general prompts; None without prompts.

        The starting model, which `start` lends, answers them the first time that this is asked, unless its
        `starting_answers` are there. `shown`: with bars.
        """
        if self.starting_answers is None:
            with start.scoring() as base:
                name = "starting model, general prompts" if shown else None
                self.starting_answers = self.general(base, tokenizer, name)
        if self.starting_answers is None:
            return None
        return forgetting(
            model,
            start,
            self.starting_answers,
            batch_size=self.batch_size,
            progress=self._progress("divergence from the starting model" if shown else None),
            share=True,
            autocast=autocast,
        )

    def _progress(self, description: str | None) -> str | None:
        """The description of a progress bar, or None for no bar."""
        return None if self.silent else description


def _batches(items: Sequence[list[int]] | Sequence[Sample], size: int, share: bool) -> list[list[int]]:
    """The items' numbers in batches of similar length; where they are shared, some for every process."""
    if share:
        size = min(size, -(-len(items) // processes()) or 1)
    return batches_by_length([len(item) for item in items], size)
