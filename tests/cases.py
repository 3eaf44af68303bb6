"""Inputs for the loss, and how results are compared: by ‖x - ref‖ / ‖ref‖ with the float64 full-logits reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdft_kernels import DivergenceOutput, fused_linear_divergence
from sdft_kernels.reference import reference_divergence

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")


#: Norms below this are taken for it: there float32 runs out of exponents, and with them of digits.
SMALLEST_NORM = 1e-30


def relative_error(actual: Tensor, expected: Tensor, least: float = 0) -> float:
    """‖actual - expected‖ / ‖expected‖, or over `least` where that is more."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return (actual - expected).norm().item() / max(expected.norm().item(), least, SMALLEST_NORM)


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
    device: str = "cpu",
    **options: Any,
) -> Case:
    """Fresh random inputs with logits of the spread that language models have, a few nats."""
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**62 if seed is None else seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

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


def every_option(tokens: int, vocab: int, device: str = "cpu") -> dict[str, Any]:
    """All of the loss's options at once; among the token weights are zeros, and most importance weights are near 1."""
    weight = torch.rand(tokens, device=device) + 0.1
    weight[1::3] = 0
    return {
        "teacher_bias": torch.randn(vocab, device=device),
        "beta": 0.3,
        "temperature": 1.3,
        "student_logit_scale": 1.2,
        "teacher_logit_scale": 0.8,
        "student_softcap": 9.0,
        "teacher_softcap": 12.0,
        "token_weight": weight,
        "labels": torch.randint(0, vocab, (tokens,), device=device),
        "old_logprobs": (2 * torch.randn(tokens, device=device) - 2 - math.log(vocab)).clamp(max=0),
        "importance_clip": 3.0,
    }


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


def reference_from_float32_logits(case: Case, upstream: Tensor | None = None) -> Result:
    """The float64 reference but for the two products that make logits, which are float32's, on the case's device."""
    with Float32Products(case.student_hidden.dtype):
        return reference(case, upstream)


class Float32Products(TorchFunctionMode):
    """Products of float64 numbers, which were of `dtype`, are those that a device makes of that, in float32; so is the
    tanh of a soft cap."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.matmul:  # which is what `@` calls
            return _Float32Product.apply(*args, self.dtype)
        if func is torch.tanh and self.dtype != torch.float64:
            return torch.tanh(args[0].float()).double()
        return func(*args, **(kwargs or {}))


class _Float32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(left, right)
        if dtype == torch.float64:
            return left @ right
        if left.is_cuda and dtype == torch.float32:
            return (left.float() @ right.float()).double()
        if left.is_cuda:
            return torch.mm(left.to(dtype), right.to(dtype), out_dtype=torch.float32).double()
        # Summed in order, as kernels do. torch's own product rounds less on some processors and as much on others.
        total = torch.zeros(left.shape[0], right.shape[1])
        for column, row in zip(left.to(dtype).float().T, right.to(dtype).float(), strict=True):
            total.addcmul_(column[:, None], row)
        return total.double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        return gradient @ right.T, left.T @ gradient, None


#: Nats of entropy and log-probability below which a token's error is taken relative to this. Both start from log Σ e,
#: where one e is the likeliest token's 1: however near certain a token is, float32 knows them to a last digit of 1 nat,
#: 1.2e-7, which is 2e-6 of so much.
LEAST_NATS = 0.06


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative error of every value and gradient that there is."""
    found = {}
    for name, value in actual.output._asdict().items():
        if value is not None:
            wanted = getattr(expected.output, name)
            in_digits_of_1 = name.endswith(("entropy", "logprob"))
            found[name] = relative_error(value, wanted, LEAST_NATS * len(wanted) ** 0.5 if in_digits_of_1 else 0)
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


def assert_as_exact_as_products(
    actual: Result,
    case: Case,
    least: float = 2e-6,
    beyond: float = 1.5,
    *,
    upstream: Tensor | None = None,
    gradients: float | None = None,
) -> None:
    """Values and gradients within `least`, or `beyond` times what float32 products alone make of the inputs.

    Where student and teacher share a head, what is expected is a difference of nearly equal terms, and some draws of
    the inputs leave float32 logits fewer digits than `least`, whatever is done with them afterwards. `gradients` stands
    for `least` where these are rounded to fewer digits.
    """
    expected = reference(case, upstream)
    from_products = errors(reference_from_float32_logits(case, upstream), expected)
    for name, error in errors(actual, expected).items():
        rounded = gradients if gradients is not None and name.startswith("grad") else least
        limit = max(rounded, beyond * from_products[name])
        assert error <= limit, (
            f"relative error of {name} is {error:.1e}, over {limit:.1e}; products alone {from_products[name]:.1e}"
        )
