"""One optimizer step of our trainer, and of TRL's, at real sizes: seconds and memory of each phase.

Weights are random and made on the device, in bfloat16; completions are random tokens, given and not sampled: what
sampling takes is the stage `rollouts`. Activation checkpointing is on, AdamW's state in bfloat16. A step is measured
after one that is not. Phases are told apart by waiting for the device between them, which a step by itself does not.
A LoRA adapter is in float32, as peft makes it beside bfloat16 weights for both trainers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

import sdft.loss
from benchmarks import plots
from benchmarks.gpu_report import peers
from benchmarks.gpu_report.cases import why_not
from benchmarks.gpu_report.models import SIZES, character_tokenizer, random_model
from benchmarks.gpu_report.stage import Row, Settings, markdown, skipped
from benchmarks.gpu_report.training_clock import GIBIBYTE, PHASES, Clock, Phases
from benchmarks.ledger import OURS
from sdft.memory.peaks import Peaks
from sdft.rollouts.interface import Completion
from sdft.settings.config import SDFTConfig
from sdft.trainer import SDFTTrainer

#: Tokens of completions in a step, in as many rows as it takes; one row at least.
STEP_TOKENS = 8192

#: What the teacher is shown, of the same length for both trainers: 64 tokens, 128 of demonstration and a few between.
TEMPLATE = "{prompt}\n\n{demonstration}"

#: Until a step was measured: products' operations a second of ours and TRL's, and the seconds that a case takes beside
#: its two steps, to make its models and to compile the first case's kernels.
ASSUMED_RATES = {OURS: 2e14, "TRL": 1e14}
ASSUMED_OVERHEAD = 12.0

#: Of one completion in our trainer, what 80 GB hold for sure: longer ones are tried, and skipped where they do not fit.
SURE_TOKENS = 16_384

#: transformers 5.17, which GPU machines may have, has the older name alone.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


@dataclass(frozen=True)
class Case:
    """A trainer, a model, what trains, and the tokens of each completion."""

    method: str
    model: str
    trains: str  # "all weights" or "LoRA"
    tokens: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.model}, {self.trains}, {self.rows} × {self.tokens} tokens"

    @property
    def operations(self) -> float:
        """Of a step's matrix products and attention, about, to tell from one step how long another will take."""
        size = SIZES[self.model]
        hidden, layers = size["hidden_size"], size["num_hidden_layers"]
        keys = hidden * size["num_key_value_heads"] // size["num_attention_heads"]
        layer = 2 * hidden * (hidden + keys) + 3 * hidden * size["intermediate_size"]
        weights = layers * layer + hidden * size["vocab_size"]
        # The teacher, the student, the student again for its gradients, which take as much for inputs as for weights.
        products = (4 if self.trains == "LoRA" else 5) * 2 * weights
        attention = 5.5 * 2 * layers * hidden * self.tokens  # a causal half; backward 2.5 times forward
        return self.rows * self.tokens * float(products + attention)


