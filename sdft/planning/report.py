"""What a step takes on a GPU, in which phase and for what, and the longest rollout that fits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sdft.planning.devices import GIB, RESERVED
from sdft.planning.step import EIGHT_BITS, Lengths, Measured
from sdft.settings.config import LoraArguments, SDFTConfig

#: Rollouts are looked for up to this length, and to a multiple of this many tokens.
LONGEST, STEP = 2**20, 128
#: Runs that the search for the longest rollout may take, after the first.
RUNS = 4


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
    settings: list[Setting]
    full_logits: int

    @property
    def fits(self) -> bool:
        return self.measured.peak.total + RESERVED <= self.memory


def longest_rollout(run: Callable[[int], int], first: int, budget: int, most: int = LONGEST) -> int:
    """The longest rollout of which a step fits in `budget` bytes, 0 if none does; `run` says what a length takes.

    A step's memory grows in proportion to the length within a phase, and the phase of the peak may change: so the line
    through two lengths gives the next, until one fits of which a little more would not.
    """
    most = most // STEP * STEP
    fits, fails = (0, 0), (0, 0)  # a length and what it takes
    length = max(STEP, min(most, first // STEP * STEP))
    points: list[tuple[int, int]] = []
    for _ in range(2 + RUNS):
        taken = run(length)
        points.append((length, taken))
        if taken <= budget:
            fits = max(fits, (length, taken))
        else:
            fails = (length, taken) if not fails[0] else min(fails, (length, taken))
        if fits[0] == most or fails[0] == STEP or (fails[0] and fails[0] - fits[0] <= STEP):
            break
        if len(points) == 1:
            guess = 2 * length if fits[0] else length // 2
        else:
            (short, less), (long, more) = sorted(points, key=lambda point: abs(budget - point[1]))[:2]
            slope = (more - less) / (long - short)
            near, at = points[-1]
            guess = near + int((budget - at) / slope) if slope > 0 else 2 * length
        length = max(STEP, min(most, guess // STEP * STEP))
        if fails[0]:
            length = min(length, fails[0] - STEP)
        if length <= fits[0]:
            if budget - fits[1] < budget // 100:
                break
            length = min(most, fits[0] + STEP)
    return fits[0]


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
        f"the longest rollout that fits: {plan.longest_rollout} tokens"
        if plan.longest_rollout
        else f"no rollout fits, not even one of {STEP} tokens",
    ]
    if plan.settings:
        said += ["", "with another setting the peak would be:"]
        said += [
            f"  {setting.name:29} {_gib(setting.peak):>8}   {_gib(peak.total - setting.peak, signed=True)} less"
            for setting in plan.settings
        ]
    if plan.full_logits:
        said += [
            "",
            f"computed: whole logits of student and teacher would add {_gib(plan.full_logits)}, in float32 and three "
            "times: logits, their log-softmax and its gradient",
        ]
    return said


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
        "settings": {setting.name: setting.peak for setting in plan.settings},
        "computed_full_logits_bytes": plan.full_logits,
    }


def _largest(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda item: -item[1])


def _gib(nbytes: int, *, signed: bool = False) -> str:
    return f"{nbytes / GIB:{'+' if signed else ''}.2f}"
