"""Who scores the rollouts, and what that teacher sees: the part of the method's settings that is about the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdft.errors import UsageError
from sdft.settings.checks import check_at_least, check_between, chosen, matching
from sdft.settings.inputs import DTYPES
from sdft.settings.setting import setting
from sdft.templates import PROMPT, TEMPLATES, Message, default_template, parse_template

BASE, MODEL = "base", "model"
TEACHERS = (BASE, "ema", "live", MODEL)


@dataclass
class OtherTeacher:
    """Another model as the teacher."""

    teacher_model: str | None = setting(
        None,
        "Another causal model of the same tokenizer, as the teacher: a hub name, a folder, an adapter's too, or a GGUF "
        "file. It may be of another size, and sees the prompt as it is unless teacher_template says otherwise.",
    )
    teacher_dtype: str = setting(
        "auto",
        "The type that the weights of teacher_model are kept in: float32, bfloat16, or auto (the type they are stored "
        "in).",
    )
    teacher_bits: int | None = setting(
        None,
        "Round the weights of teacher_model's linear layers to so many bits as they are loaded: 4, by bitsandbytes. "
        "Not set, they stay as they are stored.",
    )

    def __post_init__(self) -> None:
        if self.teacher_model is not None and not (isinstance(self.teacher_model, str) and self.teacher_model.strip()):
            raise UsageError(
                f"teacher_model is {self.teacher_model!r}; it may be a hub name, a folder or a GGUF file, and a model "
                "itself is given to SDFTTrainer"
            )
        self.teacher_dtype = chosen("teacher_dtype", self.teacher_dtype, DTYPES)
        if self.teacher_bits not in (None, 4):
            raise UsageError(f"teacher_bits is {self.teacher_bits!r}; it may be 4, or not be set")


@dataclass
class TeacherSettings(OtherTeacher):
    """Who the teacher is, what it sees of a row, and where it is kept."""

    teacher: str | None = setting(
        None,
        "Who scores the rollouts: base (the model as it was before training), ema (an exponential moving average of "
        "the student, kept in float32), live (the student itself, as it is at each step) or model (another one, "
        "teacher_model). Not set, model where teacher_model is set, and base otherwise.",
    )
    ema_rate: float = setting(0.01, "How far the average moves to the student at each update (teacher: ema).")
    ema_interval: int = setting(1, "Update the average every so many steps (teacher: ema).")
    teacher_offload: bool = setting(
        False,
        "With full fine-tuning, or teacher_model, keep on the CPU what the teacher needs only now and then: its "
        "layers, each brought to the device as it computes, and the float32 average of ema.",
    )
    teacher_cache_gib: float = setting(
        0.0,
        "GiB of the model's device for the keys and values of prompts that the teacher has read, which it then does "
        "not read again: for several rollouts of a prompt, or several epochs (teacher: base or model). What it takes "
        "to score a batch comes on top. 0 keeps none.",
    )
    teacher_template: list[dict[str, str]] | str | None = field(
        default=None,
        metadata={
            "help": "How the teacher is shown the demonstration: paper (the question, the demonstration as an example "
            "response, the request for one's own), turn (the demonstration as an earlier turn of the chat), first (the "
            "demonstration before the question), or your own text or list of messages with both {prompt} and "
            "{demonstration}. With teacher_model it may be prompt, the prompt as it is, and your own need not have "
            "{demonstration}; nor need one with a system message, which only the teacher sees. Not set, prompt with "
            "teacher_model, and paper otherwise."
        },
    )

    def __post_init__(self) -> None:
        OtherTeacher.__post_init__(self)
        implied = BASE if self.teacher_model is None else MODEL
        self.teacher = implied if self.teacher is None else chosen("teacher", self.teacher, TEACHERS)
        if self.teacher_model is not None and self.teacher != MODEL:
            raise UsageError(
                f"teacher is {self.teacher!r} and teacher_model {self.teacher_model!r}; with teacher_model it must be "
                "'model', or not be set"
            )
        check_between("ema_rate", self.ema_rate, 0, 1, closed_above=True)
        check_at_least("ema_interval", self.ema_interval, 1)
        if self.teacher_offload and self.teacher == "live":
            raise UsageError("teacher_offload is True; it is for teacher base, ema or model, and teacher is 'live'")
        if self.teacher_offload and self.teacher_bits is not None:
            raise UsageError(
                f"teacher_offload is True and teacher_bits {self.teacher_bits}; one of the two must not be set, for "
                "weights of few bits stay on the device"
            )
        if self.teacher_template is None:
            self.teacher_template = default_template(other_model=self.teacher == MODEL)
        self.teacher_template = matching(self.teacher_template, (*TEMPLATES, PROMPT)) or self.teacher_template
        parse_template(self.teacher_template, other_model=self.teacher == MODEL)

    @property
    def template(self) -> list[Message]:
        """The messages by which the teacher is shown a row."""
        return parse_template(self.teacher_template, other_model=self.teacher == MODEL)


def check_named(settings: OtherTeacher, teacher: str | None) -> None:
    """UsageError where the teacher is to be another model, and a command was not told which."""
    if teacher == MODEL and settings.teacher_model is None:
        raise UsageError("teacher is 'model' and teacher_model is not set; it must name the model that teaches")
