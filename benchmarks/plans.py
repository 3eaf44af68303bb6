"""The longest rollout that fits on a GPU, by model and way of training: planned, with no GPU and no weights.

`python -m benchmarks.plans` plans a step of one rollout for each model and way of training, and looks for the longest
that fits on each GPU, with our loss and with full logits. Models are given positions without end, so that memory is the
limit; where their own positions end is in the table too.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from transformers.utils import logging

from benchmarks import machine
from benchmarks import rows as files
from sdft.planning.devices import GIB, RESERVED, memory_of
from sdft.planning.presets import config_of
from sdft.planning.report import LONGEST, longest_rollout, rollout_limit
from sdft.planning.step import Lengths, Measured, Step
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments

MODELS = ("Qwen3-4B", "Qwen2.5-7B", "Qwen3-8B", "Llama-3.1-8B", "gemma-3-12b", "Qwen2.5-32B")
GPUS = ("16GiB", "24GiB", "48GiB", "80GiB", "141GB")
#: 4 bits with scales in 8, as QLoRA has them.
NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
#: Ways of training: the adapter's rank, and whether the model is in 4 bits.
WAYS = {"full": (0, False), "LoRA": (64, False), "QLoRA": (64, True)}
PROMPT = 256


@dataclass(frozen=True)
class Longest:
    """The longest rollout, as long as the demonstration that the teacher is shown; 0 where none fits."""

    model: str
    training: str
    gpu: str
    gib: float
    longest_rollout: int
    with_full_logits: int
    positions_allow: int


def step_of(model: str, training: str) -> Step:
    """A step in bfloat16 with activation checkpointing, and adamw_8bit where all weights train."""
    rank, in_4_bits = WAYS[training]
    config = config_of(model)
    if in_4_bits:
        config.quantization_config = NF4
    settings = SDFTConfig(
        output_dir="unused",
        report_to="none",
        per_device_train_batch_size=1,
        activation_checkpointing=True,
        optim="adamw_torch_fused" if rank else "adamw_8bit",
    )
    return Step(config, "bfloat16", LoraArguments(lora_rank=rank), settings)


def plan(model: str, training: str, gpus: list[str]) -> Iterator[Longest]:
    """The longest rollouts on GPUs, the smallest first."""
    step = step_of(model, training)
    runs: dict[int, Measured] = {}

    def run(tokens: int) -> Measured:
        if tokens not in runs:
            runs[tokens] = step.run(Lengths(PROMPT, tokens, tokens))
        return runs[tokens]

    def run_with_full_logits(tokens: int) -> Measured:
        return run(tokens).with_loss("full logits")

    positions = getattr(config_of(model).get_text_config(), "max_position_embeddings", None)
    for gpu in sorted(gpus, key=memory_of):
        budget = memory_of(gpu) - RESERVED
        known = {tokens: each.with_loss("full logits") for tokens, each in runs.items()}
        full_logits = longest_rollout(run_with_full_logits, 128, budget, LONGEST, known)
        yield Longest(
            model=model,
            training=training,
            gpu=gpu,
            gib=round(memory_of(gpu) / GIB, 1),
            longest_rollout=longest_rollout(run, 128, budget, LONGEST, runs),
            with_full_logits=full_logits,
            positions_allow=rollout_limit(positions, PROMPT, None),
        )


def table(found: list[Longest]) -> str:
    lines = [f"{'model':14} {'training':8} {'GPU':8} {'GiB':>6} {'rollout':>8} {'full logits':>11} {'positions':>9}"]
    lines += [
        f"{row.model:14} {row.training:8} {row.gpu:8} {row.gib:6.1f} {row.longest_rollout:8} {row.with_full_logits:11} "
        f"{row.positions_allow:9}"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--training", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), metavar="GPU", help="names or sizes, as of sdft plan")
    files.add_arguments(parser)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(machine.heading())
    found: list[Longest] = []
    for model in given.models:
        for training in given.training:
            found += plan(model, training, given.gpus)
            print(table(found[-len(given.gpus) :]), flush=True)
    files.write(found, given)


if __name__ == "__main__":
    main()
