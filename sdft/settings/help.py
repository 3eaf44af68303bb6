"""What `--help` prints: what a command is for and the fields that matter most; `--help-all` has every field."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from sdft.settings.fields import Field

WIDTH = 100

MAIN = """\
usage: sdft COMMAND ...

Self-distillation fine-tuning: a language model learns from demonstrations by becoming its own teacher.

commands:
  train     train a model on demonstrations by a recipe
  eval      score a model on held-out prompts, and measure what it forgot
  generate  let a model answer a prompt, or a file of them
  data      what would be trained on: rows as student and teacher read them, lengths, what does not fit
  plan      the GPU memory that a recipe's training step takes, without a GPU
  report    a run as one HTML page, or several beside each other
  continual several skills one after the other, by several methods, and what is left of each after every stage
  env       what is installed here, on which devices, and what the loss will run on

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --learning_rate 1e-4 --output_dir runs/faster
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl
  sdft generate --model runs/demo --prompt "Ring Tomas for me."
  sdft train --help
  sdft --version
"""

TRAIN = """\
Train a model on demonstrations. Every field can stand in the recipe (field: value) or on the command line, which wins.

examples:
  sdft train examples/demo.yaml
  sdft train examples/demo.yaml --divergence reverse_kl --max_steps 100 --output_dir runs/reverse
  sdft train examples/demo.yaml --method sft --output_dir runs/sft
  sdft train examples/demo.yaml --resume_from_checkpoint last
  sdft train examples/demo.yaml --eval_strategy steps --eval_steps 10
  sdft train --model Qwen/Qwen2.5-0.5B-Instruct --train_file mine.jsonl --output_dir runs/mine
"""

EVAL = """\
Score a model: its answers to held-out prompts, and how far it has moved from its base model on general ones.
With --teacher, also the answers it gives when shown the demonstrations, in each form that they can be shown in: what
the teacher cannot do with a demonstration, the student cannot learn from it.

examples:
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl --eval_completion_length 18
  sdft eval examples/demo.yaml --model runs/demo
  sdft eval --model runs/demo --eval_file examples/tool_calls_heldout.jsonl --scorer json
  sdft eval --model runs/demo --eval_file mine.jsonl --scorer choice --eval_temperature 0.7 --eval_samples 8
  sdft eval examples/demo.yaml --model runs/demo --output_file answers.jsonl --summary_file scores.json
  sdft eval examples/demo.yaml --teacher
  sdft eval examples/demo.yaml --teacher --teacher_template turn
"""

GENERATE = """\
Let a model answer: one prompt, whose answer is printed, or a file of prompts, whose answers are written to another.

examples:
  sdft generate --model runs/demo --prompt "Ring Tomas for me."
  sdft generate --model smollm2-135m-instruct --prompt "Name three rivers." --temperature 0.7 --top_p 0.9
  sdft generate --model runs/demo --prompt_file examples/general_prompts.jsonl --output_file answers.jsonl
  sdft generate examples/demo.yaml --model runs/demo --prompt "Play some Mozart."
"""

DATA = """\
Show what would be trained on: the columns found, the first rows as the student and the teacher read them, how long
prompts and demonstrations are, and which rows do not fit and why. It takes a file, or a recipe of sdft train.

examples:
  sdft data mine.csv
  sdft data mine.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max_completion_length 512
  sdft data mine.jsonl --columns '{"prompt": "question", "demonstration": "response"}'
  sdft data openai/gsm8k/main:train --rows 1
  sdft data examples/demo.yaml
"""

PLAN = """\
Plan the GPU memory of one training step, by the recipe that sdft train takes: what there is at the peak, in which
phase, and the longest rollout that fits. The step's own code runs on tensors without values: no GPU is needed, no
weights and no data. The model is a folder with a config.json, a hub name that was downloaded before, or a usual one
whose shape ships.

examples:
  sdft plan examples/qwen2.5-7b-lora.yaml --gpu H100
  sdft plan examples/qwen2.5-7b-lora.yaml --gpu 24GiB --rollout_tokens 1024 --compare
  sdft plan --model Qwen/Qwen3-4B --dtype bfloat16 --activation_checkpointing --output_file plan.json
"""

REPORT = """\
Write a run as one HTML page that needs no network: what ran, what it measured, its curves, where the time goes, and
rollouts token by token. Several runs are laid over each other. A run that is still going can be reported; sdft train
writes the report of its run at the end.

examples:
  sdft report runs/demo
  sdft report runs/demo runs/reverse --output_file compared.html
"""

CONTINUAL = """\
Train several skills one after the other in one model, by several methods and with several seeds, and measure every
skill and the general prompts after each stage. Other fields are those of sdft train. A stage that is there is not run
again, so that the same command goes on where it was stopped.

examples:
  sdft continual examples/skills/continual.yaml
  sdft continual examples/skills/continual.yaml --seeds 0 1 2 --output_dir runs/three-seeds
