"""Cross-entropy straight from hidden states and a head, alone and as a divergence's hard term."""

import torch
from torch.nn import functional

from sdft_kernels.reference import reference_cross_entropy, reference_divergence


def test_the_definition_is_torchs_cross_entropy() -> None:
    hidden, weight = torch.randn(9, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    labels = torch.randint(0, 11, (9,))
    labels[2] = -100
    z = 1.5 * hidden @ weight.T / 0.8
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.2):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            found = reference_cross_entropy(hidden, weight, labels, logit_scale=1.5, temperature=0.8, **options)
            torch.testing.assert_close(found.loss, functional.cross_entropy(z, labels, **options))


def test_the_definition_adds_the_hard_term_to_the_divergence() -> None:
    """At its own temperature, with the weights of the tokens, which divide the mean."""
    inputs = [torch.randn(5, 4).double(), torch.randn(7, 4).double(), torch.randn(5, 3).double(), torch.randn(7, 3)]
    inputs[3] = inputs[3].double()
    labels, weight, hard = torch.randint(0, 7, (5,)), torch.rand(5).double(), torch.rand(5).double()
    labels[1] = -100
    alone = reference_divergence(*inputs, temperature=2.0, token_weight=weight)
    both = reference_divergence(
        *inputs, temperature=2.0, token_weight=weight, hard_weight=hard, hard_labels=labels, hard_temperature=0.5
    )
    entropy = functional.cross_entropy(inputs[0] @ inputs[1].T / 0.5, labels, reduction="none")
    assert both.hard_loss is not None
    torch.testing.assert_close(both.hard_loss, entropy)
    torch.testing.assert_close(both.loss, alone.loss + (weight * hard * entropy).sum() / weight.sum())
