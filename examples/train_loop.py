"""Self-distillation fine-tuning in a plain loop, with nothing of `sdft`: the student answers, the teacher, the same
model as it was, sees the demonstration and scores the answer, and the student moves towards it.

    python examples/train_loop.py Qwen/Qwen2.5-0.5B-Instruct rows.jsonl out

Each row has a `prompt` and a `demonstration`. The model needs a chat template, a backbone (`model.model`) and a plain
linear head (`model.lm_head`): no soft cap, scale or bias; `sdft` finds those out and takes them along.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sdft_kernels import fused_linear_divergence

STEPS, BATCH, LONGEST_ANSWER, LEARNING_RATE = 100, 8, 256, 1e-5


class Sample(NamedTuple):
    """An answer in token ids, after the student's prompt and after the teacher's."""

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]


def opening(chat: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """Token ids of a chat, ready for the model's answer."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompts_of(row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the student reads, and what the teacher does: the demonstration as an earlier turn of the same chat."""
    question = {"role": "user", "content": row["prompt"]}
    demonstration = {"role": "assistant", "content": row["demonstration"]}
    return opening([question], tokenizer), opening([question, demonstration, question], tokenizer)


@torch.no_grad()
def answer(student: Any, prompt: list[int]) -> list[int]:
    """The student's own answer, drawn from its own distribution, with its end-of-turn token.

    Of the settings that come with the model (a temperature, a penalty) only the tokens that end an answer are taken.
    """
    own = student.generation_config
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=LONGEST_ANSWER,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    ids = torch.tensor([prompt], device=student.device)
    student.generation_config = settings
    try:
        output = student.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        student.generation_config = own
    return output[0, len(prompt) :].tolist()


def hidden_states(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """The hidden states (N, H) that predict each completion token, sequences one after another.

    The state at a position predicts the next token: those from the prompt's last token to the last but one.
    """
    sequences = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(map(len, sequences))
    # Padding on the right needs no mask: in a causal model no token sees what comes after it.
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=model.device)
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.cat(
        [
            states[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    )


def loss_of(student: Any, teacher: Any, samples: list[Sample], divergence: str = "reverse_kl") -> Tensor:
    """The mean divergence of student and teacher over the tokens of all answers, in nats, and no logit is held."""
    completions = [sample.completion for sample in samples]
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, [sample.teacher_prompt for sample in samples], completions)
    hidden = hidden_states(student, [sample.prompt for sample in samples], completions)
    heads = student.lm_head.weight, teacher.lm_head.weight
    return fused_linear_divergence(hidden, heads[0], teacher_hidden, heads[1], divergence=divergence).loss


def main(name: str, file: str, output: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    student = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        batch = [rows[(step * BATCH + place) % len(rows)] for place in range(BATCH)]
        prompts = [prompts_of(row, tokenizer) for row in batch]
        student.eval()  # without dropout, in answers as in the loss
        samples = [Sample(prompt, shown, answer(student, prompt)) for prompt, shown in prompts]
        loss = loss_of(student, teacher, samples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        length = sum(len(sample.completion) for sample in samples) / len(samples)
        print(f"step {step + 1} of {STEPS}: loss {loss.item():.4f} nats a token, {length:.0f} tokens an answer")
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: {sys.argv[0]} MODEL ROWS.jsonl OUTPUT_FOLDER")
    main(*sys.argv[1:])
