"""What the commands other than `sdft train` are told, beside the model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdft.errors import UsageError, shown
from sdft.evaluation.scorers import SCORERS
from sdft.run_files import BASE_FILE, READ_BY_REPORT, REPORT_FILE
from sdft.settings.chats import BothChatSettings, ChatSettings
from sdft.settings.checks import (
    check_at_least,
    check_between,
    check_not_below,
    check_switches,
    check_temperature,
    chosen,
    chosen_or_own,
    matching,
)
from sdft.settings.config import METHODS, OVERLONG, EvalSettings
from sdft.settings.inherited import LARGEST_SEED
from sdft.settings.inputs import SEED
from sdft.settings.rollouts import VLLM, BackendSettings
from sdft.settings.setting import setting
from sdft.settings.teachers import OtherTeacher
from sdft.templates import PROMPT, TEMPLATES, Message, default_template, parse_template

if TYPE_CHECKING:
    from sdft.settings.arguments import SDFTConfig as SDFTConfig


@dataclass
class EvalCommand(EvalSettings, OtherTeacher, BackendSettings):
    """What `sdft eval` alone is told."""

    base_model: str | None = setting(
        None,
        "The model to measure forgetting from, on the general prompts, which without it are only scored; with a "
        "recipe, the recipe's model.",
    )
    teacher: bool = setting(
        False,
        "Score the teacher too: the model with each held-out prompt's demonstration shown to it, in each of the "
        "built-in forms, or teacher_model, with the prompt alone as well.",
    )
    teacher_template: list[dict[str, str]] | str | None = field(
        default=None,
        metadata={
            "help": f"With teacher: only this built-in form ({', '.join(TEMPLATES)}; prompt with teacher_model), or "
            "your own text or messages to try beside them."
        },
    )
    output_file: str | None = setting(
        None,
        "Where to write every answer as it is made: JSONL, each with the row's prompt and answer, the completion, and "
        "whether that is finished (or was cut) and right.",
    )
    summary_file: str | None = setting(None, "Where to write the numbers: JSON.")
    per_device_eval_batch_size: int = setting(16, "How many prompts are answered at once.")
    seed: int = setting(42, "Seed of sampled answers.")

    def __post_init__(self) -> None:
        check_switches(self)
        EvalSettings.__post_init__(self)
        _check_backend(self)
        check_at_least("per_device_eval_batch_size", self.per_device_eval_batch_size, 1)
        check_at_least("seed", self.seed, 0, LARGEST_SEED)
        OtherTeacher.__post_init__(self)
        if self.teacher_template is not None:
            self.teacher_template = matching(self.teacher_template, (*TEMPLATES, PROMPT)) or self.teacher_template
            parse_template(self.teacher_template, other_model=self.teacher_model is not None)


@dataclass
class GenerateCommand(BackendSettings, ChatSettings):
    """What `sdft generate` alone is told."""

    prompt: str | None = setting(None, "The prompt to answer, as the user's message; the answer is printed.")
    prompt_file: str | None = setting(
        None, "A file of rows with prompt, a text or a list of chat messages, instead; needs output_file."
    )
    output_file: str | None = setting(
        None, "Where to write the answers: JSONL, each row of prompt_file with completion and finished added."
    )
    max_completion_length: int = setting(256, "The most tokens in an answer.")
    temperature: float | None = setting(None, "Sampling temperature; not set or 0 is greedy decoding.")
    top_p: float = setting(1.0, "Sample from the smallest set of tokens with this much probability.")
    top_k: int = setting(0, "Sample from this many of the likeliest tokens; 0 is all of them.")
    seed: int = setting(42, "Seed of sampled answers.")
    per_device_eval_batch_size: int = setting(16, "How many prompts are answered at once.")

    def __post_init__(self) -> None:
        ChatSettings.__post_init__(self)
        _check_backend(self)
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError(f"prompt is {self.prompt!r}; it must be a text to answer")
        if bool(self.prompt) == bool(self.prompt_file):
            what = "both set" if self.prompt else "not set"
            raise UsageError(f"prompt and prompt_file are {what}; exactly one must be, the text or the file to answer")
        if self.prompt_file and not self.output_file:
            raise UsageError("output_file is not set; with prompt_file it must be the JSONL file to write")
        check_temperature("temperature", self.temperature, or_greedy=True)
        check_between("top_p", self.top_p, 0, 1, closed_above=True)
        check_at_least("top_k", self.top_k, 0)
        check_at_least("seed", self.seed, 0, LARGEST_SEED)
        for name in ("max_completion_length", "per_device_eval_batch_size"):
            check_at_least(name, getattr(self, name), 1)
        if not self.temperature and (self.top_p, self.top_k) != (1.0, 0):
            raise UsageError(
                f"top_p is {self.top_p} and top_k {self.top_k}, and temperature is {self.temperature!r}; they are for "
                "sampling, which takes a temperature above 0"
            )


def _check_backend(command: BackendSettings) -> None:
    command.rollout_backend = chosen("rollout_backend", command.rollout_backend, ("generate", "continuous", VLLM))
    BackendSettings.__post_init__(command)


@dataclass
class DataCommand(BothChatSettings):
    """What `sdft data` alone is told."""

    model: str | None = setting(
        None, "The model whose tokenizer and chat template the rows are shown with; its weights are not loaded."
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the tokenizer.")
    method: str = setting(
        "sdft", "What is learned, as in sdft train; with sft there is no teacher, and demonstrations must fit."
    )
    demonstration_weight: float = setting(
        0.0, "The share of plain cross-entropy, as in sdft train; above 0 demonstrations must fit too."
    )
    teacher_template: list[dict[str, str]] | str | None = field(
        default=None, metadata={"help": "How the teacher is shown a demonstration, as in sdft train."}
    )
    teacher_model: str | None = setting(
        None, "That the teacher is another model, which sees the prompt as it is where teacher_template is not set."
    )
    feedback: str | None = setting(
        None, "That the teacher's prompts are made in training, so that none are shown and rows need no demonstration."
    )
    max_completion_length: int = setting(256, "The most tokens in an answer, for which a prompt must leave room.")
    overlong: str = setting("error", "What becomes of a row that is too long for the model, as in sdft train.")
    seed: int = setting(SEED, "What a part of a file's rows is drawn by, as in sdft train.")
    rows: int = setting(3, "How many rows are shown.")

    def __post_init__(self) -> None:
        BothChatSettings.__post_init__(self)
        check_switches(self)
        self.method = chosen("method", self.method, METHODS)
        check_not_below("demonstration_weight", self.demonstration_weight, 0, 1)
        check_at_least("max_completion_length", self.max_completion_length, 1)
        check_at_least("seed", self.seed, 0, LARGEST_SEED)
        self.overlong = chosen("overlong", self.overlong, OVERLONG)
        check_at_least("rows", self.rows, 0)
        if self.teacher_template is None:
            self.teacher_template = default_template(other_model=self.teacher_model is not None)
        self.teacher_template = matching(self.teacher_template, (*TEMPLATES, PROMPT)) or self.teacher_template
        parse_template(self.teacher_template, other_model=self.teacher_model is not None)

    @property
    def template(self) -> list[Message]:
        """The messages by which the teacher is shown a row."""
        return parse_template(self.teacher_template, other_model=self.teacher_model is not None)

    @property
    def shows_teacher(self) -> bool:
        """Whether the teacher's prompts are known before training."""
        return self.method == "sdft" and self.feedback is None


