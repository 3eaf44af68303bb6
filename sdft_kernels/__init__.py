"""Exact distillation losses straight from hidden states and LM heads, without the logits."""

from sdft_kernels.cross_entropy import fused_linear_cross_entropy
from sdft_kernels.fused_linear import FusedLinearDivergence, fused_linear_divergence
from sdft_kernels.outputs import CrossEntropyOutput, DivergenceOutput
from sdft_kernels.scoring import TokenStats, linear_token_stats

__all__ = [
    "CrossEntropyOutput",
    "DivergenceOutput",
    "FusedLinearDivergence",
    "TokenStats",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "linear_token_stats",
]
