"""The loss step of TRL's trainers, with and without the fused loss: the same completions, forward and backward.

`python -m benchmarks.plugins` runs each trainer in a process of its own, on a model of one layer, so that the loss is
nearly all of the step. Peaks are above weights and gradients: of resident memory on a CPU, of torch's allocator on a
GPU. It prints a table with ratios to TRL's own and writes it as CSV. GOLD and IW-OPD share GKD's code here.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine
from benchmarks import rows as files
from benchmarks.gpu_report.models import character_tokenizer
from benchmarks.memory import MEBIBYTE, resident

#: Heads of SmolLM2, Qwen 2.5 and Gemma 3.
VOCABS = (49_152, 151_936, 262_144)
NAMES = ("sdft", "sdpo", "gkd", "distillation")
#: Losses on the same completions that differ by more, of themselves and of a nat, are not of the same step.
AGREEMENT = {"rel_tol": 1e-4, "abs_tol": 1e-6}
PROMPT = 16


@dataclass(frozen=True)
class Case:
    """A trainer's name, whether it is ours, and what its step is made of; completions have at most 512 tokens."""

    trainer: str
    fused: bool
    vocab: int
    tokens: int
    hidden: int
    rounds: int
    threads: int
    device: str


@dataclass(frozen=True)
class Row:
    """A row of the table: the least seconds of a step, MiB above weights and gradients, and ours over TRL's."""

    trainer: str
    vocab: int
    tokens: int
    trl_seconds: float
    fused_seconds: float
    seconds_ratio: float
    trl_mib: float
    fused_mib: float
    mib_ratio: float
    loss: float


