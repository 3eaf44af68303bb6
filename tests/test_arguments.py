"""Every wrong argument gets one sentence that names it, what it was and what it may be."""

from typing import Any

import pytest
import torch

from sdft_kernels import fused_linear_divergence
from sdft_kernels.arguments import supported_backend


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "student_hidden": torch.randn(5, 8),
        "student_weight": torch.randn(50, 8),
        "teacher_hidden": torch.randn(5, 6),
        "teacher_weight": torch.randn(50, 6),
    }
    arguments.update(changes)
    positional = [
        arguments.pop(name) for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    ]
    fused_linear_divergence(*positional, **arguments)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, r"student_hidden must be a tensor of shape \(N, H\), not list", {"student_hidden": [[1.0]]}),
        (ValueError, r"student_hidden must have shape \(N, H\), not \(5,\)", {"student_hidden": torch.randn(5)}),
        (ValueError, r"teacher_weight must have shape \(V, H\), not \(1, 50, 6\)", {"teacher_weight": torch.randn(1, 50, 6)}),
        (TypeError, "student_weight must be float32, bfloat16, float16 or float64, not int64", {"student_weight": torch.ones(50, 8).long()}),
        (ValueError, "student_weight has 9 columns and student_hidden 8", {"student_weight": torch.randn(50, 9)}),
        (ValueError, "teacher_weight has no rows", {"teacher_weight": torch.randn(0, 6)}),
        (ValueError, "teacher_hidden holds 4 tokens and student_hidden 5", {"teacher_hidden": torch.randn(4, 6)}),
        (ValueError, "teacher_hidden is on meta", {"teacher_hidden": torch.randn(5, 6, device="meta"), "teacher_weight": torch.randn(50, 6, device="meta")}),
        (ValueError, "student_weight is on meta", {"student_weight": torch.randn(50, 8, device="meta")}),
        (TypeError, "student_bias must be a tensor", {"student_bias": 1.0}),
        (ValueError, r"student_bias must have shape \(50,\), not \(49,\)", {"student_bias": torch.randn(49)}),
        (TypeError, "teacher_bias must be float32", {"teacher_bias": torch.ones(50).long()}),
        (ValueError, r"token_weight must have shape \(5,\), one entry a token, not \(6,\)", {"token_weight": torch.ones(6)}),
        (TypeError, "token_weight must be floating point, not bool", {"token_weight": torch.ones(5).bool()}),
        (TypeError, "token_weight must be a tensor", {"token_weight": [1.0] * 5}),
        (TypeError, "labels must be int64, not int32", {"labels": torch.ones(5).int()}),
        (ValueError, r"labels run from -1 to 0, but must lie in \[0, 50\)", {"labels": torch.tensor([0, 0, -1, 0, 0])}),
        (ValueError, r"labels run from 0 to 50, but must lie in \[0, 50\)", {"labels": torch.tensor([0, 0, 50, 0, 0])}),
        (ValueError, "old_logprobs needs labels", {"old_logprobs": torch.zeros(5)}),
        (ValueError, "importance_clip needs old_logprobs", {"importance_clip": 2.0}),
        (ValueError, "importance_clip must be positive and finite, not 0.0", {"importance_clip": 0.0, "labels": torch.zeros(5).long(), "old_logprobs": torch.zeros(5)}),
        (ValueError, "divergence must be one of 'reverse_kl', .*, not 'kl'", {"divergence": "kl"}),
        (ValueError, "reduction must be one of 'mean', 'sum', 'none', not 'batchmean'", {"reduction": "batchmean"}),
        (ValueError, "backend must be one of 'auto', 'torch', 'compiled', 'triton', not 'cuda'", {"backend": "cuda"}),
        (ValueError, "beta must lie between 0.001 and 1 - 0.001 for jsd, not be 0", {"divergence": "jsd", "beta": 0}),
        (ValueError, "beta must lie between 0.001 and 1 - 0.001 for skew_forward_kl, not be nan", {"divergence": "skew_forward_kl", "beta": NAN}),
        (TypeError, "beta must be a number, not str", {"divergence": "jsd", "beta": "half"}),
        (ValueError, "temperature must be positive and finite, not nan", {"temperature": NAN}),
        (ValueError, "temperature must be positive and finite, not 0", {"temperature": 0}),
        (ValueError, "temperature must be positive and finite, not inf", {"temperature": INFINITY}),
        (TypeError, "temperature must be a number, not NoneType", {"temperature": None}),
        (ValueError, "student_logit_scale must be finite and not 0, not 0", {"student_logit_scale": 0}),
        (ValueError, "teacher_logit_scale must be finite and not 0, not nan", {"teacher_logit_scale": NAN}),
        (ValueError, "student_softcap must be positive and finite, not -1.0", {"student_softcap": -1.0}),
        (ValueError, "teacher_softcap must be positive and finite, not 0.0", {"teacher_softcap": 0.0}),
        (ValueError, "max_chunk_bytes must be positive, not 0", {"max_chunk_bytes": 0}),
        (TypeError, "max_chunk_bytes must be a number of bytes or None, not float", {"max_chunk_bytes": 1e9}),
        (ValueError, "student_weight has 50 rows and teacher_weight 5000, more than padding explains", {"teacher_weight": torch.randn(5000, 6)}),
        (ValueError, r"vocab_size must lie in \[1, 50\], the smaller head's size, not 51", {"vocab_size": 51}),
        (TypeError, "vocab_size must be a number of tokens or None, not float", {"vocab_size": 50.0}),
        (TypeError, "must share a dtype outside torch.autocast, not: student_hidden bfloat16, student_weight float32", {"student_hidden": torch.randn(5, 8).bfloat16()}),
    ],
)  # fmt: skip
def test_wrong_arguments(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_triton_backend_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"backend is 'triton', which needs CUDA tensors .* are on cpu"):
        call(backend="triton")
    with pytest.raises(ValueError, match="whose kernels compute in float32, and the products are in float64"):
        supported_backend("triton", torch.device("cuda"), torch.float64)


def test_right_arguments_pass() -> None:
    call(labels=torch.zeros(5, dtype=torch.int64), old_logprobs=torch.zeros(5), importance_clip=2, temperature=2)


def test_the_warning_of_padded_heads_names_the_callers_line() -> None:
    hidden = torch.ones(2, 8)
    with pytest.warns(UserWarning, match="comparing the first 50") as warned:
        fused_linear_divergence(hidden, torch.ones(50, 8), hidden, torch.ones(60, 8))
    assert warned[0].filename == __file__
