"""Hidden states as training sees them: SmolLM2's own, on its own answers, with and without the demonstration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sdft.batch import Sample, lay_out
from sdft.data import encode_rows, load_rows
from sdft.head import find_head, hidden_states
from sdft.models.load import eos_token_ids, limits, load_model
from sdft.rollouts.generate import generate, seeded
from sdft.templates import parse_template

TRAIN_FILE = Path(__file__).parent.parent / "examples" / "tool_calls_train.jsonl"


@torch.no_grad()
def smollm2_states(prompts: int = 16, new_tokens: int = 18) -> tuple[Tensor, Tensor, Tensor]:
    """(student hidden, teacher hidden, head): (N, 576), (N, 576), (49152, 576) in float32.

    The student's rollouts on the demo's first prompts, sampled with a fixed seed, scored by the model itself and by
    the model that saw the demonstration as an earlier turn.
    """
    model, tokenizer = load_model("smollm2-135m-instruct")
    eos_ids = eos_token_ids(model, tokenizer)
    rows = encode_rows(
        load_rows(TRAIN_FILE)[:prompts],
        tokenizer,
        method="sdft",
        template=parse_template("turn"),
        eos_ids=eos_ids,
        max_completion_length=new_tokens,
        limits=limits(model),
    )
    with seeded(torch.device("cpu"), 0):
        answers = generate(
            model,
            [row["prompt_ids"] for row in rows],
            max_new_tokens=new_tokens,
            eos_ids=eos_ids,
            temperature=1.0,
        )
    samples = [
        Sample(row["prompt_ids"], answer, row["teacher_prompt_ids"]) for row, answer in zip(rows, answers, strict=True)
    ]
    batch = lay_out(samples, skip_tokens=0)
    student = hidden_states(model, batch["input_ids"], batch["positions"])
    teacher = hidden_states(model, batch["teacher_input_ids"], batch["teacher_positions"])
    return student, teacher, find_head(model).weight.detach()