def model(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    dtype = torch.float32 if case.device == "cpu" else torch.bfloat16
    return nn.Module.to(LlamaForCausalLM(config), case.device, dtype)


def trainer(case: Case, folder: str) -> Any:
    """TRL's trainer or ours. The teacher of SDFT and SDPO is the student, with other prompts."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from sdft_kernels.integrations import trl as ours

    own = {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "teacher_model_kind": "live"}
    trainers: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
        "sdft": (SDFTTrainer, ours.FusedSDFTTrainer, SDFTConfig, own),
        "sdpo": (SDPOTrainer, ours.FusedSDPOTrainer, SDPOConfig, own),
        "gkd": (GKDTrainer, ours.FusedGKDTrainer, GKDConfig, {"beta": 1.0}),
        "distillation": (DistillationTrainer, ours.FusedDistillationTrainer, DistillationConfig, {"beta": 1.0}),
    }
    theirs, fused, config, options = trainers[case.trainer]
    user = {"role": "user", "content": "a"}
    row = {"prompt": [user], "privileged_context": "b", "messages": [user, {"role": "assistant", "content": "b"}]}
    arguments: dict[str, Any] = {"train_dataset": Dataset.from_list([row] * 8)}
    if case.trainer == "sdpo":
        arguments["reward_funcs"] = lambda completions, **_: [0.0 for _ in completions]
    if case.trainer in ("gkd", "distillation"):
        arguments["teacher_model"] = model(case, seed=1)
    settings = config(
        output_dir=folder,
        report_to="none",
        use_cpu=case.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        max_steps=1,
        **options,
    )
    made = (fused if case.fused else theirs)(
        model(case, seed=0), args=settings, processing_class=character_tokenizer(), **arguments
    )
    made.current_gradient_accumulation_steps = 1
    return made


def inputs(case: Case, tokens: int) -> dict[str, torch.Tensor]:
    """A batch as the trainers make it, whose completions have that many tokens together."""
    generator = torch.Generator().manual_seed(2)
    rows, length = max(1, tokens // 512), min(512, tokens)
    prompt, hint, completion = (
        torch.randint(2, case.vocab, (rows, size), generator=generator).to(case.device)
        for size in (PROMPT, 2 * PROMPT, length)
    )
    whole, taught = torch.cat([prompt, completion], 1), torch.cat([hint, completion], 1)
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "teacher_input_ids": taught,
        "teacher_attention_mask": torch.ones_like(taught),
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "labels": torch.cat([torch.full_like(prompt, -100), completion], 1),
    }


def measure(case: Case) -> dict[str, float]:
    """The least seconds of a step, the peak of the first one that is not small, and its loss; in this process."""
    torch.set_num_threads(case.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(case, folder)
    batch = inputs(case, case.tokens)

    def step(batch: dict[str, torch.Tensor]) -> float:
        made.model.zero_grad(set_to_none=True)
        gc.collect()
        wait(case.device)
        began = time.perf_counter()
        loss = made.compute_loss(made.model, dict(batch))
        loss.backward()
        wait(case.device)
        found.append(loss.item())
        return time.perf_counter() - began

    found: list[float] = []
    made.model.train()
    step(inputs(case, 8))
    made.model.zero_grad(set_to_none=True)
    held = peak_above(case.device)
    seconds = [step(batch)]
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in made.model.parameters() if p.grad is not None)
    mebibytes = (held() - gradients) / MEBIBYTE
    seconds += [step(batch) for _ in range(case.rounds - 1)]
    return {"seconds": min(seconds), "mebibytes": mebibytes, "loss": found[-1]}


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_above(device: str) -> Callable[[], int]:
    """Begins to watch the memory; returns what says the most bytes that were held since, above what is held now."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    return lambda: resident("VmHWM") - before


def measure_apart(case: Case) -> dict[str, float]:
    """The same in a fresh process."""
    code = (
        "import json; from benchmarks.plugins import Case, measure; "
        f"print('\\n' + json.dumps(measure(Case(**{asdict(case)!r}))))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, vocab: int, tokens: int, given: argparse.Namespace) -> Row:
    theirs, ours = (
        measure_apart(Case(name, fused, vocab, tokens, given.hidden, given.rounds, given.threads, given.device))
        for fused in (False, True)
    )
    if given.device == "cpu" and not math.isclose(ours["loss"], theirs["loss"], **AGREEMENT):
        raise RuntimeError(f"{name} computes {ours['loss']} with the fused loss and {theirs['loss']} without")
    return Row(
        name,
        vocab,
        tokens,
        round(theirs["seconds"], 4),
        round(ours["seconds"], 4),
        round(ours["seconds"] / theirs["seconds"], 3),
        round(theirs["mebibytes"]),
        round(ours["mebibytes"]),
        round(ours["mebibytes"] / theirs["mebibytes"], 3),
        theirs["loss"],
    )


def table(rows: list[Row]) -> str:
    heading = ("trainer", "V", "tokens", "s, TRL", "ours", "ratio", "MiB, TRL", "ours", "ratio")
    lines = ["{:13}{:>8}{:>7}{:>9}{:>8}{:>7}{:>10}{:>7}{:>7}".format(*heading)]
    lines += [
        f"{r.trainer:13}{r.vocab:8}{r.tokens:7}{r.trl_seconds:9.3f}{r.fused_seconds:8.3f}{r.seconds_ratio:7.2f}"
        f"{r.trl_mib:10.0f}{r.fused_mib:7.0f}{r.mib_ratio:7.2f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plugins", description=__doc__)
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--vocabs", nargs="+", type=int, default=list(VOCABS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rounds", type=int, default=2, help="steps, of which the fastest counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    files.add_arguments(parser)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    cases = [(name, vocab, tokens) for tokens in given.tokens for vocab in given.vocabs for name in given.trainers]
    rows: list[Row] = []
    for name, vocab, tokens in tqdm(cases, unit="pair"):
        rows.append(compare(name, vocab, tokens, given))
        files.write(rows, given)  # a run that is cut short leaves what it has
    print(machine.heading(), table(rows), sep="\n")


if __name__ == "__main__":
    main()