@dataclass
class ReportCommand:
    """What `sdft report` is told."""

    run_dir: list[str] | None = field(
        default=None, metadata={"help": "The folder of a run, or several to compare; output_dir of sdft train."}
    )
    output_file: str | None = setting(
        None,
        "Where to write the page: HTML. When not set, report.html in the run's folder; of several runs, in this one.",
    )

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise UsageError("run_dir is not set; it must be the folder of a run, as in sdft report runs/demo")


@dataclass
class PlanCommand:
    """What `sdft plan` alone is told."""

    gpu: str = setting("80GiB", "The GPU: a size such as 80GiB, or H100, H200, A100, L40S, RTX4090, RTX3090 or T4.")
    prompt_tokens: int = setting(256, "The tokens of a prompt.")
    rollout_tokens: int | None = setting(None, "The tokens of a rollout; max_completion_length when not set.")
    demonstration_tokens: int | None = setting(
        None,
        "The tokens that the teacher is shown beside the prompt; when not set, as many as a rollout has, in the search "
        "for the longest rollout too.",
    )
    compare: bool = setting(False, "Plan the step with a few other settings too, each of which could save memory.")
    output_file: str | None = setting(None, "Where to write the numbers: JSON.")
    plot_file: str | None = setting(
        None, "Where to draw the parts of the peak, beside those with other losses: PNG, which takes matplotlib."
    )

    def __post_init__(self) -> None:
        check_switches(self)
        check_at_least("prompt_tokens", self.prompt_tokens, 1)
        if self.rollout_tokens is not None:
            check_at_least("rollout_tokens", self.rollout_tokens, 1)
        if self.demonstration_tokens is not None:
            check_at_least("demonstration_tokens", self.demonstration_tokens, 0)


