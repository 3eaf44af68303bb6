"""The Triton row operations, run by Triton's interpreter, against the float64 reference."""

from typing import Any

import pytest
import torch

from sdft_kernels import chunk_loop, chunking, linear_token_stats
from sdft_kernels.backends import products
from sdft_kernels.backends.gpu import backend as triton_backend
from sdft_kernels.backends.gpu import divergence as triton_divergence
from sdft_kernels.backends.gpu import scaling as triton_scaling
from sdft_kernels.backends.gpu.divergence import BLOCK, split_rows
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.tokens import TokenRows
from tests.cases import (
    DIVERGENCES,
    Case,
    Result,
    assert_as_exact_as_products,
    assert_close,
    fused,
    random_case,
    reference,
    relative_error,
)


def watched(access: Any, touched: list[str]) -> Any:
    """An access of Triton's interpreter that is noted."""

    def noted(*arguments: Any) -> Any:
        touched.append(access.__name__)
        return access(*arguments)

    return noted


def interpreted(case: Case, upstream: torch.Tensor | None = None, **extra: int) -> Result:
    return fused(case, upstream, backend="triton", **extra)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_the_float64_reference(divergence: str, reduction: str) -> None:
    case = random_case(
        9,
        vocab=5003,
        bias=True,
        teacher_bias=torch.randn(5003),
        divergence=divergence,
        reduction=reduction,
        beta=0.3,
        temperature=1.3,
        student_logit_scale=1.2,
        teacher_logit_scale=0.8,
        student_softcap=9.0,
        teacher_softcap=12.0,
        token_weight=torch.tensor([1.0, 0.0, 0.3, 2.0, 0.0, 1.0, 1.0, 0.1, 1.0]),
        labels=torch.randint(0, 5003, (9,)),
        old_logprobs=-torch.rand(9) * 8,
        importance_clip=3.0,
    )
    upstream = torch.randn(9) if reduction == "none" else None
    assert_close(interpreted(case, upstream, max_chunk_bytes=100_000), reference(case, upstream), 3e-6, 3e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_options(divergence: str, dtype: torch.dtype) -> None:
    case = random_case(5, vocab=2 * BLOCK + 17, dtype=dtype, shared_head=True, divergence=divergence)
    if dtype == torch.float32:
        assert_as_exact_as_products(interpreted(case), case, least=3e-6)
    else:
        assert_close(interpreted(case), reference(case), 3e-6, 5e-3)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1])
