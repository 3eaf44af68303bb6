"""From models and a micro-batch to the loss, without logits: hidden states of completion positions, then the head.

`sdft.head` says what the head is; the divergence and the cross-entropy themselves are `sdft_kernels`'.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.batch import Batch
from sdft.forward import autocasting
from sdft.head import Head, at_head, backbone, hidden_states
from sdft.likeliest import Likeliest, likeliest
from sdft.memory.offload import keeping
from sdft.prompt_cache import PromptCache
from sdft.reach import hardly_reaches, out_of_reach
from sdft.settings.config import SDFTConfig
from sdft.settings.token_weights import UNIFORM
from sdft.teacher import Teacher
from sdft.token_weights import Weighed, weigh
from sdft_kernels import DivergenceOutput, fused_linear_cross_entropy, fused_linear_divergence, linear_token_stats


@dataclass(frozen=True)
class View:
    """What a model makes of each completion token: the hidden state (N, H) that predicts it, and the head."""

    hidden: Tensor
    head: Head


@torch.no_grad()
def teacher_view(
    teacher: PreTrainedModel,
    batch: Batch,
    autocast: torch.dtype | None = None,
    prompts: PromptCache | None = None,
    skip_tokens: int = 0,
) -> View:
    """The teacher's view of the batch's completions, after its own prompts and without a graph.

    With `prompts`, those that it has read before are found there, and the batch has its "samples".
    """
    with autocasting(batch["labels"].device, autocast):
        if prompts is None:
            hidden = hidden_states(teacher, batch["teacher_input_ids"], batch["teacher_positions"])
        else:
            hidden = prompts.hidden_states(backbone(teacher), batch["samples"], skip_tokens)
        return View(hidden, at_head(teacher, lambda head: head))


def divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel | View,
    batch: Batch,
    *,
    autocast: torch.dtype | None = None,
    on_host: bool = False,
    look: Callable[[DivergenceOutput, View, View], None] | None = None,
    weigh: Callable[[DivergenceOutput], Weighed] | None = None,
    **options: Any,
) -> DivergenceOutput:
    """The divergence between two models at each completion token of the batch, without a graph through the teacher.

    `autocast` is the type of mixed-precision products (None: the weights' own type); the softmax arithmetic is float32
    either way. With `on_host`, what the student keeps for its backward pass is in host memory. `look` is shown the
    outcome and both views while the student's head is whole. `weigh` makes of the outcome what each token counts; the
    outcome then is the one without, but for its loss. `options` go to `fused_linear_divergence`.
    """
    seen = teacher if isinstance(teacher, View) else teacher_view(teacher, batch, autocast)

    def compare(head: Head) -> DivergenceOutput:
        student_hidden, teacher_hidden, teacher_weight, dtype = hidden, seen.hidden, seen.head.weight, head.weight.dtype
        if autocast is None:  # another model as teacher may be of another type
            student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.to(dtype)
            teacher_weight = teacher_weight.to(dtype)
        compare_by = functools.partial(
            fused_linear_divergence,
            student_hidden,
            head.weight,
            teacher_hidden,
            teacher_weight,
            student_bias=head.bias,
            teacher_bias=seen.head.bias,
            vocab_size=min(len(head.weight), len(teacher_weight)),
            student_logit_scale=head.scale,
            teacher_logit_scale=seen.head.scale,
            student_softcap=head.softcap,
            teacher_softcap=seen.head.softcap,
        )
        out = compare_by(**options) if weigh is None else _weighted(compare_by, weigh, options)
        if look is not None:
            look(out, View(hidden.detach(), head), seen)
        return out

    with autocasting(student.device, autocast):
        with keeping(student.device, on_host):
            hidden = hidden_states(student, batch["input_ids"], batch["positions"])
        return at_head(student, compare)


def _weighted(
    compare: Callable[..., DivergenceOutput], weigh: Callable[[DivergenceOutput], Weighed], options: dict[str, Any]
) -> DivergenceOutput:
    """The outcome without weights, with the loss that has them; `options` have `reduction` "sum"."""
    given = options.get("token_weight")
    with torch.no_grad():
        known = weigh(compare(**{**options, "token_weight": None, "old_logprobs": None, "importance_clip": None}))
    counted = torch.where(known.clipped, 0, known.weights)
    out = compare(**{**options, "token_weight": counted if given is None else counted * given})
    ratio: Tensor | None = None
    if (old_logprobs := options.get("old_logprobs")) is not None:
        assert known.seen.student_logprob is not None
        ratio = importance_weights(known.seen.student_logprob - old_logprobs, options["importance_clip"])
    return DivergenceOutput(out.loss + known.value_of_clipped(given, ratio), *known.seen[1:])


@torch.no_grad()
def completion_logprobs(
    student: PreTrainedModel, batch: Batch, config: SDFTConfig, autocast: torch.dtype | None
) -> Tensor:
    """(N,) float32 log-probability of each completion token of the batch, at the loss's temperature."""

    def score(head: Head) -> Tensor | None:
        return linear_token_stats(
            hidden if autocast else hidden.to(head.weight.dtype),
            head.weight,
            labels=batch["labels"],
            bias=head.bias,
            logit_scale=head.scale,
            softcap=head.softcap,
            temperature=config.loss_temperature,
            max_chunk_bytes=config.max_chunk_bytes,
        ).logprob

    with autocasting(student.device, autocast):
        hidden = hidden_states(student, batch["input_ids"], batch["positions"])
        logprob = at_head(student, score)
    assert logprob is not None
    return logprob


@dataclass(frozen=True)
class OfTokens:
    """What is known of each token of a loss: (N,) float32, and what both models would rather have written."""

    divergence: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_top: Likeliest
    teacher_top: Likeliest


class StepLoss(NamedTuple):
    """The loss summed over a micro-batch's tokens, and sums over the same tokens that are worth logging.

    `tokens`, where they were asked for, are what is known of each of them.
    """

    total: Tensor
    sums: dict[str, Tensor]
    tokens: OfTokens | None = None


def distillation_loss(
    student: PreTrainedModel,
    teacher: Teacher,
    batch: Batch,
    config: SDFTConfig,
    autocast: torch.dtype | None,
    *,
    per_token: bool = False,
    prompts: PromptCache | None = None,
    timed: contextlib.AbstractContextManager[None] | None = None,
) -> StepLoss:
    """Self-distillation: the summed divergence between the student and the teacher who sees the demonstration.

    The teacher scores within `timed`.
    """
    with timed or contextlib.nullcontext(), teacher.scoring() as scorer:
        seen = teacher_view(scorer, batch, autocast, prompts, config.skip_tokens)
    old_logprobs = batch.get("old_logprobs")
    tokens: list[OfTokens] = []
    weighed: list[Weighed] = []
    weighs = config.token_weighting != UNIFORM or config.divergence_clip is not None
    measures, sums = hardly_reaches(config), dict[str, Tensor]()

    def weigh_tokens(out: DivergenceOutput) -> Weighed:
        weighed.append(weigh(out, batch, config))
        return weighed[0]

    def look(out: DivergenceOutput, *views: View) -> None:
        if measures:
            of_student, of_teacher = ((view.hidden.index_select(0, batch["starts"]), view.head) for view in views)
            temperature, most = config.loss_temperature, config.max_chunk_bytes
            shares = out_of_reach(*of_student, *of_teacher, temperature=temperature, max_chunk_bytes=most)
            sums.update(out_of_reach=shares.sum(), begun=torch.ones_like(shares).sum())
        if not per_token:
            return
        assert out.student_logprob is not None and out.teacher_logprob is not None
        logprobs = (out.student_logprob, out.teacher_logprob)
        tops = (
            likeliest(
                view.hidden,
                view.head,
                batch["labels"],
                logprob,
                temperature=config.loss_temperature,
                autocast=autocast,
                max_chunk_bytes=config.max_chunk_bytes,
            )
            for view, logprob in zip(views, logprobs, strict=True)
        )
        tokens.append(OfTokens(out.token_loss, *logprobs, *tops))

    out = divergence(
        student,
        seen,
        batch,
        autocast=autocast,
        on_host=config.activation_offload,
        look=look if per_token or measures else None,
        weigh=weigh_tokens if weighs else None,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.loss_temperature,
        token_weight=batch.get("token_weight"),
        labels=batch["labels"] if weighs or per_token or old_logprobs is not None else None,
        old_logprobs=old_logprobs,
        importance_clip=None if old_logprobs is None else config.importance_clip,
        reduction="sum",
        max_chunk_bytes=config.max_chunk_bytes,
    )
    sums |= {"student_entropy": out.student_entropy.sum(), "teacher_entropy": out.teacher_entropy.sum()}
    for each in weighed:
        sums |= {"token_weight": each.weights.sum(), "clipped": each.clipped.sum()}
    if out.student_logprob is None or out.teacher_logprob is None:
        return StepLoss(out.loss, sums)
    if old_logprobs is not None:
        sums |= importance(out.student_logprob - old_logprobs, config.importance_clip)
    return StepLoss(out.loss, sums, tokens[0] if tokens else None)


def importance_weights(gap: Tensor, clip: float) -> Tensor:
    """(N,) weights of tokens, as the kernels have them: `gap` (N,) is log-probabilities now less those when drawn."""
    return gap.exp().clamp(max=clip)


def importance(gap: Tensor, clip: float) -> dict[str, Tensor]:
    """What is worth logging of the importance weights of these gaps."""
    weight = importance_weights(gap, clip)
    return {
        "rollout_gap": gap.abs().sum(),
        "importance": weight.sum(),
        "squared_importance": weight.square().sum(),
        "rollout_gap_max": gap.abs().amax() if len(gap) else gap.sum(),
    }


def demonstration_loss(
    student: PreTrainedModel,
    batch: Batch,
    config: SDFTConfig,
    autocast: torch.dtype | None,
    base: Teacher | None = None,
    *,
    timed: contextlib.AbstractContextManager[None] | None = None,
) -> StepLoss:
    """The summed cross-entropy of the completions, which are demonstrations here: supervised fine-tuning.

    With `base`, the model that training started from, `base_kl_weight` times the divergence from it on the same tokens
    is added. It scores within `timed`, and both come out of the same logits.
    """
    if base is not None:
        return _loss_near(base, student, batch, config, autocast, timed or contextlib.nullcontext())

    def cross_entropy(head: Head) -> Tensor:
        return fused_linear_cross_entropy(
            hidden if autocast else hidden.to(head.weight.dtype),
            head.weight,
            batch["labels"],
            bias=head.bias,
            token_weight=batch.get("token_weight"),
            logit_scale=head.scale,
            softcap=head.softcap,
            reduction="sum",
            max_chunk_bytes=config.max_chunk_bytes,
        ).loss

    with autocasting(student.device, autocast):
        with keeping(student.device, config.activation_offload):
            hidden = hidden_states(student, batch["input_ids"], batch["positions"])
        return StepLoss(at_head(student, cross_entropy), {})


def _loss_near(
    base: Teacher,
    student: PreTrainedModel,
    batch: Batch,
    config: SDFTConfig,
    autocast: torch.dtype | None,
    timed: contextlib.AbstractContextManager[None],
) -> StepLoss:
    """Cross-entropy + weight * divergence, made as weight * (divergence + cross-entropy / weight)."""
    with timed, base.scoring() as scorer:
        own_prompts = {f"teacher_{name}": batch[name] for name in ("input_ids", "positions")}
        seen = teacher_view(scorer, batch | own_prompts, autocast)
    out = divergence(
        student,
        seen,
        batch,
        autocast=autocast,
        on_host=config.activation_offload,
        divergence=config.divergence,
        beta=config.beta,
        temperature=config.loss_temperature,
        token_weight=batch.get("token_weight"),
        hard_labels=batch["labels"],
        hard_weight=1 / config.base_kl_weight,
        reduction="sum",
        max_chunk_bytes=config.max_chunk_bytes,
    )
    return StepLoss(config.base_kl_weight * out.loss, {"base_kl": out.token_loss.sum()})
