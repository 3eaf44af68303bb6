"""What was set and does nothing, which is said: the setting counts only beside another, which has another value."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import not_
from typing import Any

from sdft.errors import shown
from sdft.settings.teachers import BASE

#: Settings, and what the values of others are where they do nothing.
Rules = Sequence[tuple[tuple[str, ...], Mapping[str, Callable[[Any], bool]]]]


def _is(value: Any) -> Callable[[Any], bool]:
    return lambda other: bool(other == value)


def _is_not(value: Any) -> Callable[[Any], bool]:
    return lambda other: bool(other != value)


_OF_EVAL_FILE = ("scorer", "eval_temperature", "eval_samples", "eval_completion_length")
_OF_GENERAL_FILE = ("general_scorer", "general_completion_length")
#: What `sft` knows nothing of: the teacher, the rollouts and their loss.
_OF_SDFT = (
    *("demonstration_weight", "importance_clip"),
    *("teacher", "teacher_model", "teacher_dtype", "teacher_bits", "ema_rate", "ema_interval"),
    *("rollout_temperature", "rollout_top_p", "rollout_top_k", "rollout_min_p", "rollout_stop", "rollout_from"),
    *("rollouts_per_prompt", "rollout_batch_size", "rollout_backend", "rollout_correction", "rollout_draft"),
    *("vllm_memory_share", "rollout_server", "rollout_lag", "rollout_compile", "log_completions"),
    *("feedback", "feedback_args"),
    *("token_weighting", "divergence_clip", "mask_truncated_completions", "stop_on_collapse"),
)

_OF_VLLM: Rules = (
    (("vllm_memory_share", "rollout_server"), {"rollout_backend": _is_not("vllm")}),
    (("vllm_memory_share",), {"rollout_server": bool}),
)

#: `corrects` is whether the rollouts' probabilities correct the loss, which the trainer knows.
OF_TRAINING: Rules = (
    (_OF_SDFT, {"method": _is("sft")}),
    (("divergence", "beta", "loss_temperature"), {"method": _is("sft"), "base_kl_weight": not_}),
    (("base_kl_weight",), {"method": _is("sdft")}),
    (("beta",), {"divergence": lambda divergence: divergence in ("reverse_kl", "forward_kl")}),
    (("ema_rate", "ema_interval"), {"teacher": _is_not("ema")}),
    (("teacher_dtype", "teacher_bits"), {"teacher_model": not_}),
    (("feedback_args",), {"feedback": not_}),
    *_OF_VLLM,
    (("importance_clip",), {"num_iterations": _is(1), "corrects": not_}),
    (("lora_alpha", "lora_target_modules"), {"lora_rank": _is(0)}),
    (("freeze_embeddings",), {"lora_rank": bool}),
    (_OF_EVAL_FILE, {"eval_file": not_}),
    (_OF_GENERAL_FILE, {"general_file": not_}),
    (("eval_stop",), {"eval_file": not_, "general_file": not_}),
    (("eval_delay", "load_best_model_at_end"), {"eval_strategy": _is("no")}),
    (("eval_steps",), {"eval_strategy": _is_not("steps")}),
    (("save_steps",), {"save_strategy": _is_not("steps")}),
    (("logging_steps",), {"logging_strategy": _is_not("steps")}),
)
OF_EVAL: Rules = (
    *_OF_VLLM,
    (_OF_EVAL_FILE, {"eval_file": not_}),
    (_OF_GENERAL_FILE, {"general_file": not_}),
    (("eval_stop",), {"eval_file": not_, "general_file": not_}),
    (("base_model",), {"general_file": not_}),
    (
        ("teacher_template", "teacher_chat_template_kwargs", "teacher_model", "teacher_dtype", "teacher_bits"),
        {"teacher": not_},
    ),
    (("teacher_dtype", "teacher_bits"), {"teacher_model": not_}),
    (("seed",), {"eval_temperature": not_}),
)
OF_GENERATE: Rules = (*_OF_VLLM, (("seed",), {"temperature": not_}))
#: Without a tokenizer nothing is counted, and no chat template is there.
OF_DATA: Rules = (
    (
        ("demonstration_weight", "teacher_template", "teacher_chat_template_kwargs", "teacher_model", "feedback"),
        {"method": _is("sft")},
    ),
    (("max_completion_length",), {"method": _is("sft")}),
    (
        ("overlong", "max_completion_length", "chat_template_kwargs", "teacher_chat_template_kwargs"),
        {"model": not_},
    ),
)


def idle(rules: Rules, values: Mapping[str, Any]) -> set[str]:
    """The names of settings that do nothing beside these values; a rule on anything else is left out."""
    return {
        name
        for names, beside in rules
        if all(other in values and nothing(values[other]) for other, nothing in beside.items())
        for name in names
    }


_WORDS = {"corrects": "rollouts take no correction"}
#: What settings that are not set are chosen to be: no more than a default is it said of them that they do nothing.
_CHOSEN = {"teacher": BASE}


def without_effect(rules: Rules, *settings: Any, only: Collection[str] | None = None, **known: Any) -> list[str]:
    """A sentence for each reason why settings do nothing that are not as they come.

    `settings` are dataclasses, and `known` what else is known beside them; a rule on anything else is left out. `only`
    are the names to look at.
    """
    values, defaults = dict(known), dict(known)
    for each in settings:
        for field in dataclasses.fields(each):
            values[field.name] = getattr(each, field.name)
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            defaults[field.name] = _CHOSEN.get(field.name) if default is None else default
    found: list[str] = []
    told: set[str] = set()
    for names, beside in rules:
        if not idle([(names, beside)], values):
            continue
        given = [name for name in names if name in values and values[name] != defaults[name] and name not in told]
        given = [name for name in given if only is None or name in only]
        if given:
            told.update(given)
            reason = " and ".join(_WORDS.get(name) or _said(name, values[name]) for name in beside)
            found.append(f"{_subject(given, values)}: {reason}")
    return found


def _subject(names: list[str], values: Mapping[str, Any]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last} do nothing" if others else f"{_said(last, values[last])} and does nothing"


def _said(name: str, value: Any) -> str:
    if value is None or value == "":
        return f"{name} is not set"
    return f"{name} is {shown(value.value if isinstance(value, enum.Enum) else value)}"
