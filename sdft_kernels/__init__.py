"""Exact distillation losses straight from hidden states and LM heads, without the logits."""

from sdft_kernels.cross_entropy import fused_linear_cross_entropy
from sdft_kernels.fused_linear import FusedLinearDivergence, fused_linear_divergence
from sdft_kernels.outputs import CrossEntropyOutput, DivergenceOutput, TopkDivergenceOutput
from sdft_kernels.scoring import TokenStats, linear_token_stats
from sdft_kernels.top_scoring import TopkLogprobs, linear_topk_logprobs
from sdft_kernels.topk import fused_linear_topk_divergence

__all__ = [
    "CrossEntropyOutput",
    "DivergenceOutput",
    "FusedLinearDivergence",
    "TokenStats",
    "TopkDivergenceOutput",
    "TopkLogprobs",
    "fused_linear_cross_entropy",
    "fused_linear_divergence",
    "fused_linear_topk_divergence",
    "linear_token_stats",
    "linear_topk_logprobs",
]