@dataclass(frozen=True)
class SkillFiles:
    """One of the skills of `sdft continual`."""

    train_file: str
    eval_file: str
    choose_file: str | None = None
    scorer: str | None = None
    teacher_template: str | None = None

    @classmethod
    def of(cls, name: str, values: Any) -> SkillFiles:
        """The skill called `name`, from the mapping in a recipe; UsageError where something is missing or too much."""
        fields = [each.name for each in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise UsageError(f"skills has {name}: {shown(values)}; it must be a mapping of {', '.join(fields)}")
        for key in values:
            if key not in fields:
                raise UsageError(f"skills.{name} has {key!r}; it may have {', '.join(fields)}")
        for key in ("train_file", "eval_file"):
            if key not in values:
                raise UsageError(f"skills.{name}: {key} is not set; it must name a file of rows")
        for key, value in values.items():
            if not isinstance(value, str) or not value:
                raise UsageError(f"skills.{name}: {key} is {shown(value)}; it must be a text")
        found = cls(**values)
        if found.scorer is None:
            return found
        return dataclasses.replace(found, scorer=chosen_or_own(f"skills.{name}: scorer", found.scorer, SCORERS))


@dataclass
class ContinualCommand:
    """What `sdft continual` alone is told."""

    skills: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "The skills in the order in which they are learned: {science: {train_file: ..., eval_file: ..., "
            "scorer: choice, teacher_template: first}, ...}; without scorer or teacher_template a skill has the "
            "recipe's. choose_file has rows as eval_file, whose accuracy is told apart: to choose settings by."
        },
    )
    methods: dict[str, Any] = field(
        default_factory=lambda: {"sdft": {"method": "sdft"}, "sft": {"method": "sft"}},
        metadata={
            "help": "The ways to learn them, each a name and the settings of sdft train that it has in place of the "
            "recipe's: {sft: {method: sft, learning_rate: 1e-5}}. With joint: true it learns all skills at once, in as "
            "many steps as the others take for all of them."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Each method runs once with each of them."})

    def __post_init__(self) -> None:
        _check_names("skills", self.skills)
        _check_names("methods", self.methods)
        if taken := sorted({"base", "general"} & self.skills.keys()):
            raise UsageError(
                f"skills has {taken[0]!r}; a name must be another, for the report has a row or column of it"
            )
        for name in self.methods:
            if name in (BASE_FILE, *READ_BY_REPORT, REPORT_FILE) or name.startswith("checkpoint-"):
                raise UsageError(f"methods has {name!r}; a name must be another, for it is that of what a run leaves")
        for name, values in self.methods.items():
            if not isinstance(values, dict):
                raise UsageError(f"methods has {name}: {shown(values)}; it must be a mapping of settings of sdft train")
        if not self.seeds:
            raise UsageError("seeds is empty; it must be one or more whole numbers")
        self.seeds = [int(seed) if isinstance(seed, str) and seed.isdecimal() else seed for seed in self.seeds]
        for seed in self.seeds:
            check_at_least("seeds", seed, 0, LARGEST_SEED)
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds is {self.seeds}; each must be there once")


def _check_names(field: str, names: Iterable[str]) -> None:
    """Refuse no names, and names that are no names of folders."""
    if not list(names):
        raise UsageError(f"{field} is not set; it must name at least one, as in examples/skills/continual.yaml")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise UsageError(
                f"{field} has {name!r}; a name must be letters, digits, hyphens and dots: it names a folder"
            )
