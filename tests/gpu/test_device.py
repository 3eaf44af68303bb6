"""What a GPU adds to the loss: streams, graphs, other devices, waits of the host, and whether results repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sdft_kernels import fused_linear_divergence, linear_token_stats
from tests.cases import (
    DIVERGENCES,
    Case,
    Result,
    assert_close,
    every_option,
    fused,
    random_case,
    reference,
    relative_error,
)

TOKENS, VOCAB = 300, 5003
KINDS = ("trainable", "frozen", "all options", "none", "no gradient")


def case_of(kind: str, device: str, divergence: str = "reverse_kl", dtype: torch.dtype = torch.bfloat16) -> Case:
    options = every_option(TOKENS, VOCAB, device) if kind == "all options" else {}
    if kind == "none":
        options["reduction"] = "none"
    case = random_case(
        TOKENS,
        vocab=VOCAB,
        dtype=dtype,
        bias=kind == "all options",
        device=device,
        divergence=divergence,
        **options,
    )
    if kind == "frozen":
        case.trainable = ("student_hidden",)
    if kind == "no gradient":
        case.trainable = ()
    return case


def upstream_of(kind: str, device: str) -> torch.Tensor | None:
    return torch.randn(TOKENS, device=device) if kind == "none" else None


def values(result: Result) -> list[torch.Tensor]:
    found = [*result.output, *result.gradients.values()]
    return [value.detach() for value in found if value is not None]


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits(kind: str, divergence: str, cuda: str) -> None:
    case, upstream = case_of(kind, cuda, divergence), upstream_of(kind, cuda)
    chunks = {"max_chunk_bytes": 10 * VOCAB * 128}
    fused(case, upstream, **chunks)  # compiles, and lets the tuner measure
    with waits_are_errors():
        result = fused(case, upstream, **chunks)
    assert_close(result, reference(case, upstream), 5e-6, 5e-3)


def test_scoring_never_waits(cuda: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = random_case(TOKENS, vocab=VOCAB, dtype=dtype, device=cuda)
        labels = torch.randint(0, VOCAB, (TOKENS,), device=cuda)
        before = linear_token_stats(case.student_hidden, case.student_weight, labels)
        with waits_are_errors():
            stats = linear_token_stats(case.student_hidden, case.student_weight, labels)
        assert stats.logprob is not None and before.logprob is not None
        assert torch.equal(stats.logprob, before.logprob)


def test_a_wait_would_be_noticed(cuda: str) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), waits_are_errors():
        torch.ones(1, device=cuda).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_replays_with_other_values(kind: str, cuda: str) -> None:
    case, other = case_of(kind, cuda), case_of(kind, cuda)
    upstream = upstream_of(kind, cuda)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "student_bias")
    tensors = {name: getattr(case, name) for name in names if getattr(case, name) is not None}
    for name in tensors:
        tensors[name].requires_grad_(name in case.trainable)

    def call() -> list[torch.Tensor]:
        for tensor in tensors.values():
            tensor.grad = None
        out = fused_linear_divergence(**tensors, **case.options)
        if case.trainable:
            out.loss.backward(upstream)
        return [value for value in out if value is not None]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(getattr(other, name))
        for name, value in case.options.items():
            if isinstance(value, torch.Tensor):
                value.copy_(other.options[name])
    graph.replay()
    wanted = fused(other, upstream)
    for one, expected in zip(out, (v for v in wanted.output if v is not None), strict=True):
        assert relative_error(one, expected) <= 1e-6
    for name in case.trainable:
        expected_gradient = wanted.gradients[name]
        assert expected_gradient is not None and relative_error(tensors[name].grad, expected_gradient) <= 1e-3


def test_two_streams_at_once(cuda: str) -> None:
    cases = [case_of(kind, cuda) for kind in ("trainable", "all options")]
    wanted = [reference(case) for case in cases]
    for case in cases:
        fused(case)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(fused(case, max_chunk_bytes=10 * VOCAB * 128))
        torch.cuda.synchronize()
        for result, expected in zip(results, wanted, strict=True):
            assert_close(result, expected, 5e-6, 5e-3)


def test_a_device_that_is_not_the_current_one(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for kind in KINDS:
        case, upstream = case_of(kind, "cuda:1"), upstream_of(kind, "cuda:1")
        with torch.cuda.device(0):
            result = fused(case, upstream)
        assert result.output.loss.device == torch.device("cuda:1")
        assert_close(result, reference(case, upstream), 5e-6, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Products are of operands in its dtype; all else, the head's gradient among it, stays float32."""
    case = random_case(40, vocab=1003, device=device)
    rounded = random_case(40, vocab=1003, device=device)
    for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
        setattr(rounded, name, getattr(case, name).to(dtype))
    with torch.autocast(device, dtype):
        result = fused(case, backend="triton")
    assert_close(result, reference(rounded), 5e-6, 2**-7 if device == "cpu" else 5e-3)
    assert all(gradient is None or gradient.dtype == torch.float32 for gradient in result.gradients.values())


def test_activation_checkpointing(device: str) -> None:
    case = random_case(40, vocab=1003, device=device)
    wanted = reference(case)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        out = fused_linear_divergence(
            hidden.tanh(), weight, case.teacher_hidden.tanh(), case.teacher_weight, backend="triton"
        )
        return out.loss

    checkpoint(loss, hidden, use_reentrant=False).backward()
    found = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    loss(hidden).backward()
    assert wanted.output.loss.isfinite()
    for one, other in zip(found, (hidden.grad, weight.grad), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("kind", ["trainable", "all options", "none"])
def test_compiled(kind: str, cuda: str) -> None:
    """`torch.compile` around it, with work of its own before and after."""
    case, upstream = case_of(kind, cuda, dtype=torch.float32), upstream_of(kind, cuda)

    def step(call: Callable[..., Any], hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
        out = call(hidden, weight)
        (out * (1 if upstream is None else upstream)).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        return [out.detach(), hidden.grad, weight.grad]

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = fused_linear_divergence(
            hidden * 1.5,
            weight,
            case.teacher_hidden,
            case.teacher_weight,
            student_bias=case.student_bias,
            **case.options,
        )
        return out.loss * 2

    compiled = step(torch.compile(plain, fullgraph=True), case.student_hidden, case.student_weight)
    for one, other in zip(compiled, step(plain, case.student_hidden, case.student_weight), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_gives_the_same_bits(kind: str, divergence: str, device: str) -> None:
    case, upstream = case_of(kind, device, divergence), upstream_of(kind, device)
    if device == "cpu":
        case = random_case(3, vocab=300, device=device, divergence=divergence)
        upstream = None
    first = values(fused(case, upstream, backend="triton"))
    for _ in range(3):
        assert all(map(torch.equal, first, values(fused(case, upstream, backend="triton"))))
