"""Property-based: whatever the shapes and values, the loss is the reference's, finite where the reference is."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import (
    DIVERGENCES,
    SMALLEST_NORM,
    Case,
    Result,
    errors,
    fused,
    reference,
    reference_from_float32_logits,
)

#: A float32 result may be off by this, or by as much again as float32 products alone make of the same inputs: where
#: the inputs cancel, no float32 product has the digits.
LIMIT = 2e-6


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes around every boundary, layouts, weights of zero, and logits from ordinary to ±1e4."""
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 13]))
    vocab = draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 257, 1000]))
    size = draw(st.sampled_from([1, 2, 5, 16]))
    shared = draw(st.booleans())
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 100.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student_hidden = normal(tokens, 2 * size)[:, ::2] if draw(st.booleans()) else normal(tokens, size)
    teacher_hidden = normal(1, size).expand(tokens, size) if draw(st.booleans()) else normal(tokens, size)
    student_weight = normal(size, vocab).T if draw(st.booleans()) else normal(vocab, size)
    student_weight = student_weight * (spread / size**0.5)
    teacher_weight = student_weight if shared else normal(vocab, size) * (spread / size**0.5)
    weight = None
    if draw(st.booleans()):
        weight = (torch.rand(tokens, generator=generator) > 0.4).float() * torch.rand(tokens, generator=generator)
    options = {
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "beta": draw(st.sampled_from([0.1, 0.5, 0.9])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "token_weight": weight,
    }
    return Case(student_hidden, student_weight, teacher_hidden, teacher_weight, None, options)


def assert_as_exact_as_float32_allows(case: Case, actual: Result) -> None:
    expected = reference(case)
    for tensor in (*actual.output[:4], *actual.gradients.values()):
        assert tensor is None or tensor.isfinite().all()
    from_products = errors(reference_from_float32_logits(case), expected)
    tokens = max(1, case.student_hidden.shape[0])
    # Where student and teacher agree, what is expected is the difference of terms near 1, which float32 knows to
    # about 1e-7 each: in nats for values, and times what a logit's gradient is multiplied with for gradients. Values
    # are differences of logits as well, which products round.
    models = ((case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight))
    largest = max((hidden @ weight.T).abs().max().item() if len(hidden) else 0.0 for hidden, weight in models)
    noise = 1e-6 + torch.finfo(torch.float32).eps * largest
    known_to = {
        "grad of student_hidden": 1e-6 * case.student_weight.norm().item(),
        "grad of student_weight": 1e-6 * case.student_hidden.norm().item(),
    }
    wanted = {**expected.output._asdict(), **{f"grad of {name}": g for name, g in expected.gradients.items()}}
    for name, error in errors(actual, expected).items():
        floor = known_to.get(name, noise) * tokens**0.5 / max(SMALLEST_NORM, wanted[name].detach().norm().item())
        limit = max(LIMIT, 2 * from_products[name], floor)
        assert error <= limit, (
            f"{name}: {error:.1e}, over {limit:.1e}; float32 products alone {from_products[name]:.1e}"
        )


@settings(max_examples=150, deadline=None)
@given(case=cases(), chunk=st.sampled_from([None, 1, 2, 3, 12, 13, 14]))
def test_torch_backend(case: Case, chunk: int | None) -> None:
    budget = None if chunk is None else chunk * 6 * case.student_weight.shape[0]
    upstream = torch.ones(case.student_hidden.shape[0]) if case.options["reduction"] == "none" else None
    assert_as_exact_as_float32_allows(case, fused(case, upstream, max_chunk_bytes=budget))


@settings(max_examples=24, deadline=None)
@given(case=cases())
def test_triton_backend(case: Case) -> None:
    upstream = torch.ones(case.student_hidden.shape[0]) if case.options["reduction"] == "none" else None
    assert_as_exact_as_float32_allows(case, fused(case, upstream, backend="triton"))


@st.composite
def large_logits(draw: st.DrawFn) -> Case:
    """Up to ±1e5 under factors that are no powers of two, with a bias, whose gradient is that of the logits."""
    tokens, vocab = draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 2, 17, 257]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    case = Case(normal(tokens, 3), normal(vocab, 3), normal(tokens, 3), normal(vocab, 3), normal(vocab))
    case.student_hidden *= draw(st.sampled_from([1.0, 30.0, 1e3, 1e4]))
    case.trainable = ("student_bias",)
    return case.with_options(
        divergence=draw(st.sampled_from(DIVERGENCES)),
        temperature=draw(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
        student_logit_scale=draw(st.sampled_from([1.0, -0.3, 1.1])),
        teacher_softcap=draw(st.sampled_from([None, 30.0])),
        reduction="sum",
    )


@settings(max_examples=100, deadline=None)
@given(case=large_logits(), backend=st.sampled_from(["auto", "torch", "triton"]))
def test_the_gradient_of_logits_adds_up_to_nothing(case: Case, backend: str) -> None:
    """But for a last digit of both models' probabilities."""
    gradient = fused(case, backend=backend).gradients["student_bias"]
    assert gradient is not None
    slope = abs(case.options["student_logit_scale"]) / case.options["temperature"] * len(case.student_hidden)
    limit = LIMIT * gradient.norm(1).item() + 2 * torch.finfo(torch.float32).eps * slope
    assert abs(gradient.double().sum().item()) <= limit
