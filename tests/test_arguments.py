"""Every wrong argument gets one sentence that names it, what it was and what it may be."""

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from sdft_kernels import FusedLinearDivergence, fused_linear_divergence, linear_token_stats
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
        (ValueError, "importance_clip must be positive and finite in float32, not 0.0", {"importance_clip": 0.0, "labels": torch.zeros(5).long(), "old_logprobs": torch.zeros(5)}),
        (ValueError, "divergence must be one of 'reverse_kl', .*, not 'kl'", {"divergence": "kl"}),
        (ValueError, "reduction must be one of 'mean', 'sum', 'none', not 'batchmean'", {"reduction": "batchmean"}),
        (ValueError, "backend must be one of 'auto', 'torch', 'compiled', 'triton', not 'cuda'", {"backend": "cuda"}),
        (ValueError, "beta must lie between 0.001 and 1 - 0.001 for jsd, not be 0", {"divergence": "jsd", "beta": 0}),
        (ValueError, "beta must lie between 0.001 and 1 - 0.001 for skew_forward_kl, not be nan", {"divergence": "skew_forward_kl", "beta": NAN}),
        (TypeError, "beta must be a number, not str", {"divergence": "jsd", "beta": "half"}),
        (TypeError, "beta must be a number, not NoneType", {"beta": None}),
        (TypeError, "beta must be a number, not Tensor", {"divergence": "forward_kl", "beta": torch.tensor(0.3)}),
        (ValueError, "beta must lie between 0 and 1, not be nan", {"beta": NAN}),
        (ValueError, "temperature must be a number that float64 holds, not an integer beyond it", {"temperature": 10**400}),
        (ValueError, "temperature must be positive and finite in float32, not nan", {"temperature": NAN}),
        (ValueError, "temperature must be positive and finite in float32, not 0", {"temperature": 0}),
        (ValueError, "temperature must be positive and finite in float32, not inf", {"temperature": INFINITY}),
        (TypeError, "temperature must be a number, not NoneType", {"temperature": None}),
        (ValueError, "student_logit_scale must be finite and not 0, not 0", {"student_logit_scale": 0}),
        (ValueError, "teacher_logit_scale must be finite and not 0, not nan", {"teacher_logit_scale": NAN}),
        (ValueError, "student_softcap must be positive and finite in float32, not -1.0", {"student_softcap": -1.0}),
        (ValueError, r"student_logit_scale / student_softcap must lie between 1e-27 and 1e\+06 but for its sign, not be 1.0 / 3e\+38", {"student_softcap": 3e38}),
        (ValueError, r"teacher_softcap / temperature must lie between 1e-27 and 1e\+06 but for its sign, not be 2000000.0 / 1.0", {"teacher_softcap": 2e6}),
        (ValueError, r"importance_clip must be positive and finite in float32, not 1e\+39", {"importance_clip": 1e39, "labels": torch.zeros(5).long(), "old_logprobs": torch.zeros(5)}),
        (ValueError, r"max_chunk_bytes must be positive and under 2\^63, not 9223372036854775808", {"max_chunk_bytes": 2**63}),
        (ValueError, "teacher_softcap must be positive and finite in float32, not 0.0", {"teacher_softcap": 0.0}),
        (ValueError, r"max_chunk_bytes must be positive and under 2\^63, not 0", {"max_chunk_bytes": 0}),
        (TypeError, "max_chunk_bytes must be a number of bytes or None, not float", {"max_chunk_bytes": 1e9}),
        (ValueError, "student_weight has 50 rows and teacher_weight 5000, more than padding explains", {"teacher_weight": torch.randn(5000, 6)}),
        (ValueError, r"vocab_size must lie in \[1, 50\], the smaller head's size, not 51", {"vocab_size": 51}),
        (TypeError, "vocab_size must be a number of tokens or None, not float", {"vocab_size": 50.0}),
        (TypeError, "student_weight must hold values, not be a UninitializedParameter: run its module once", {"student_weight": torch.nn.LazyLinear(50).weight}),
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


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (TypeError, "beta must be a number, not str", {"beta": "x"}),
        (TypeError, "vocab_size must be a number of tokens or None, not str", {"vocab_size": "x"}),
        (TypeError, "vocab_size must be a number of tokens or None, not bool", {"vocab_size": True}),
        (ValueError, r"vocab_size must be positive and under 2\^63, not -1", {"vocab_size": -1}),
        (ValueError, "backend is 'triton', which is not installed", {"backend": "triton"}),
    ],
)
def test_the_module_refuses_what_no_tensors_make_right(
    error: type[Exception], message: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(error, match=message):
        FusedLinearDivergence(**settings)


def test_right_arguments_pass() -> None:
    call(labels=torch.zeros(5, dtype=torch.int64), old_logprobs=torch.zeros(5), importance_clip=2, temperature=2)


def test_numpys_numbers_are_numbers() -> None:
    criterion = FusedLinearDivergence("jsd", beta=np.float32(0.5), vocab_size=np.int64(50), max_chunk_bytes=np.int32(9))
    assert [type(value) for value in asdict(criterion.options).values()].count(float) == 5
    criterion(torch.randn(5, 8), torch.randn(60, 8), torch.randn(5, 6), torch.randn(50, 6))
    linear_token_stats(torch.randn(5, 8), torch.randn(50, 8), temperature=np.float16(0.5), vocab_size=np.uint8(20))


@pytest.mark.parametrize("criterion", [fused_linear_divergence, FusedLinearDivergence()])
def test_the_warning_of_padded_heads_names_the_callers_line(criterion: Any) -> None:
    hidden = torch.ones(2, 8)
    with pytest.warns(UserWarning, match="comparing the first 50") as warned:
        criterion(hidden, torch.ones(50, 8), hidden, torch.ones(60, 8))
    assert warned[0].filename == __file__
