"""`sdft plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sdft.commands.shared import quiet
from sdft.errors import UsageError
from sdft.models.files import named_by
from sdft.planning.devices import RESERVED, memory_of
from sdft.planning.plot import draw
from sdft.planning.presets import config_of
from sdft.planning.report import (
    OtherLoss,
    Plan,
    Setting,
    alternatives,
    as_json,
    lines,
    longest_rollout,
    notes,
    rollout_limit,
)
from sdft.planning.step import Lengths, Measured, Step
from sdft.settings.commands import PlanCommand
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments, ModelArguments


def plan(of_model: ModelArguments, of_lora: LoraArguments, config: SDFTConfig, of_command: PlanCommand) -> None:
    """`sdft plan`: what a training step takes, and the longest rollout that fits."""
    quiet()
    memory = memory_of(of_command.gpu)
    model_config = config_of(of_model.model, trust_remote_code=of_model.trust_remote_code)
    rollout = of_command.rollout_tokens or config.max_completion_length
    if rollout <= config.skip_tokens:
        raise UsageError(f"rollout_tokens is {rollout}; it must be above skip_tokens, which is {config.skip_tokens}")
    shown = of_command.demonstration_tokens
    lengths = Lengths(of_command.prompt_tokens, rollout, rollout if shown is None else shown)
    teacher_config = None
    if config.method == "sdft" and config.teacher_model is not None:
        with named_by("teacher_model"):
            teacher_config = config_of(config.teacher_model, trust_remote_code=of_model.trust_remote_code)
    step = Step(model_config, of_model.dtype, of_lora, config, teacher_config=teacher_config)
    measured = step.run(lengths)
    runs: dict[int, Measured] = {rollout: measured}

    def run(tokens: int) -> Measured:
        if tokens not in runs:
            demonstration = tokens if shown is None else shown
            runs[tokens] = step.run(replace(lengths, rollout=tokens, demonstration=demonstration))
        return runs[tokens]

    text = model_config.get_text_config()
    limit = rollout_limit(getattr(text, "max_position_embeddings", None), lengths.prompt, shown)
    budget = memory - RESERVED
    longest = longest_rollout(run, rollout, budget, limit, runs)
    others = []
    for name in measured.other_losses:
        known = {tokens: each.with_loss(name) for tokens, each in runs.items()}

        def run_with(tokens: int, loss: str = name) -> Measured:
            return run(tokens).with_loss(loss)

        fits = longest_rollout(run_with, rollout, budget, limit, known)
        others.append(OtherLoss(name, measured.with_loss(name).peak, fits))
    settings = []
    if of_command.compare:
        for name, lora, changed, dtype in alternatives(of_lora, config, of_model.dtype):
            other = Step(model_config, dtype, lora, changed, teacher_config=teacher_config)
            settings.append(Setting(name, other.run(lengths).peak.total))
    found = Plan(
        model=of_model.model,
        parameters=step.parameters,
        gpu=of_command.gpu,
        memory=memory,
        lengths=lengths,
        measured=measured,
        longest_rollout=longest,
        model_limit=limit,
        settings=settings,
        other_losses=others,
        notes=notes(config),
    )
    print("\n".join(lines(found)))
    if of_command.plot_file:
        draw(found, of_command.plot_file)
        print(f"{of_command.plot_file} shows them")
    if of_command.output_file:
        Path(of_command.output_file).write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
        print(f"{of_command.output_file} has these numbers, in bytes")
