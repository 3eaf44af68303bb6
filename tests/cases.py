"""Inputs for the loss, and how results are compared: by ‖x - ref‖ / ‖ref‖ with the float64 full-logits reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import DivergenceOutput, fused_linear_divergence
from sdft_kernels.reference import divergence_of_logits, reference_divergence

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")


#: Norms below this are taken for it: there float32 runs out of exponents, and with them of digits.
SMALLEST_NORM = 1e-30


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return (actual - expected).norm().item() / max(expected.norm().item(), SMALLEST_NORM)


@dataclass
class Case:
    """Arguments of the loss; `options` are its keywords. Tensors under `trainable` take gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trainable: tuple[str, ...] = ("student_hidden", "student_weight")

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})


def random_case(
    tokens: int = 37,
    student_size: int = 48,
    teacher_size: int = 40,
    vocab: int = 1003,
    dtype: torch.dtype = torch.float32,
    *,
    shared_head: bool = False,
    bias: bool = False,
    seed: int | None = None,
    **options: Any,
) -> Case:
    """Fresh random inputs with logits of the spread that language models have, a few nats."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**62 if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if shared_head:
        teacher_size = student_size
    student_weight = (normal(vocab, student_size) * 2 / student_size**0.5).to(dtype)
    student_hidden = normal(tokens, student_size).to(dtype)
    if shared_head:
        teacher_weight = student_weight
        teacher_hidden = (student_hidden.float() + 0.5 * normal(tokens, student_size)).to(dtype)
    else:
        teacher_weight = (normal(vocab, teacher_size) * 2 / teacher_size**0.5).to(dtype)
        teacher_hidden = normal(tokens, teacher_size).to(dtype)
    student_bias = normal(vocab).to(dtype) if bias else None
    trainable = ("student_hidden", "student_weight", *(("student_bias",) if bias else ()))
    return Case(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, options, trainable)


@dataclass
class Result:
    """Everything the loss gave, gradients by argument name."""

    output: DivergenceOutput
    gradients: dict[str, Tensor | None]


def _run(function: Any, case: Case, dtype: torch.dtype | None, upstream: Tensor | None, **extra: Any) -> Result:
    def prepared(name: str) -> Tensor | None:
        tensor = getattr(case, name)
        if tensor is None:
            return None
        tensor = tensor.detach() if dtype is None else tensor.detach().to(dtype)
        return tensor.requires_grad_(name in case.trainable)

    names = ("student_hidden", "student_weight", "student_bias")
    student = {name: prepared(name) for name in names}
    output = function(
        student["student_hidden"],
        student["student_weight"],
        prepared("teacher_hidden"),
        prepared("teacher_weight"),
        student_bias=student["student_bias"],
        **case.options,
        **extra,
    )
    if case.trainable:
        gradient = torch.ones_like(output.loss) if upstream is None else upstream.to(output.loss.dtype)
        output.loss.backward(gradient)
    return Result(output, {name: None if tensor is None else tensor.grad for name, tensor in student.items()})


def fused(case: Case, upstream: Tensor | None = None, **extra: Any) -> Result:
    """The loss under test and its gradients."""
    return _run(fused_linear_divergence, case, None, upstream, **extra)


def reference(case: Case, upstream: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Result:
    """The same from full logits in float64, from the same input values."""
    return _run(reference_divergence, case, dtype, upstream)


def reference_from_float32_logits(case: Case) -> Result:
    """The float64 reference but for the two products that make logits, which are float32's."""
    student = (case.student_hidden @ case.student_weight.T).double().requires_grad_()
    teacher = (case.teacher_hidden @ case.teacher_weight.T).double()
    output = divergence_of_logits(student, teacher, **case.options)
    output.loss.sum().backward()
    assert student.grad is not None
    gradients = {
        "student_hidden": student.grad @ case.student_weight.double(),
        "student_weight": student.grad.T @ case.student_hidden.double(),
        "student_bias": None,
    }
    return Result(output, {name: gradient if name in case.trainable else None for name, gradient in gradients.items()})


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative error of every value and gradient that there is."""
    found = {
        name: relative_error(value, getattr(expected.output, name))
        for name, value in actual.output._asdict().items()
        if value is not None
    }
    for name, gradient in actual.gradients.items():
        wanted = expected.gradients[name]
        assert (gradient is None) == (wanted is None), f"{name}: gradient {gradient}, reference {wanted}"
        if gradient is not None and wanted is not None:
            found[f"grad of {name}"] = relative_error(gradient, wanted)
    return found


def assert_close(actual: Result, expected: Result, values: float, gradients: float) -> None:
    """Values and gradients within these relative errors, and finite."""
    for name, error in errors(actual, expected).items():
        limit = gradients if name.startswith("grad") else values
        assert error <= limit, f"relative error of {name} is {error:.1e}, over {limit:.0e}"


def assert_as_exact_as_products(actual: Result, case: Case, least: float = 2e-6, beyond: float = 1.5) -> None:
    """Float32 values and gradients within `least`, or `beyond` times what float32 products alone make of the inputs.

    Where student and teacher share a head, what is expected is a difference of nearly equal terms, and some draws of
    the inputs leave float32 logits fewer digits than `least`, whatever is done with them afterwards.
    """
    expected = reference(case)
    from_products = errors(reference_from_float32_logits(case), expected)
    for name, error in errors(actual, expected).items():
        limit = max(least, beyond * from_products[name])
        assert error <= limit, (
            f"relative error of {name} is {error:.1e}, over {limit:.1e}; products alone {from_products[name]:.1e}"
        )
