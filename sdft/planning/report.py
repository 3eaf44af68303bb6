"""What a step takes on a GPU, in which phase and for what, and the longest rollout that fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sdft.planning.devices import GIB, RESERVED
from sdft.planning.optimizers import is_in_8_bits, state_of
from sdft.planning.step import Lengths, Measured
from sdft.planning.tracker import Peak
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments
from sdft.settings.rollouts import AUTO, VLLM
from sdft.settings.teachers import MODEL

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
class OtherLoss:
    """The same step with another loss: its peak, and the longest rollout that fits with it."""

    name: str
    peak: Peak
    longest_rollout: int


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
    other_losses: list[OtherLoss]
    notes: list[str]  # what of the settings is not planned

    @property
    def fits(self) -> bool:
        return self.measured.peak.total + RESERVED <= self.memory


def longest_rollout(
    run: Callable[[int], Measured],
    first: int,
    budget: int,
    most: int = LONGEST,
    known: Mapping[int, Measured] | None = None,
) -> int:
    """The longest rollout of which a step fits in `budget` bytes, 0 if none does; `run` says what a length takes, and
    `known` lengths were run before.

    The memory of each phase grows with the length along a line, or nearly: so the lines through two lengths give the
    next. It is run too, and the answer is always a length that was run.
    """
    most = max(STEP, most // STEP * STEP)
    taken = {length: measured for length, measured in (known or {}).items() if length <= most}
    for _ in range(RUNS):
        if not taken:
            length: int | None = max(STEP, min(most, first // STEP * STEP))
        else:
            length = _next(taken, budget, most)
        if length is None:
            break
        taken[length] = run(length)
    return max((length for length, measured in taken.items() if measured.peak.total <= budget), default=0)


def _next(taken: dict[int, Measured], budget: int, most: int) -> int | None:
    """The next length to run, None where the longest is found."""
    fitting = sorted(length for length, measured in taken.items() if measured.peak.total <= budget)
    failing = sorted(taken.keys() - set(fitting))
    fits, fails = fitting[-1] if fitting else 0, failing[0] if failing else most + STEP
    if fails - fits <= STEP or (fits and taken[fits].peak.total > 0.995 * budget):
        return None
    pair = [fits, fails] if fitting and failing else fitting[-2:] or failing[:2]
    if len(pair) == 2:
        length = _where(taken[pair[0]], taken[pair[1]], pair[0], pair[1], budget)
    else:
        length = 4 * fits if fitting else fails // 4
    return min(max(length // STEP * STEP, fits + STEP), fails - STEP)


def _where(less: Measured, more: Measured, shorter: int, longer: int, budget: int) -> int:
    """The length at which the first phase reaches the budget, along the line of each; at most 16 times the longer."""
    reached = 16 * longer
    for name, phase in more.phases.items():
        before = less.phases[name].total
        if phase.total > before:
            reached = min(reached, shorter + (longer - shorter) * (budget - before) // (phase.total - before))
    return reached


def rollout_limit(positions: int | None, prompt: int, demonstration: int | None) -> int:
    """The longest rollout that has a position for each token after the teacher's prompt: the prompt and a
    demonstration, which is as long as the rollout if it is None."""
    room = (positions or LONGEST) - prompt
    return max(1, room // 2 if demonstration is None else room - demonstration)


def alternatives(lora: LoraArguments, config: SDFTConfig, dtype: str) -> list[tuple[str, LoraArguments, Any, str]]:
    """Settings that would save memory: what each is called, and the settings with it."""
    changes: list[tuple[str, LoraArguments, Any, str]] = []
    if not config.activation_checkpointing:
        changed = _with(config, activation_checkpointing=True)
        changes.append(("activation_checkpointing true", lora, changed, dtype))
    if not lora.lora_rank:
        # Unless another model teaches it, a model with an adapter has a teacher without weights.
        offload = config.teacher_offload and config.teacher == MODEL
        adapter = replace(lora, lora_rank=64), _with(config, teacher_offload=offload)
        changes.append(("lora_rank 64", *adapter, dtype))
    if not is_in_8_bits(config.optim):
        changes.append(("optim adamw_8bit", lora, _with(config, optim="adamw_8bit"), dtype))
    if config.method == "sdft" and config.teacher == MODEL and not (config.teacher_offload or config.teacher_bits):
        changes.append(("teacher_offload true", lora, _with(config, teacher_offload=True), dtype))
    elif config.method == "sdft" and config.teacher not in ("live", MODEL):
        changes.append(("teacher live", lora, _with(config, teacher="live"), dtype))
    if dtype == "float32":
        changes.append(("dtype bfloat16", lora, config, "bfloat16"))
    return changes


def notes(config: SDFTConfig) -> list[str]:
    """What of the settings is not planned."""
    said = []
    if (state := state_of(config.optim)) is not None and state.paged:
        said.append(
            "the optimizer's state is paged: it is counted in host memory, where it goes if the GPU has no room"
        )
    if config.use_liger_kernel:
        said.append("use_liger_kernel is set, and the step is planned without it: it takes less with it")
    if config.rollout_backend != "generate":
        said.append(f"rollout_backend is {config.rollout_backend!r}, and rollouts are planned as 'generate' makes them")
    if config.rollout_backend == VLLM and config.rollout_server is None:
        said.append(f"vLLM's engine is not in these numbers: {config.vllm_memory_share:g} of the GPU during rollouts")
    if config.rollout_compile:
        said.append("rollout_compile is set, and rollouts are planned without it: keys and values then take more")
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
        *([] if not plan.measured.host.total else ["", f"in host memory: {_parts(plan.measured.host)}"]),
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
    if plan.other_losses:
        said += ["", "the same step with another loss:"]
        said += [
            f"  {other.name:16} {_gib(other.peak.total):>8}   the longest rollout that fits: {other.longest_rollout}"
            for other in plan.other_losses
        ]
        said.append("  (full logits: planned, in float32; TRL's tiles: computed, as its DistillationTrainer has them)")
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
        "host": dataclasses.asdict(plan.measured.host),
        "phases": {name: dataclasses.asdict(peak) for name, peak in plan.measured.phases.items()},
        "fits": plan.fits,
        "longest_rollout_tokens": plan.longest_rollout,
        "model_limit_tokens": plan.model_limit,
        "settings": {setting.name: setting.peak for setting in plan.settings},
        "other_losses": {other.name: dataclasses.asdict(other) for other in plan.other_losses},
        "notes": plan.notes,
    }


def _largest(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _parts(peak: Peak) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in _largest(peak.parts))


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
