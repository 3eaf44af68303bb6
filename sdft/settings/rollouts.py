"""How rollouts are written: the part of the method's settings that is about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from sdft.errors import UsageError
from sdft.settings.checks import (
    at_least_or,
    check_at_least,
    check_between,
    check_from,
    check_temperature,
    check_texts,
    check_url,
    chosen,
    matching,
)
from sdft.settings.setting import setting

ROLLOUT_SOURCES = ("student", "teacher")
DRAFTS = ("none", "demonstration", "history")
CORRECTIONS = ("auto", "none", "truncate")
VLLM = "vllm"  # rollout_backend: the one that is made for a model
AUTO = "auto"  # rollout_batch_size: as many as fit


@dataclass
class BackendSettings:
    """What writes rollouts, and the answers of an evaluation."""

    rollout_backend: str = setting(
        "generate",
        "What writes the rollouts, and the answers of an evaluation: generate (transformers, one padded batch), "
        "continuous (transformers' continuous batching: no padding, and a finished rollout makes room for the next), "
        "vllm (an engine of vLLM's in this process, which is given the model's weights before it answers), or in "
        "training one you have registered with sdft.rollouts.generate.register_backend.",
    )
    rollout_server: str | None = setting(
        None,
        "rollout_backend vllm: the URL of a vLLM server that writes the rollouts, such as http://localhost:8000, in "
        "place of an engine in this process; docs/rollouts.md says how it is started.",
    )
    vllm_memory_share: float = setting(
        0.3,
        "rollout_backend vllm: the share of the GPU's memory that its weights, keys and values may take; on a CPU its "
        "keys and values, of the free memory.",
    )

    def __post_init__(self) -> None:
        check_between("vllm_memory_share", self.vllm_memory_share, 0, 1)
        check_url("rollout_server", self.rollout_server)
        self.rollout_server = self.rollout_server and self.rollout_server.rstrip("/")
        self.rollout_backend = matching(self.rollout_backend, (VLLM,)) or self.rollout_backend


@dataclass
class RolloutSettings(BackendSettings):
    """What the student's answers are drawn from, by whom, and how many at once."""

    max_completion_length: int = setting(256, "The most tokens in a rollout.")
    rollout_temperature: float = setting(1.0, "Rollouts: sampling temperature.")
    rollout_top_p: float = setting(1.0, "Rollouts: sample from the smallest set of tokens with this much probability.")
    rollout_top_k: int = setting(0, "Rollouts: sample from this many of the likeliest tokens; 0 is all of them.")
    rollout_min_p: float = setting(
        0.0, "Rollouts: leave out tokens with less than this share of the likeliest token's probability; 0 leaves none."
    )
    rollout_stop: list[str] | None = field(
        default=None,
        metadata={"help": "Rollouts: texts that end a rollout, as an end-of-sequence token does; the text stays in."},
    )
    rollout_from: str = setting(
        "student",
        "Who writes the rollouts: student, or teacher (who sees the demonstration; the student then learns from the "
        "teacher's answers as if they were its own).",
    )
    rollouts_per_prompt: int = setting(
        1, "Rollouts for each prompt; a micro-batch holds this many times per_device_train_batch_size."
    )
    rollout_batch_size: int | str | None = setting(
        None,
        "Rollouts sampled at once, those of similar prompt length together; all of the step's when not set. auto is as "
        "many as the free memory takes, and half as many each time that it runs out all the same.",
    )
    rollout_draft: str = setting(
        "none",
        "Write rollouts in fewer passes of the model, the same tokens, by a text that they may resemble: demonstration "
        "(the row's own), history (the rollout of the same prompt in an earlier epoch) or none. With rollout_backend "
        "generate.",
    )
    rollout_compile: bool = setting(
        False,
        "rollout_backend generate: on a GPU, compile the pass that writes a token, into CUDA graphs, with a cache that "
        "has its whole length from the start. The first rollouts take longer. No effect on a CPU.",
    )
    rollout_lag: int = setting(
        0,
        "1: the next step's rollouts are written while this one learns, by the weights before its update, which "
        "rollout_correction makes up for. With rollout_backend vllm, on a GPU with a rollout_server.",
    )
    rollout_correction: str = setting(
        "auto",
        "Weight each token's loss by its probability now over that with which it was drawn, at most importance_clip: "
        "truncate always does; auto does where the two differ by rounding, as in bfloat16; none never does.",
    )

    def __post_init__(self) -> None:
        BackendSettings.__post_init__(self)
        check_at_least("max_completion_length", self.max_completion_length, 1)
        check_temperature("rollout_temperature", self.rollout_temperature)
        check_between("rollout_top_p", self.rollout_top_p, 0, 1, closed_above=True)
        check_at_least("rollout_top_k", self.rollout_top_k, 0)
        check_from("rollout_min_p", self.rollout_min_p, 0, 1)
        self.rollout_from = chosen("rollout_from", self.rollout_from, ROLLOUT_SOURCES)
        check_at_least("rollouts_per_prompt", self.rollouts_per_prompt, 1)
        self.rollout_draft = chosen("rollout_draft", self.rollout_draft, DRAFTS)
        if self.rollout_draft != "none" and self.rollout_backend != "generate":
            raise UsageError(
                f"rollout_draft is {self.rollout_draft!r}; it must be none where rollout_backend is "
                f"{self.rollout_backend!r}, for drafts take 'generate'"
            )
        self.rollout_correction = chosen("rollout_correction", self.rollout_correction, CORRECTIONS)
        if self.rollout_backend == VLLM and self.rollout_from == "teacher":
            raise UsageError(
                "rollout_backend is 'vllm' and rollout_from 'teacher'; it must be student, whose weights vLLM is given"
            )
        if self.rollout_correction == "truncate" and self.rollout_from == "teacher":
            raise UsageError(
                "rollout_correction is 'truncate' and rollout_from 'teacher'; it must be none or auto, for the weights "
                "would take back what the teacher's own answers change"
            )
        self._check_lag()
        self._check_compile()
        if self.rollout_batch_size is not None:
            self.rollout_batch_size = at_least_or("rollout_batch_size", self.rollout_batch_size, 1, AUTO)
        check_texts("rollout_stop", self.rollout_stop)

    def _check_lag(self) -> None:
        check_at_least("rollout_lag", self.rollout_lag, 0, 1)
        if not self.rollout_lag:
            return
        if self.rollout_backend != VLLM:
            raise UsageError(
                f"rollout_lag is 1 and rollout_backend {self.rollout_backend!r}; it must be 0, or the back-end vllm, "
                "whose weights stay as they are while the student's are updated"
            )
        if self.rollout_correction == "none":
            raise UsageError(
                "rollout_lag is 1 and rollout_correction 'none'; it must be 0, or rollout_correction auto or truncate, "
                "for the rollouts are drawn by the weights before an update"
            )

    def _check_compile(self) -> None:
        if not self.rollout_compile:
            return
        for name, needed in (("rollout_backend", "generate"), ("rollout_draft", "none")):
            if (value := getattr(self, name)) != needed:
                raise UsageError(
                    f"rollout_compile is True and {name} {value!r}; it must be False, or {name} {needed!r}, for it "
                    "compiles the pass of `generate` that writes one token"
                )
        if matching(self.rollout_batch_size, (AUTO,)):
            raise UsageError(
                "rollout_compile is True and rollout_batch_size 'auto'; it must be False, or rollout_batch_size a "
                "number or not set, for each number of rollouts is compiled anew"
            )
