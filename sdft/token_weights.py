"""What each token of a rollout counts in the loss, by what both models say of it: `token_weighting`, `divergence_clip`.

The models are compared once to know each token's divergence, log-probabilities and entropies, without gradients. The
loss then is Σ w · D over the tokens: their weights are constants, and no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft.batch import Batch, Sample
from sdft.errors import TrainingError, UsageError
from sdft.named_functions import imported
from sdft.settings.config import SDFTConfig
from sdft.settings.token_weights import UNIFORM
from sdft_kernels import DivergenceOutput


@dataclass(frozen=True)
class Tokens:
    """What is known of the N tokens of a loss, each (N,) and without a graph.

    `divergence`, the log-probabilities of the token that was written and the entropies are float32, in nats.
    `position` is a token's place in its completion, from 0, and `length` that completion's number of tokens (int64).
    """

    divergence: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    position: Tensor
    length: Tensor


#: Weights of tokens, (N,), each a number of at least 0.
Weighting = Callable[[Tokens], Tensor]


def teacher_confidence(tokens: Tokens) -> Tensor:
    """exp(-H) of the teacher's entropy H: 1 where it is certain, 1/k where k tokens are alike to it."""
    return (-tokens.teacher_entropy).exp()


def early(tokens: Tokens) -> Tensor:
    """From 1 for a completion's first token down to 1/length for its last."""
    return 1 - tokens.position / tokens.length


NAMED: dict[str, Weighting] = {"teacher_confidence": teacher_confidence, "early": early}


def weighting_of(config: SDFTConfig) -> Weighting | None:
    """The function that `token_weighting` names, None for uniform; UsageError where it cannot be had."""
    name = config.token_weighting
    if name == UNIFORM or config.method != "sdft":
        return None
    return NAMED[name] if name in NAMED else imported("token_weighting", name, name)


@dataclass(frozen=True)
class Weighed:
    """A loss's tokens and what they count beside what they would count anyway."""

    seen: DivergenceOutput
    weights: Tensor  # (N,) float32
    clipped: Tensor  # (N,) bool: those whose divergence is above `clip`
    clip: float | None

    def value_of_clipped(self, *given: Tensor | None) -> Tensor | float:
        """What the clipped tokens add to the loss's value: the clip itself, whose gradient is zero.

        `given` are other weights of the tokens, (N,) each: those of their completions, and importance weights.
        """
        if self.clip is None:
            return 0.0
        counted = self.weights * self.clipped
        for weights in given:
            counted = counted if weights is None else counted * weights
        return self.clip * counted.sum()


def weigh(out: DivergenceOutput, batch: Batch, config: SDFTConfig) -> Weighed:
    """What a batch's tokens count, by its outcome without weights; UsageError where a function gives none."""
    assert out.student_logprob is not None and out.teacher_logprob is not None
    count, device = len(out.token_loss), out.token_loss.device
    weights, clip = torch.ones(count, device=device), config.divergence_clip
    if (weighting := weighting_of(config)) is not None:
        places, lengths = _places(batch["samples"], config.skip_tokens, device)
        known = (out.token_loss, out.student_logprob, out.teacher_logprob, out.student_entropy, out.teacher_entropy)
        try:
            weights = weighting(Tokens(*known, places, lengths))
        except (UsageError, TrainingError):
            raise
        except Exception as error:  # it may be a user's code
            raise TrainingError(
                f"token_weighting {config.token_weighting} failed: {type(error).__name__}: {error}"
            ) from error
        _check(weights, count)
        weights = weights.detach().to(device, torch.float32)
    clipped = torch.zeros(count, dtype=torch.bool, device=device) if clip is None else out.token_loss > clip
    return Weighed(out, weights, clipped, clip)


def _places(samples: Sequence[Sample], skip: int, device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [len(sample.read().completion) for sample in samples]
    places = [place for length in lengths for place in range(skip, length)]
    of_each = [length for length in lengths for _ in range(skip, length)]
    whole = torch.int64  # of no numbers, too
    return torch.tensor(places, dtype=whole, device=device), torch.tensor(of_each, dtype=whole, device=device)


def _check(weights: object, count: int) -> None:
    what = f"a {type(weights).__name__}"
    if isinstance(weights, Tensor):
        what = f"a tensor of shape {tuple(weights.shape)}"
        if weights.is_complex():
            what = f"a tensor of {str(weights.dtype).removeprefix('torch.')}"
        elif weights.shape == (count,):
            if bool(weights.float().isfinite().all()) and bool((weights >= 0).all()):
                return
            what = "a tensor with numbers that are below 0 or not finite in float32"
    raise UsageError(
        f"the function of token_weighting returned {what}; it must be a tensor of {count} numbers of at least 0, one "
        "for each token"
    )
