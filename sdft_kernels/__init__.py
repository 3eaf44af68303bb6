"""Exact distillation losses straight from hidden states and LM heads, without the logits."""

from sdft_kernels.fused_linear import fused_linear_divergence
from sdft_kernels.outputs import DivergenceOutput

__all__ = ["DivergenceOutput", "fused_linear_divergence"]
