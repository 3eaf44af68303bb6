"""What a run can be told: how it is scored, and how it trains.

The field's help texts are what `sdft train --help-all` prints. Nothing here imports torch or transformers, so that the
command checks what it is told before it loads them. `SDFTConfig`, which is also a `transformers.TrainingArguments`, is
in `sdft.settings.arguments` and here once asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdft.errors import UsageError
from sdft.evaluation.scorers import SCORERS
from sdft.settings.chats import BothChatSettings
from sdft.settings.checks import (
    check_at_least,
    check_between,
    check_from,
    check_switches,
    check_temperature,
    check_texts,
    chosen,
    chosen_or_own,
)
from sdft.settings.feedback import FeedbackSettings
from sdft.settings.rollouts import RolloutSettings
from sdft.settings.setting import setting
from sdft.settings.teachers import BASE, MODEL, TeacherSettings
from sdft.settings.token_weights import TokenWeightSettings

if TYPE_CHECKING:
    from sdft.settings.arguments import SDFTConfig as SDFTConfig

METHODS = ("sdft", "sft")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")
NORMALISATIONS = ("token", "sequence")  # the loss is a mean over tokens, or over the means of completions
OVERLONG = ("error", "skip", "truncate_prompt_left")


def __getattr__(name: str) -> Any:
    if name == "SDFTConfig":
        from sdft.settings.arguments import SDFTConfig

        return SDFTConfig
    raise AttributeError(f"module 'sdft.settings.config' has no attribute {name!r}")


@dataclass
class EvalSettings(BothChatSettings):
    """How answers are made and scored, during training and by `sdft eval`."""

    scorer: str = setting(
        "exact",
        "When an answer to a held-out prompt is right: exact (it is the row's answer), contains (the row's answer is "
        "somewhere in it), choice (it chooses the same letter of a multiple-choice question), json (it is the same "
        "JSON as data: a tool call), or module:function of your own, of completion and answer.",
    )
    general_scorer: str = setting("contains", "When an answer to a general prompt is right: one of the same names.")
    eval_temperature: float | None = setting(
        None, "Held-out prompts: sampling temperature; not set or 0 is greedy decoding."
    )
    eval_samples: int = setting(1, "Held-out prompts: how many answers are sampled to each and averaged over.")
    eval_completion_length: int = setting(64, "The most tokens generated for a held-out prompt.")
    general_completion_length: int = setting(32, "The most tokens generated for a general prompt (greedy decoding).")
    eval_stop: list[str] | None = field(
        default=None,
        metadata={
            "help": "Held-out and general prompts: texts that end an answer, as an end-of-sequence token does; the "
            "text stays in. For models that do not end their answers, as many without a chat template."
        },
    )

    def __post_init__(self) -> None:
        BothChatSettings.__post_init__(self)
        for name in ("scorer", "general_scorer"):
            setattr(self, name, chosen_or_own(name, getattr(self, name), SCORERS))
        check_temperature("eval_temperature", self.eval_temperature, or_greedy=True)
        for name in ("eval_samples", "eval_completion_length", "general_completion_length"):
            check_at_least(name, getattr(self, name), 1)
        check_texts("eval_stop", self.eval_stop)
        if self.eval_samples > 1 and not self.eval_temperature:
            raise UsageError(
                f"eval_samples is {self.eval_samples} and eval_temperature is {self.eval_temperature!r}; greedy "
                "answers are all the same, so it must be 1 or eval_temperature above 0"
            )


@dataclass
class MethodSettings(EvalSettings, TeacherSettings, FeedbackSettings, TokenWeightSettings, RolloutSettings):
    """The settings of `SDFTConfig` that are the method's own, or have a default of its own."""

    method: str = setting(
        "sdft",
        "What is learned from a demonstration: sdft (the student's own answers, scored by the teacher who sees the "
        "demonstration) or sft (cross-entropy on the demonstration itself, the baseline).",
    )
    divergence: str = setting(
        "reverse_kl",
        "What is minimised per token between student p and teacher q: reverse_kl KL(p||q), forward_kl KL(q||p), jsd, "
        "the generalised Jensen-Shannon divergence, or against the mixture m of both, skew_reverse_kl KL(p||m) and "
        "skew_forward_kl KL(q||m).",
    )
    beta: float = setting(0.5, "The teacher's share of the mixture (jsd and skew_*), from 0.001 to 0.999.")
    loss_temperature: float = setting(1.0, "Both models' logits are divided by this before they are compared.")
    skip_tokens: int = setting(
        0, "Leave out of the loss this many tokens at the start of each completion (the paper skips the first few)."
    )
    loss_normalisation: str = setting(
        "token",
        "What the loss of a step is the mean of: token (all its tokens count alike) or sequence (all its completions "
        "do, whatever their length).",
    )
    demonstration_weight: float = setting(
        0.0,
        "Mix in plain cross-entropy on the demonstration: the loss is (1 - this) times the divergence plus this times "
        "the cross-entropy.",
    )
    base_kl_weight: float = setting(
        0.0,
        "With method sft, add this times the divergence from the model that training started from, on the "
        "demonstration's tokens: a penalty on forgetting. 0 is plain cross-entropy.",
    )
    num_iterations: int = setting(
        1, "How many optimizer steps each batch of rollouts serves; above 1 tokens get importance weights."
    )
    importance_clip: float = setting(
        2.0, "The largest importance weight, the ratio of a token's probability now to when it was sampled."
    )
    max_forward_tokens: int | None = setting(
        None,
        "The most tokens, padding included, that the student goes through at once: a micro-batch of more is worked "
        "through in pieces, samples of similar length together, and the step stays the same. A sample of more goes "
        "through MLPs and norms in tiles of this many tokens, and whole through attention alone. Not set: all of it.",
    )
    activation_offload: bool = setting(
        False,
        "With activation_checkpointing, keep the layers' inputs in host memory, copied to and from the GPU while it "
        "computes. No effect on a CPU.",
    )
    max_chunk_bytes: int | None = setting(
        None, "The memory that the loss may use for logits, in bytes; chosen for the device when not set."
    )

    log_completions: int | bool = setting(
        0,
        "Write the rollouts of every so many steps to output_dir/completions.jsonl, with each token's divergence and "
        "log-probabilities, and what else was likely there; 0 or false is never, true every step.",
    )

    overlong: str = setting(
        "error",
        "A row whose prompts are too long for the model: error, skip (it is left out), or truncate_prompt_left (the "
        "last message of its prompt by the user loses its beginning, for student and teacher alike).",
    )
    rows_on_disk: bool = setting(
        False,
        "Keep the training rows in a file on the disk of output_dir, not in memory, for data that does not fit there. "
        "All else stays as it is, but that objects in rows of your own are copies each time they are read.",
    )

    freeze_embeddings: bool = setting(
        False, "Leave the embeddings, and the output head where it is tied to them, as they are."
    )

    output_dir: str | None = setting("runs/sdft", "Where the trained model, checkpoints and reports are written.")
    overwrite_output_dir: bool = setting(
        False, "Start anew in an output_dir that holds another run: its checkpoints and reports go."
    )
    learning_rate: float = setting(2e-5, "Peak learning rate.")
    num_train_epochs: float = setting(1.0, "How many times the training data is gone through.")
    resume_from_checkpoint: str | None = setting(
        None, "Go on from this checkpoint, or from the newest in output_dir (last); model stays the original one."
    )
    logging_steps: float = setting(1, "Log every so many steps; a fraction below 1 is of the whole run.")
    # A loss that is not finite ends the run here, so it must not be averaged away in the log.
    logging_nan_inf_filter: bool = setting(False, "Hide losses that are not finite from the log.")
    # Batches are lists of token ids until the rollouts are there: there is nothing to pin.
    dataloader_pin_memory: bool = setting(False, "Pin batches in memory; nothing is gained by it here.")
    # The dataset's columns are the method's, not the model's forward arguments.
    remove_unused_columns: bool = setting(False, "Drop columns that the model's forward does not take; stays off.")

    def __post_init__(self) -> None:
        check_switches(self)
        EvalSettings.__post_init__(self)
        if self.output_dir == "":
            raise UsageError("output_dir is ''; it must be a folder to write to")
        self.method = chosen("method", self.method, METHODS)
        self.divergence = chosen("divergence", self.divergence, DIVERGENCES)
        check_from("beta", self.beta, 0.001, 0.999)
        check_temperature("loss_temperature", self.loss_temperature)
        TeacherSettings.__post_init__(self)
        FeedbackSettings.__post_init__(self)
        TokenWeightSettings.__post_init__(self)
        RolloutSettings.__post_init__(self)
        if not isinstance(self.log_completions, bool):  # True is every step
            check_at_least("log_completions", self.log_completions, 0)
        check_at_least("skip_tokens", self.skip_tokens, 0)
        self.loss_normalisation = chosen("loss_normalisation", self.loss_normalisation, NORMALISATIONS)
        check_from("demonstration_weight", self.demonstration_weight, 0, 1)
        if self.demonstration_weight == 1:
            raise UsageError(
                f"demonstration_weight is {self.demonstration_weight}; it must be below 1, for at 1 nothing but the "
                "cross-entropy counts, and method sft has that without rollouts"
            )
        check_from("base_kl_weight", self.base_kl_weight, 0.001, 1000, or_zero=True)
        if self.feedback is not None and self.rollout_from == "teacher":
            raise UsageError(
                f"feedback is {self.feedback!r} and rollout_from 'teacher'; it must be 'student', for what the teacher "
                "sees is made of what the student wrote"
            )
        check_at_least("num_iterations", self.num_iterations, 1)
        if self.rollout_lag and self.num_iterations > 1:
            raise UsageError(
                f"rollout_lag is 1 and num_iterations {self.num_iterations}; it must be 0, for rollouts that serve "
                "several steps are written in few of them"
            )
        check_between("importance_clip", self.importance_clip, 0)
        self._check_teacher_cache()
        for name in ("max_chunk_bytes", "max_forward_tokens"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.skip_tokens >= self.max_completion_length:
            raise UsageError(
                f"skip_tokens is {self.skip_tokens}; it must be below max_completion_length, which is "
                f"{self.max_completion_length}, or no token is left to learn from"
            )
        self.overlong = chosen("overlong", self.overlong, OVERLONG)

    def _check_teacher_cache(self) -> None:
        if self.teacher_cache_gib == 0:
            return
        check_between("teacher_cache_gib", self.teacher_cache_gib, 0)
        for name, needed in (("method", ("sdft",)), ("teacher", (BASE, MODEL)), ("teacher_offload", (False,))):
            if (value := getattr(self, name)) not in needed:
                raise UsageError(
                    f"teacher_cache_gib is {self.teacher_cache_gib}; it must be 0 where {name} is {value!r}, for it "
                    f"needs {name} {' or '.join(map(repr, needed))}"
                )