def case(method: str, model: str, trains: str, tokens: int, step_tokens: int = STEP_TOKENS) -> Case:
    return Case(method, model, trains, tokens, max(1, step_tokens // tokens))


def cases(settings: Settings) -> list[Case]:
    """What matters most comes first."""
    if settings.toy:
        toys = [(OURS, "all weights", 8), (OURS, "LoRA", 16), ("TRL", "all weights", 8), ("TRL", "LoRA", 16)]
        return [case(method, "toy", trains, tokens, 32) for method, trains, tokens in toys]
    small, large = ("Qwen2.5-1.5B", "all weights"), ("Qwen2.5-7B", "LoRA")
    return [
        case(OURS, *small, 1024),
        case("TRL", *small, 1024),
        case(OURS, *large, 1024),
        case(OURS, *small, 4096),
        case(OURS, *large, 4096),
        case(OURS, *large, 16_384),
        case("TRL", *small, 4096),
        case(OURS, *small, 16_384),
        case("TRL", *large, 4096),
        # As many as fit, or as there is time for.
        case(OURS, *large, 32_768),
        case(OURS, *small, 65_536),
        case(OURS, *large, 65_536),
    ]


def settings_of(case: Case, device: str, folder: str) -> dict[str, Any]:
    """What both trainers take from transformers: two steps over the same rows, and no files."""
    return {
        "output_dir": folder,
        "use_cpu": device == "cpu",
        CHECKPOINTING: True,
        "max_steps": 2,
        "per_device_train_batch_size": case.rows,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused" if device == "cuda" else "adamw_torch",
        "max_completion_length": case.tokens,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def prompt_rows(case: Case) -> list[dict[str, str]]:
    """Prompts of 64 tokens, and demonstrations of 128."""
    return [{"prompt": chr(97 + n % 26) * 64, "demonstration": chr(65 + n % 26) * 128} for n in range(2 * case.rows)]


def completions_of(case: Case) -> list[list[int]]:
    """Random tokens, none of which ends anything."""
    generator = torch.Generator().manual_seed(0)
    vocab = SIZES[case.model]["vocab_size"]
    return torch.randint(5, vocab, (case.rows, case.tokens), generator=generator).tolist()


def lora() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")


class OurTrainer(SDFTTrainer):
    """Ours, whose completions are given."""

    given: list[list[int]]

    def rollouts(self, asked: list[tuple[dict[str, Any], int]]) -> list[Completion]:
        self.step_log.add(completions=len(asked), completion_length=0, finished=len(asked))
        return [Completion(tokens) for tokens in self.given[: len(asked)]]


def ours(case: Case, device: str, folder: str) -> Any:
    trainer = OurTrainer(
        random_model(case.model, device),
        SDFTConfig(
            divergence="reverse_kl",
            teacher="base",
            teacher_template=TEMPLATE,
            **settings_of(case, device, folder),
        ),
        train_dataset=prompt_rows(case),
        processing_class=character_tokenizer(),
        peft_config=lora() if case.trains == "LoRA" else None,
    )
    trainer.given = completions_of(case)
    return trainer


def trl(case: Case, device: str, folder: str) -> Any:
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig as TheirConfig
    from trl.experimental.sdft import SDFTTrainer as TheirTrainer

    given = completions_of(case)

    class TRLTrainer(TheirTrainer):
        """TRL's, whose completions are given, and whose base teacher is a copy of a model that has no files."""

        def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            return prompt_ids, given[: len(prompt_ids)]

        def _setup_teacher_model(self) -> None:
            if case.trains == "LoRA":
                super()._setup_teacher_model()
            else:
                self.teacher_model = copy.deepcopy(cast(nn.Module, self.model)).requires_grad_(False).eval()

    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "privileged_context": row["demonstration"]}
        for row in prompt_rows(case)
    ]
    return TRLTrainer(
        random_model(case.model, device),
        TheirConfig(
            distillation_mode="full_logits",
            distillation_alpha=1.0,
            teacher_model_kind="base",
            teacher_prompt_template=TEMPLATE.replace("{demonstration}", "{privileged_context}"),
            num_generations=1,
            max_prompt_length=None,
            bf16=False,
            **settings_of(case, device, folder),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
        peft_config=lora() if case.trains == "LoRA" else None,
    )


TRAINERS = {OURS: ours, "TRL": trl}


def measure(case: Case, device: str) -> Row:
    """The second step of two."""
    phases = Phases(device)
    clock = Clock(phases)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        trainer = TRAINERS[case.method](case, device, folder)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        if case.method == OURS:
            for function, phase in (
                ("teacher_view", "teacher"),
                ("hidden_states", "forward"),
                ("fused_linear_divergence", "loss"),
            ):
                wrapped = phases.around(getattr(sdft.loss, function), phase)
                patches.enter_context(mock.patch.object(sdft.loss, function, wrapped))
        else:  # in one: its loss makes logits, teacher's and student's, by the models' own forward passes
            trainer.compute_loss = phases.around(trainer.compute_loss, "loss")
        trainer.accelerator.backward = phases.around(trainer.accelerator.backward, "backward")
        patches.enter_context(mock.patch.object(Peaks, "note"))  # which starts torch's peak anew in the clock's phases
        held = torch.cuda.memory_allocated() / GIBIBYTE if device == "cuda" else None
        loss = trainer.train().training_loss
    if len(clock.wholes) != 2:
        raise RuntimeError(f"{len(clock.wholes)} steps were taken, and 2 were to be")
    seconds, peak = clock.taken[-1]
    whole = clock.wholes[-1]
    row: Row = {"case": case.name, **dataclasses.asdict(case), "seconds": whole}
    row["tokens_per_second"] = case.rows * case.tokens / whole
    row["loss"] = loss  # the mean of both steps; TRL's differs from ours by what bfloat16 logits are rounded
    row["models_gib"] = held
    row["peak_gib"] = max(peak.values()) if peak else None
    for phase in PHASES:
        row[f"{phase}_seconds"] = seconds.get(phase)
        row[f"{phase}_gib"] = peak.get(phase)
    return row


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Expected:
    """How long a case will take, by what those before it took."""

    def __init__(self) -> None:
        self.rates: dict[tuple[str, str], float] = {}  # of a trainer and a model
        self.latest: dict[str, float] = {}  # of a trainer
        self.overhead = ASSUMED_OVERHEAD

    def seconds(self, case: Case) -> float:
        rate = self.rates.get((case.method, case.model)) or self.latest.get(case.method) or ASSUMED_RATES[case.method]
        return self.overhead + 1.2 * 2 * case.operations / rate

    def learn(self, case: Case, step: float, whole: float) -> None:
        """From a measured step and all that its case took; what the first step took beyond it is overhead."""
        rate = case.operations / step
        self.rates[case.method, case.model] = self.latest[case.method] = rate
        self.overhead = max(1.0, whole - 2 * step)


def run(settings: Settings) -> Iterator[Row]:
    expected = Expected()
    broke: dict[tuple[str, str, str], int] = {}  # with how many tokens the memory was too small
    absent: dict[str, str] | None = None  # peers, once the first one's turn has come
    for case in cases(settings):
        kind = (case.method, case.model, case.trains)
        needed = 0.0 if settings.toy else expected.seconds(case)
        if settings.left() <= needed:
            reason = "no time left"
            if not settings.toy:
                reason += f": {max(0.0, settings.left()):.0f} s, and it takes about {needed:.0f}"
            yield skipped(case.name, reason)
            continue
        if kind in broke and case.rows * case.tokens >= broke[kind]:
            yield skipped(case.name, f"memory was too small for {broke[kind]} tokens")
            continue
        if case.method != OURS:
            if absent is None:
                absent = peers.absent(peers.OF_TRAINING)
                yield from (skipped(peer, reason) for peer, reason in absent.items())
            if case.method in absent:
                continue
        started = time.monotonic()
        try:
            row = measure(case, settings.device)
            expected.learn(case, row["seconds"], time.monotonic() - started)
        except Exception as error:  # told in the report; the others go on
            row = {"case": case.name, **why_not(error, ours=case.method == OURS and case.tokens <= SURE_TOKENS)}
            if isinstance(error, torch.OutOfMemoryError) and case.rows == 1:
                broke[kind] = case.tokens
        release(settings.device)  # what broke is kept alive by its traceback until here
        yield row


def table(rows: list[Row]) -> str:
    columns = [
        ("step", "case", ""),
        ("s", "seconds", ".2f"),
        ("tokens/s", "tokens_per_second", ",.0f"),
        *((f"{phase} s", f"{phase}_seconds", ".2f") for phase in PHASES),
        ("peak GiB", "peak_gib", ".1f"),
        ("models GiB", "models_gib", ".1f"),
        *((f"{phase} GiB", f"{phase}_gib", ".1f") for phase in PHASES[:-1]),
    ]
    measured = [row for row in rows if "seconds" in row]
    lines = [
        "Seconds of an optimizer step without its rollouts, of the whole and of its phases: completions are random "
        "tokens that are given, and tokens/s are theirs. GiB: the most memory held in all and in each phase, weights "
        "and optimizer's state among it; models GiB: what the models alone take, before the first step. TRL's loss "
        "phase holds both models' forward passes. LoRA adapters are float32.",
        "",
        markdown(measured, columns),
    ]
    lines += [
        f"\n{row['case']}: {row.get('error') or row.get('skipped')}"
        for row in rows
        if "error" in row or "skipped" in row
    ]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """A bar of each phase's seconds for each step."""
    measured = [row for row in rows if "seconds" in row]
    names = [row["case"].replace(", ", "\n", 1) for row in measured]
    with plots.panels(path, 1, 1, (max(6.0, 2.2 * len(measured)), 5)) as axes:
        heights = {
            phase: {name: row.get(f"{phase}_seconds") or 0.0 for name, row in zip(names, measured, strict=True)}
            for phase in PHASES
        }
        plots.bars(axes[0][0], names, heights)
        axes[0][0].set_ylabel("seconds, logarithmic")
        axes[0][0].set_yscale("log")
        axes[0][0].tick_params("x", labelsize=6)
