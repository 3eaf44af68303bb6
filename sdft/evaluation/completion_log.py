"""completions.jsonl: the rollouts of a run, a line each, and what student and teacher make of every token.

A line has `step` (the one whose loss the rollout is part of, counted from 1), `prompt` (the student's),
`teacher_prompt` and `completion` as text with their special tokens, `completion_ids`, and for each of these ids its
text (`tokens`) and a number: `divergence`, `student_logprob` and `teacher_logprob`, in nats, to six decimals, at the
loss's temperature. `student_top` and `teacher_top` have the few tokens that the model holds likeliest there, as pairs
of text and log-probability. All but the texts are null for the tokens that `skip_tokens` leaves out of the loss. Where
there is feedback, `feedback` is what it had logged. `weight` is what the rollout counts, with feedback or where that is
not 1; at 0 it is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from sdft.batch import Sample
from sdft.checkpoints.files import failing_clearly
from sdft.evaluation.token_texts import TokenTexts
from sdft.likeliest import Likeliest
from sdft.loss import OfTokens
from sdft.run_files import COMPLETIONS_FILE


class CompletionsFile(TrainerCallback):
    """Appends the rollouts of every so many steps, at the step's end, before any checkpoint of that step is saved.

    A run that goes on from a checkpoint first takes away what is there of later steps, which it will repeat.
    """

    def __init__(
        self, folder: str | Path, every: int, tokenizer: PreTrainedTokenizerBase, skip_tokens: int = 0
    ) -> None:
        self.path = Path(folder) / COMPLETIONS_FILE
        self.every, self.tokenizer, self.skip_tokens = every, tokenizer, skip_tokens
        self.texts = TokenTexts(tokenizer)
        self.records: list[dict[str, Any]] = []

    def wants(self, step: int) -> bool:
        """Whether this step's rollouts are to be written."""
        return step % self.every == 0

    def add(self, samples: Sequence[Sample], tokens: OfTokens) -> None:
        """Keep the samples of a micro-batch for the end of the step, with what is known of its loss's tokens."""
        values = {each.name: iter(self._listed(getattr(tokens, each.name))) for each in fields(tokens)}
        for sample in samples:
            scored = range(max(0, len(sample.read().completion) - self.skip_tokens))
            skipped = len(sample.completion) - len(scored)
            feedback: dict[str, Any] = {} if sample.feedback is None else {"feedback": sample.feedback}
            if feedback or sample.weight != 1:
                feedback["weight"] = sample.weight
            self.records.append(
                {
                    "prompt": self._text(sample.prompt),
                    "teacher_prompt": self._text(sample.teacher_prompt or []),
                    "completion": self._text(sample.completion),
                    "completion_ids": sample.completion,
                    "tokens": self.texts.of(sample.completion),
                    **feedback,
                    **{name: [None] * skipped + [next(each) for _ in scored] for name, each in values.items()},
                }
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.records = []
        if state.is_world_process_zero and self.path.is_file():
            forget_after(self.path, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.wants(state.global_step):
            return
        records = gather_object(self.records)
        self.records = []
        if state.is_world_process_zero:
            lines = [json.dumps({"step": state.global_step, **record}, ensure_ascii=False) for record in records]
            folder = self.path.parent
            with failing_clearly(COMPLETIONS_FILE, str(folder)):
                folder.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)

    def _listed(self, value: Any) -> list[Any]:
        """What a line has of each token: a number, or pairs of text and log-probability."""
        if not isinstance(value, Likeliest):
            return [round(number, 6) for number in value.tolist()]
        return [
            [[self.texts.alone(token), round(number, 4)] for token, number in zip(*each, strict=True)]
            for each in zip(value.tokens.tolist(), value.logprobs.tolist(), strict=True)
        ]

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def forget_after(path: Path, step: int) -> None:
    """Cut the file before its first line of a later step, or its first that is not whole: a killed run's last one."""
    with path.open("rb+") as file:
        end = 0
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        file.truncate(end)
