"""`sdft generate`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from sdft.commands.shared import device_here, quiet
from sdft.data import WHERE, Row, check_options
from sdft.errors import counted
from sdft.evaluation.answers_file import AnswersFile
from sdft.evaluation.exam import complete, prompts_for
from sdft.evaluation.report import (
    cut_answers,
)
from sdft.models.load import load_model
from sdft.rollouts.writer import writer_for
from sdft.settings.commands import GenerateCommand
from sdft.settings.inputs import ModelArguments


def generate(of_model: ModelArguments, rows: Sequence[Row], of_command: GenerateCommand) -> None:
    """`sdft generate`: a model's answer to one prompt, printed, or to each prompt of a file, written to another."""
    quiet()
    model, tokenizer = load_model(of_model.model, of_model.dtype, device_here(), **of_model.trust)
    check_options(tokenizer, chat_template_kwargs=of_command.chat_template_kwargs)
    prompts = prompts_for(
        model, tokenizer, rows, of_command.max_completion_length, options=of_command.chat_template_kwargs
    )
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

        longest = max(map(len, prompts)) + of_command.max_completion_length
        backend = stack.enter_context(writer_for(of_command, model, longest=longest, probe=prompts[0]))
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
            backend=backend,
        )
    cut = cut_answers("", ended, "max_completion_length", of_command.max_completion_length)
    if of_command.output_file is None:
        print(texts[0])  # once the bar has gone
        print(*cut, sep="\n", end="\n" if cut else "", file=sys.stderr)  # the answer stays alone on stdout
    else:
        print(*cut, f"{of_command.output_file} has the answers to {counted(len(rows), 'prompt')}", sep="\n")