def test_vocabularies_around_the_block(vocab: int) -> None:
    """Of so many tokens, for models of two entries may agree on a few, and leave differences without digits."""
    case = random_case(16, vocab=vocab, divergence="jsd")
    assert_close(interpreted(case), reference(case), 3e-6, 3e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence: str) -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 1.0, 0.0], [1.0, -1.0, -1.0, -1.0]])
    case = random_case(4, divergence=divergence)
    for size in (1.0, 1e2, 1e4):
        case.student_hidden, case.student_weight = logits * size, torch.eye(4)
        case.teacher_hidden, case.teacher_weight = logits.flip(0) * size, torch.eye(4)
        assert_close(interpreted(case), reference(case), 3e-6, 3e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_student_and_teacher(divergence: str) -> None:
    case = random_case(4, vocab=BLOCK + 5, shared_head=True, divergence=divergence)
    case.teacher_hidden = case.student_hidden.clone()
    result = interpreted(case)
    assert result.output.token_loss.abs().max() < 1e-6
    assert result.gradients["student_hidden"].norm() < 1e-6


def test_every_number_of_splits_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(2, vocab=5 * BLOCK + 3, divergence="reverse_kl")
    expected = reference(case)
    for splits in (1, 2, 4):
        monkeypatch.setattr(triton_divergence, "split_rows", lambda tokens, vocab, splits=splits: splits)
        assert_close(interpreted(case), expected, 3e-6, 3e-6)


def test_rows_are_split_only_as_far_as_they_have_blocks() -> None:
    assert split_rows(64, 152_000) * 64 >= 132 * 4
    assert split_rows(1, 10 * BLOCK) == 8
    assert split_rows(1, BLOCK) == 1
    assert split_rows(4096, 152_000) == 1


def test_what_lies_in_the_padding_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_logits = triton_backend.empty_logits

    def poisoned(like: torch.Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
        workspace = empty_logits(like, tokens, vocab, dtype)
        workspace.as_strided((tokens, workspace.stride(0)), (workspace.stride(0), 1)).fill_(float("nan"))
        return workspace

    def poisoned_bias(
        bias: torch.Tensor | None, vocab: int, wide: torch.dtype, options: LogitOptions
    ) -> torch.Tensor | None:
        if bias is None:
            return None
        return torch.nn.functional.pad(bias[:vocab].to(wide), (0, -vocab % 16), value=float("nan"))[:vocab]

    monkeypatch.setattr(triton_backend, "empty_logits", poisoned)
    monkeypatch.setattr(chunk_loop, "_finite_bias", poisoned_bias)
    case = random_case(3, vocab=BLOCK + 5, divergence="jsd", bias=True)
    assert_close(interpreted(case), reference(case), 3e-6, 3e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("block", "chunk_bytes"), [(512, None), (512, 200_000), (16, None), (16, 1003 * (2 * 24 + 8 * 16))]
)
def test_a_head_gradient_in_the_heads_own_bfloat16(
    monkeypatch: pytest.MonkeyPatch, backend: str, block: int, chunk_bytes: int | None
) -> None:
    """As on an NVIDIA device, with its products of bfloat16 that have float32 sums done in float32 here."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden.float(), weight.float().T, out=out)

    def add(gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool) -> None:
        kinds[total.shape[1] > 1].add(total.dtype)
        whole = gradient.float().T @ hidden.float()
        total.copy_(whole if first else whole + total)

    for module in (chunking, triton_backend):
        monkeypatch.setattr(module, "BLOCK_TOKENS", block)
    monkeypatch.setitem(chunking.TILE_TOKENS, "cuda", 8)
    kinds: dict[bool, set[torch.dtype]] = {True: set(), False: set()}  # of the head's gradient and of the bias's
    monkeypatch.setattr(products, "gradient_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(products, "logits", logits)
    monkeypatch.setattr(products, "add_weight_gradient", add)
    case = random_case(40, vocab=1003, dtype=torch.bfloat16, bias=True)
    output = fused(case, torch.tensor(0.37), backend=backend, max_chunk_bytes=chunk_bytes)
    # Triton's interpreter cuts the digits off that a device rounds.
    assert_close(output, reference(case, torch.tensor(0.37)), 3e-6, 2**-7 if backend == "triton" else 5e-3)
    if backend == "triton":
        assert kinds[True] == {torch.bfloat16 if chunk_bytes is None else torch.float32}
        assert kinds[False] == {torch.float32}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_keeps_its_digits_over_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch, divergence: str) -> None:
    """As on an NVIDIA device, where gradients of logits are float16 too: there most are under its smallest normal
    number, unless all are larger by a factor that is taken back at the end."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden.float(), weight.float().T, out=out)

    def add(gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, *, first: bool) -> None:
        assert gradient.dtype == torch.float16 and first
        torch.mm(gradient.float().T, hidden.float(), out=total)

    monkeypatch.setattr(products, "gradient_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(products, "logits", logits)
    monkeypatch.setattr(products, "add_weight_gradient", add)
    case = random_case(1, vocab=50_257, dtype=torch.float16, divergence=divergence)
    case.trainable = ("student_weight",)
    scaled = torch.tensor(1024.0)  # as a GradScaler has it: else what is returned is too small for float16
    found, expected = (run(case, scaled).gradients["student_weight"] for run in (interpreted, reference))
    assert found is not None and expected is not None and relative_error(found, expected) <= 2**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 15, triton_scaling.BLOCK, 2 * triton_scaling.BLOCK + 3])
def test_scaling_rounds_once(monkeypatch: pytest.MonkeyPatch, count: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(triton_scaling, "PROGRAMS", 2)  # so that one takes more than one block
    values = torch.randn(count).to(dtype)
    expected = (values.float() * 0.37).to(dtype)
    triton_scaling.scale(values, torch.tensor([0.37]))
    # Triton's interpreter cuts bfloat16's last digits off instead of rounding them.
    assert relative_error(values, expected) <= (2**-7 if dtype == torch.bfloat16 else 0)


def test_scaling_by_1_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    touched: list[str] = []
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, name, watched(getattr(interpreter.InterpreterBuilder, name), touched)
        )
    values = torch.randn(9)
    before = values.clone()
    triton_scaling.scale(values, torch.ones(1))
    assert torch.equal(values, before) and not touched[1:]  # the factor itself is the one load
    triton_scaling.scale(values, torch.full((1,), 2.0))
    assert torch.equal(values, 2 * before) and len(touched) == 4


def test_vectors_over_tokens_that_are_not_contiguous() -> None:
    case = random_case(6, vocab=300, labels=torch.randint(0, 300, (6,)), old_logprobs=-torch.rand(6) * 8)
    expected = reference(case)
    stats = linear_token_stats(case.student_hidden, case.student_weight, case.options["labels"])
    for name in ("labels", "old_logprobs"):
        case.options[name] = torch.stack((case.options[name], torch.zeros_like(case.options[name])), 1)[:, 0]
    assert_close(interpreted(case), expected, 3e-6, 3e-6)
    strided = linear_token_stats(case.student_hidden, case.student_weight, case.options["labels"], backend="triton")
    assert relative_error(strided.logprob, stats.logprob) <= 3e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_rows_past_two_to_the_31st_element(divergence: str) -> None:
    """Three rows 2³⁰ elements apart, in memory that is only mapped: pages that are not touched do not exist."""
    apart, vocab = 2**30, 40

    def spaced(values: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(2 * apart + 2 * BLOCK).as_strided((3, vocab), (apart, 1))
        return rows.copy_(values)

    logits = torch.randn(2, 3, vocab)
    results = []
    for student, teacher in ((spaced(logits[0]), spaced(logits[1])), _padded(logits)):
        rows = TokenRows(torch.ones(3), None, None, *torch.empty(3, 3).unbind(), None, None)
        triton_divergence.process_rows(student, teacher, rows, Objective(divergence), student)
        results.append((rows.loss, student.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def _padded(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same logits in rows as the backend lays them out."""
    student, teacher = (
        triton_backend.empty_logits(logits, logits.shape[1], logits.shape[2], torch.float32).copy_(part)
        for part in logits
    )
    return student, teacher
