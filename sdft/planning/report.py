"""What a step takes on a GPU, in which phase and for what, and the longest rollout that fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sdft.planning.devices import GIB, RESERVED
from sdft.planning.step import EIGHT_BITS, Lengths, Measured
from sdft.settings.config import AUTO, VLLM, LoraArguments, SDFTConfig

#: Rollouts are looked for up to this length, and to a multiple of this many tokens.
LONGEST, STEP = 2**20, 128
#: Runs that the search for the longest rollout may take.
RUNS = 6


@dataclass(frozen=True)
class Setting:
    """A change of settings, and what a step then takes."""

    name: str
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a step takes, beside what there is."""

    model: str
    parameters: int
    gpu: str
    memory: int
    lengths: Lengths
    measured: Measured
    longest_rollout: int
    model_limit: int  # the longest rollout that the model has positions for
    settings: list[Setting]
    full_logits: int
    notes: list[str]  # what of the settings is not planned

    @property
    def fits(self) -> bool:
        return self.measured.peak.total + RESERVED <= self.memory


def longest_rollout(run: Callable[[int], Measured], first: int, budget: int, most: int = LONGEST) -> int:
    """The longest rollout of which a step fits in `budget` bytes, 0 if none does; `run` says what a length takes.

    The memory of each phase grows with the length along a line, or nearly: so the lines through two lengths, one that
    fits and one that does not, give the next. It is run too, and the answer is always a length that was run.
    """
    taken: dict[int, Measured] = {}
    most = max(STEP, most // STEP * STEP)
    length = max(STEP, min(most, first // STEP * STEP))
    for _ in range(RUNS):
        taken[length] = run(length)
        fitting = [each for each, measured in taken.items() if measured.peak.total <= budget]
        failing = [each for each in taken if each not in fitting]
        fits, fails = max(fitting, default=0), min(failing, default=most + STEP)
        if fails - fits <= STEP or (fits and taken[fits].peak.total > 0.995 * budget):
            return fits
        if not failing:
            length = min(most, 16 * fits)
        elif not fitting:
            length = max(STEP, fails // 8 // STEP * STEP)
        else:
            length = _where(taken[fits], taken[fails], fits, fails, budget) // STEP * STEP
            length = min(max(length, fits + STEP), fails - STEP)
    return fits


def _where(fits: Measured, fails: Measured, shorter: int, longer: int, budget: int) -> int:
    """The length at which the first phase reaches the budget, along the line of each."""
    reached = longer
    for name, phase in fails.phases.items():
        before = fits.phases[name].total
        if phase.total > budget:
            reached = min(reached, shorter + (longer - shorter) * (budget - before) // (phase.total - before))
    return reached


def rollout_limit(positions: int | None, prompt: int, demonstration: int | None) -> int:
    """The longest rollout that has a position for each token after the teacher's prompt: the prompt and a
    demonstration, which is as long as the rollout if it is None."""
    room = (positions or LONGEST) - prompt
    return max(1, room // 2 if demonstration is None else room - demonstration)


def full_logits_bytes(tokens: int, vocab: int) -> int:
    """What a loss on whole logits takes more: float32 logits of student and teacher, 4 bytes each, three times.

    The three are the logits, their log-softmax and its gradient.
    """
    return 2 * tokens * vocab * 4 * 3


def alternatives(lora: LoraArguments, config: SDFTConfig, dtype: str) -> list[tuple[str, LoraArguments, Any, str]]:
    """Settings that would save memory: what each is called, and the settings with it."""
    changes: list[tuple[str, LoraArguments, Any, str]] = []
    if not config.activation_checkpointing:
        changed = _with(config, activation_checkpointing=True)
        changes.append(("activation_checkpointing true", lora, changed, dtype))
    if not lora.lora_rank:
        changes.append(("lora_rank 64", replace(lora, lora_rank=64), config, dtype))
    if str(getattr(config.optim, "value", config.optim)) not in EIGHT_BITS:
        changes.append(("optim adamw_8bit", lora, _with(config, optim="adamw_8bit"), dtype))
    if config.method == "sdft" and config.teacher != "live":
        changes.append(("teacher live", lora, _with(config, teacher="live"), dtype))
    if dtype == "float32":
        changes.append(("dtype bfloat16", lora, config, "bfloat16"))
    return changes


def notes(config: SDFTConfig, lengths: Lengths) -> list[str]:
    """What of the settings is not planned."""
    said = []
    tokens = lengths.prompt + (lengths.rollout if config.method == "sdft" else lengths.demonstration)
    if config.max_forward_tokens is not None and tokens > config.max_forward_tokens:
        said.append(
            f"a sample has {tokens} tokens and max_forward_tokens is {config.max_forward_tokens}: it is planned whole, "
            "and training takes less, in tiles"
        )
    if config.use_liger_kernel:
        said.append("use_liger_kernel is set, and the step is planned without it: it takes less with it")
    if config.rollout_backend != "generate":
        said.append(f"rollout_backend is {config.rollout_backend!r}, and rollouts are planned as 'generate' makes them")
    if config.rollout_backend == VLLM:
        said.append(f"vLLM's engine is not in these numbers: {config.vllm_memory_share:g} of the GPU during rollouts")
    if config.rollout_batch_size == AUTO:
        said.append("rollout_batch_size is 'auto', and is planned as 1: training writes as many at once as fit")
    if config.teacher_cache_gib:
        said.append(f"teacher_cache_gib is not in these numbers: up to {config.teacher_cache_gib:g} more")
    return said


def _with(config: SDFTConfig, **values: Any) -> Any:
    """The settings with others, which the Trainer's have no simple way to."""
    changed = copy.copy(config)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def lines(plan: Plan) -> list[str]:
    """The plan as the command prints it."""
    peak = plan.measured.peak
    said = [
        f"{plan.model}: {plan.parameters / 1e9:.2f}e9 parameters, a prompt of {plan.lengths.prompt} tokens, a rollout "
        f"of {plan.lengths.rollout}, a demonstration of {plan.lengths.demonstration}",
        f"planned without a GPU, and not measured on one; GiB; {_gib(RESERVED)} are set aside for the CUDA context",
        *plan.notes,
        "",
        f"at the peak, in the phase {peak.phase!r}:",
        *(f"  {name:16} {_gib(size):>8}" for name, size in _largest(peak.parts) if size >= 0.005 * GIB),
        f"  {'together':16} {_gib(peak.total):>8}",
        "",
        "the peak of each phase:",
        *(f"  {name:16} {_gib(each.total):>8}" for name, each in plan.measured.phases.items()),
        "",
        f"{plan.gpu} has {_gib(plan.memory)}: the step {'fits' if plan.fits else 'does not fit'}, "
        f"with {_gib(abs(plan.memory - RESERVED - peak.total))} {'to spare' if plan.fits else 'too much'}",
        _longest(plan),
    ]
    if plan.settings:
        said += ["", "with another setting the peak would be:"]
        said += [
            f"  {setting.name:29} {_gib(setting.peak):>8}   {_gib(abs(peak.total - setting.peak))} "
            f"{'less' if setting.peak <= peak.total else 'more'}"
            for setting in plan.settings
        ]
    if plan.full_logits:
        said += [
            "",
            f"computed: whole logits of student and teacher would add {_gib(plan.full_logits)}, in float32 and three "
            "times: logits, their log-softmax and its gradient",
        ]
    return said


def _longest(plan: Plan) -> str:
    if not plan.longest_rollout:
        return f"no rollout fits, not even one of {STEP} tokens"
    said = f"the longest rollout that fits: {plan.longest_rollout} tokens"
    if plan.longest_rollout == plan.model_limit // STEP * STEP:
        return f"{said}, which is as far as the model's positions go; there is memory for more"
    return f"{said}, looked for in steps of {STEP}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in bytes and tokens."""
    return {
        "measured_on_a_gpu": False,
        "model": plan.model,
        "parameters": plan.parameters,
        "gpu": plan.gpu,
        "gpu_bytes": plan.memory,
        "reserved_bytes": RESERVED,
        **{f"{name}_tokens": value for name, value in dataclasses.asdict(plan.lengths).items()},
        "peak": dataclasses.asdict(plan.measured.peak),
        "phases": {name: dataclasses.asdict(peak) for name, peak in plan.measured.phases.items()},
        "fits": plan.fits,
        "longest_rollout_tokens": plan.longest_rollout,
        "model_limit_tokens": plan.model_limit,
        "settings": {setting.name: setting.peak for setting in plan.settings},
        "computed_full_logits_bytes": plan.full_logits,
        "notes": plan.notes,
    }


def _largest(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