"""

#: The settings of `sdft train` to know first, each with what choosing it means.
FIRST = {
    "model": "What learns, and who teaches it: the same model with the demonstration in its prompt. So it must be one "
    "that can copy an example it is shown: a hub name, a folder, a GGUF file or smollm2-135m-instruct.",
    "train_file": "What it learns from: JSONL, CSV or Parquet, each row a prompt and a demonstration of a good answer. "
    "sdft data shows what is read; try sdft eval --teacher on a few of them first.",
    "eval_file": "Prompts with answers that are not in train_file. They are asked before and after training, so that "
    "you see what was learned; without them there is only the loss.",
    "output_dir": "Where the model, checkpoints, metrics and curves go. A second run needs another one, or "
    "overwrite_output_dir.",
    "teacher_template": "How the teacher is shown the demonstration: paper, turn or first, or your own text. Small "
    "models often follow turn better; sdft eval --teacher measures each.",
    "divergence": "What brings the student to the teacher: reverse_kl keeps to answers that the "
    "student already gives; forward_kl also teaches it what it would not have said.",
    "learning_rate": "How far each step moves the weights. 2e-5 suits full fine-tuning, about ten times as much an "
    "adapter. If general prompts get worse, lower it.",
    "num_train_epochs": "How often the training data is gone through; max_steps counts steps instead. The student "
    "writes new answers each time, so several epochs are not repetition.",
    "max_completion_length": "The most tokens in an answer while training. Make it as long as your demonstrations: "
    "longer costs time and memory, shorter leaves the end unlearned.",
    "lora_rank": "0 trains all weights. 16 to 64 trains an adapter instead: a fraction of the memory, and the teacher "
    "needs no second copy of the model.",
}

#: The other fields of each command by subject, in the order of the run.
GROUPS = {
    "model": ("model", "dtype", "trust_remote_code", "allow_pickle", "base_model"),
    "data": (
        "train_file",
        "columns",
        "overlong",
        "rows_on_disk",
        "chat_template_kwargs",
        "teacher_chat_template_kwargs",
        "rows",
        "eval_file",
        "general_file",
        "prompt",
        "prompt_file",
        "output_file",
        "summary_file",
        "output_dir",
        "run_dir",
    ),
    "continual": ("skills", "methods", "seeds"),
    "plan": ("gpu", "prompt_tokens", "rollout_tokens", "demonstration_tokens", "compare", "plot_file"),
    "objective": (
        "method",
        "divergence",
        "beta",
        "loss_temperature",
        "skip_tokens",
        "loss_normalisation",
        "demonstration_weight",
        "base_kl_weight",
        "num_iterations",
        "importance_clip",
        "token_weighting",
        "divergence_clip",
        "mask_truncated_completions",
        "stop_on_collapse",
    ),
    "teacher": (
        "teacher",
        "teacher_model",
        "teacher_dtype",
        "teacher_bits",
        "teacher_template",
        "ema_rate",
        "ema_interval",
        "teacher_offload",
        "teacher_cache_gib",
        "feedback",
        "feedback_args",
    ),
    "rollouts": (
        "max_completion_length",
        "rollout_temperature",
        "rollout_top_p",
        "rollout_top_k",
        "rollout_min_p",
        "rollout_draft",
        "rollout_correction",
        "rollout_stop",
        "rollout_from",
        "rollouts_per_prompt",
        "rollout_batch_size",
        "rollout_backend",
        "rollout_server",
        "vllm_memory_share",
        "rollout_lag",
        "rollout_compile",
        "log_completions",
    ),
    "what trains": ("lora_rank", "lora_alpha", "lora_target_modules", "freeze_embeddings"),
    "optimisation": (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ),
    "memory and speed": (
        "max_forward_tokens",
        "max_chunk_bytes",
        "bf16",
        "activation_checkpointing",
        "activation_offload",
        "use_liger_kernel",
        "use_cpu",
    ),
    "evaluation": (
        "scorer",
        "general_scorer",
        "eval_temperature",
        "eval_samples",
        "eval_completion_length",
        "eval_stop",
        "general_completion_length",
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "metric_for_best_model",
    ),
    "saving and logging": (
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "logging_steps",
        "report_to",
    ),
}


def page(
    command: str, description: str, fields: Mapping[str, Field], *, everything: bool, takes: str = "[RECIPE.yaml]"
) -> str:
    """The help of a command, which `takes` something before its fields.

    `sdft train` has so many fields that all of them are only described on --help-all.
    """
    parts = [f"usage: {command} {takes} [--field value ...]", description.rstrip()]
    if command != "sdft train" or everything:
        parts += [_section(title, members) for title, members in _grouped(fields)]
    else:
        first = [f"  --{name} {_value(fields[name])}\n{_wrapped(text)}" for name, text in FIRST.items()]
        parts.append("\n".join(["the ten settings that matter most:", *first]))
        names = [
            textwrap.fill(
                f"{title}: {', '.join(field.name for field in rest)}",
                WIDTH,
                initial_indent="  ",
                subsequent_indent="    ",
            )
            for title, members in _grouped(fields)
            if (rest := [field for field in members if field.name not in FIRST and title in GROUPS])
        ]
        parts.append("\n".join(["the others by subject:", *names]))
        parts.append(
            f"{command} --help-all describes every field. Those of transformers.TrainingArguments are all accepted."
        )
    return "\n\n".join(parts) + "\n"


def _grouped(fields: Mapping[str, Field]) -> list[tuple[str, list[Field]]]:
    """The fields by subject; what has none comes last, the method's own before the Trainer's."""
    groups = [(title, [fields[name] for name in names if name in fields]) for title, names in GROUPS.items()]
    placed = {field.name for _, members in groups for field in members}
    others = [field for field in fields.values() if field.name not in placed]
    groups.append(("others", [field for field in others if not field.inherited]))
    groups.append(("others of transformers.TrainingArguments", [field for field in others if field.inherited]))
    return [(title, members) for title, members in groups if members]


def _section(title: str, members: Iterable[Field]) -> str:
    lines = [f"{title}:"]
    for field in members:
        lines.append(f"  --{field.name} {_value(field)}")
        default = "" if field.default in (None, "", []) else f" (default: {field.default})"
        choices = f" One of {', '.join(field.choices)}." if field.choices and field.name != "optim" else ""
        lines.append(_wrapped(" ".join(field.help.replace("%%", "%").split()) + choices + default))
    return "\n".join(lines)


def _value(field: Field) -> str:
    return "[true|false]" if field.is_switch else "VALUE ..." if field.is_list else "VALUE"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="      ", subsequent_indent="      ")
