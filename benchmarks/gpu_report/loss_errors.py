"""Gradients in float64, from full logits, and how far others are from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.methods import HARD_WEIGHT, SOFT_TEMPERATURE, WITH_HARD, Inputs
from sdft_kernels.divergences import CROSS_ENTROPY
from sdft_kernels.reference import reference_cross_entropy, reference_divergence

ERROR_ROWS, ERROR_SEED = 256, 7


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()


def reference(inputs: Inputs, divergence: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hidden gradient and weight gradient in float64, of some tokens' logits at a time."""
    hidden = inputs.student_hidden.detach().double().requires_grad_()
    weight = inputs.student_weight.detach().double().requires_grad_()
    tokens = len(hidden)
    of_each_token: dict[str, Any] = {
        name: options[name] for name in ("token_weight", "labels", "old_logprobs") if name in options
    }
    others = {name: value for name, value in options.items() if name not in of_each_token}
    total = options["token_weight"].double().sum() if "token_weight" in options else tokens
    if divergence == WITH_HARD:
        divergence = "reverse_kl"
        of_each_token["hard_labels"] = inputs.labels
        others |= {"hard_weight": HARD_WEIGHT, "temperature": SOFT_TEMPERATURE}
    loss = hidden.new_zeros(())
    for start in range(0, tokens, ERROR_ROWS):
        rows = slice(start, start + ERROR_ROWS)
        if divergence == CROSS_ENTROPY:
            part = reference_cross_entropy(hidden[rows], weight, inputs.labels[rows], reduction="sum").loss
        else:
            part = reference_divergence(
                hidden[rows],
                weight,
                inputs.teacher_hidden[rows].double(),
                weight.detach(),
                divergence=divergence,
                reduction="sum",
                **{name: vector[rows] for name, vector in of_each_token.items()},
                **others,
            ).loss
        (part / total).backward()
        loss += part.detach() / total
    assert hidden.grad is not None and weight.grad is not None
    return loss, hidden.grad, weight.grad
