"""How prompts are put into a chat template, for the student and for the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdft.errors import UsageError, shown

#: What the loop itself tells a chat template.
TAKEN = ("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_tensors")


@dataclass
class ChatSettings:
    """What the chat template is told beside the messages."""

    chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What the tokenizer's chat template is told beside the messages, as {enable_thinking: false} for "
            "Qwen3."
        },
    )

    def __post_init__(self) -> None:
        _check("chat_template_kwargs", self.chat_template_kwargs)


@dataclass
class BothChatSettings(ChatSettings):
    """The same of a student and a teacher."""

    teacher_chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "The same for the teacher's prompts; not set, what chat_template_kwargs has."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("teacher_chat_template_kwargs", self.teacher_chat_template_kwargs)

    @property
    def teacher_options(self) -> dict[str, Any] | None:
        """What the chat template is told for the teacher."""
        own = self.teacher_chat_template_kwargs
        return self.chat_template_kwargs if own is None else own


def _check(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name} is {shown(value)}; it must be a mapping of names to values")
    if taken := sorted(value.keys() & set(TAKEN)):
        raise UsageError(f"{name} has {', '.join(taken)}; it must not, for training itself says so")
