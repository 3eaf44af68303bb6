"""The row operations of `torch_backend`, as Triton kernels: same names, same arguments."""

from sdft_kernels.triton_divergence import process_rows
from sdft_kernels.triton_scoring import score_rows

__all__ = ["process_rows", "score_rows"]
