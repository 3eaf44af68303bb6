"""The checks of the public functions' arguments, but for the labels' range, which takes their values (chunk_loop.py).

An error is one sentence that names the argument, what it was and what it may be.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sdft_kernels import callers, checks
from sdft_kernels._compat import interpreted, stands_for_others, under_grad, under_vmap_with_gradient
from sdft_kernels.backends.cpu import library
from sdft_kernels.backends.select import BACKENDS
from sdft_kernels.divergences import DIVERGENCES, LogitOptions, is_mixture
from sdft_kernels.options import CrossEntropyInputs, CrossEntropyOptions, LossInputs, LossOptions, TopkInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def check(given: LossInputs, options: LossOptions) -> torch.dtype:
    """Raises if the tensors are invalid, alone or with `options`; call `check_options` first.

    Returns the dtype of the products' operands.
    """
    head("student", given.student_hidden, given.student_weight, given.student_bias)
    head("teacher", given.teacher_hidden, given.teacher_weight, given.teacher_bias)
    tokens, device = given.student_hidden.shape[0], given.student_hidden.device
    if given.teacher_hidden.shape[0] != tokens:
        raise ValueError(
            f"teacher_hidden holds {given.teacher_hidden.shape[0]} tokens and student_hidden {tokens}: both must score "
            "the same tokens"
        )
    per_token("token_weight", given.token_weight, tokens, device, floating=True)
    per_token("labels", given.labels, tokens, device, floating=False)
    per_token("old_logprobs", given.old_logprobs, tokens, device, floating=True)
    per_token("hard_labels", given.hard_labels, tokens, device, floating=False)
    per_token("hard_weight", given.hard_weight, tokens, device, floating=True)
    same_device("teacher_hidden", given.teacher_hidden, device)
    differentiated_by_backward(given)
    importance_weights(given, options.importance_clip)
    shared_vocabulary(given.student_weight.shape[0], given.teacher_weight.shape[0], options.vocab_size)
    dtype = products_dtype(
        device,
        student_hidden=given.student_hidden,
        student_weight=given.student_weight,
        teacher_hidden=given.teacher_hidden,
        teacher_weight=given.teacher_weight,
    )
    supported_backend(options.backend, device, dtype)
    return dtype


def check_options(options: LossOptions) -> LossOptions:
    """Raises if no tensors could make these settings right. Returns them with Python's own numbers."""
    checks.one_of("divergence", options.divergence, DIVERGENCES)
    checks.one_of("reduction", options.reduction, REDUCTIONS)
    available_backend(options.backend)
    student = logit_options("student", options.student_logit_scale, options.student_softcap, options.temperature)
    teacher = logit_options("teacher", options.teacher_logit_scale, options.teacher_softcap, options.temperature)
    clip, hard_temperature = options.importance_clip, options.hard_temperature
    if hard_temperature is not None:
        hard_temperature = checks.positive("hard_temperature", hard_temperature)
        checks.quotient("student_logit_scale", student.scale, "hard_temperature", hard_temperature)
        checks.quotient("student_softcap", student.softcap or hard_temperature, "hard_temperature", hard_temperature)
    return replace(
        options,
        beta=teachers_share(options.beta, options.divergence),
        temperature=student.temperature,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        hard_temperature=hard_temperature,
        importance_clip=None if clip is None else checks.positive("importance_clip", clip),
        vocab_size=checks.count("vocab_size", options.vocab_size, "tokens"),
        max_chunk_bytes=checks.count("max_chunk_bytes", options.max_chunk_bytes, "bytes"),
    )


def hard_weight(value: Any, labels: Tensor | None) -> Tensor | None:
    """The hard term's weight of each token, if there are hard labels."""
    if value is None:
        value = 0.0 if labels is None else 1.0
    given = isinstance(value, Tensor) or checks.finite("hard_weight", value) != 0
    if labels is None and given:
        raise ValueError("hard_weight needs hard_labels: the hard term is the cross-entropy with these")
    if not isinstance(labels, Tensor) or isinstance(value, Tensor):
        return value if isinstance(value, Tensor) else None
    return labels.new_full(labels.shape, value, dtype=torch.float32)


def check_cross_entropy(given: CrossEntropyInputs, options: CrossEntropyOptions) -> torch.dtype:
    """As `check`; `token_weight` may still be None."""
    head("", given.hidden, given.weight, given.bias)
    tokens, device = given.hidden.shape[0], given.hidden.device
    if given.labels is None:
        raise TypeError("labels must be a tensor of shape (N,), not NoneType")
    per_token("labels", given.labels, tokens, device, floating=False)
    per_token("token_weight", given.token_weight, tokens, device, floating=True)
    differentiated_by_backward(given)
    shared_vocabulary(given.weight.shape[0], given.weight.shape[0], options.vocab_size)
    dtype = products_dtype(device, hidden=given.hidden, weight=given.weight)
    supported_backend(options.backend, device, dtype)
    return dtype


def check_cross_entropy_options(options: CrossEntropyOptions) -> CrossEntropyOptions:
    """As `check_options`."""
    checks.one_of("reduction", options.reduction, REDUCTIONS)
    available_backend(options.backend)
    logits = logit_options("", options.logit_scale, options.softcap, options.temperature)
    return replace(
        options,
        temperature=logits.temperature,
        logit_scale=logits.scale,
        softcap=logits.softcap,
        label_smoothing=checks.between("label_smoothing", options.label_smoothing, 0, 1),
        z_loss=checks.between("z_loss", options.z_loss, 0, checks.LARGEST_FLOAT32),
        entropy_weight=checks.finite("entropy_weight", options.entropy_weight),
        vocab_size=checks.count("vocab_size", options.vocab_size, "tokens"),
        max_chunk_bytes=checks.count("max_chunk_bytes", options.max_chunk_bytes, "bytes"),
    )


def importance_weights(given: LossInputs | TopkInputs, importance_clip: float | None) -> None:
    """Checks that what importance weights are made of is there."""
    if given.old_logprobs is not None and given.labels is None:
        raise ValueError("old_logprobs needs labels: importance weights compare log-probabilities of sampled tokens")
    if importance_clip is not None and given.old_logprobs is None:
        raise ValueError("importance_clip needs old_logprobs: without them there are no importance weights to clip")


def logit_options(side: str, scale: Any, softcap: Any, temperature: Any) -> LogitOptions:
    """Options of one model's logits, named `{side}_logit_scale` and so on."""
    prefix = f"{side}_" if side else ""
    name, cap_name = f"{prefix}logit_scale", f"{prefix}softcap"
    scale, temperature = checks.nonzero(name, scale), checks.positive("temperature", temperature)
    checks.quotient(name, scale, "temperature", temperature)
    if softcap is not None:
        softcap = checks.positive(cap_name, softcap)
        checks.quotient(name, scale, cap_name, softcap)
        checks.quotient(cap_name, softcap, "temperature", temperature)
    return LogitOptions(scale, softcap, temperature)


def teachers_share(beta: Any, divergence: str) -> float:
    """The teacher's share of the mixture; a share too where there is no mixture."""
    beta = checks.number("beta", beta)
    if is_mixture(divergence) and not LEAST_SHARE <= beta <= 1 - LEAST_SHARE:
        raise ValueError(
            f"beta must lie between {LEAST_SHARE:g} and 1 - {LEAST_SHARE:g} for {divergence}, not be {beta!r}: nearer "
            "the ends float32 hardly tells the mixture from one of the models; for the plain divergences ask for "
            "'forward_kl' or 'reverse_kl' by name"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie between 0 and 1, not be {beta!r}")
    return beta


def head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states (N, H), head (V, H) and bias (V,) of one model, named `{side}_hidden` and so on."""
    prefix = f"{side}_" if side else ""
    for name, tensor, shape in ((f"{prefix}hidden", hidden, "(N, H)"), (f"{prefix}weight", weight, "(V, H)")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of shape {shape}, not {type(tensor).__name__}")
        readable(name, tensor)
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {dtype_name(tensor)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}weight has {weight.shape[1]} columns and {prefix}hidden {hidden.shape[1]}: both must be the "
            "hidden size"
        )
    if hidden.shape[1] == 0:
        raise ValueError(f"{prefix}hidden has no columns: the hidden size must be at least 1")
    if weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight has no rows: the vocabulary must hold at least one token")
    same_device(f"{prefix}weight", weight, hidden.device)
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{prefix}bias must be a tensor of shape (V,) or None, not {type(bias).__name__}")
    readable(f"{prefix}bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
    if bias.dtype not in DTYPES:
        raise TypeError(f"{prefix}bias must be float32, bfloat16, float16 or float64, not {dtype_name(bias)}")
    same_device(f"{prefix}bias", bias, hidden.device)


def readable(name: str, tensor: Tensor) -> None:
    """Refuses a tensor without rows of values of its own, and a tangent, which would be lost in silence."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise TypeError(f"{name} must hold values, not be a {type(tensor).__name__}: run its module once before")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not a nested one: take its values first (.values())")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not one of layout {tensor.layout}: take its .to_dense()")
    if stands_for_others(type(tensor)):
        raise TypeError(
            f"{name} must be a plain tensor, not a {type(tensor).__name__}, which stands for others: take its values "
            "first (.full_tensor() of a DTensor)"
        )
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent, and there is no forward-mode derivative here: gradients come by backward alone"
        )


def differentiated_by_backward(given: LossInputs | CrossEntropyInputs | TopkInputs) -> None:
    """Refuses tensors that torch.func is to differentiate, of which `requires_grad` says nothing; gradients reach the
    first three."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for place, field in enumerate(fields(given)):
        name, tensor = field.name, getattr(given, field.name)
        if tensor is not None and under_grad(tensor):
            raise NotImplementedError(
                f"{name} is under torch.func.grad, vjp or jacrev, and there is no derivative for these here: gradients "
                "come by backward alone"
            )
        if tensor is not None and place < 3 and under_vmap_with_gradient(tensor):
            raise NotImplementedError(
                f"{name} takes a gradient and is under torch.func.vmap, where none comes here: call the loss for each "
                "instead, or once for all tokens"
            )


def per_token(name: str, tensor: Tensor | None, tokens: int, device: torch.device, *, floating: bool) -> None:
    """A vector over the tokens, or None."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (N,) or None, not {type(tensor).__name__}")
    readable(name, tensor)
    if tensor.dim() != 1 or tensor.shape[0] != tokens:
        raise ValueError(f"{name} must have shape ({tokens},), one entry a token, not {tuple(tensor.shape)}")
    if floating and not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {dtype_name(tensor)}")
    if not floating and tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, not {dtype_name(tensor)}")
    same_device(name, tensor, device)


def same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the hidden states on {device}: they must share a device")


def available_backend(backend: str) -> None:
    """Checks the name, and that what it asks for is installed."""
    checks.one_of("backend", backend, BACKENDS)
    if backend == "compiled" and library.find() is None:
        raise ValueError(
            "backend is 'compiled', and the kernels were not built when sdft-kernels was installed, or cannot be "
            "used: install it again where there is a C compiler, or ask for 'torch'"
        )
    if backend == "triton":
        try:
            interpreted()
        except ImportError:
            raise ValueError(
                "backend is 'triton', which is not installed: `pip install triton`, or ask for 'torch'"
            ) from None


def supported_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Checks that an available back-end takes the tensors."""
    if backend == "compiled" and (device.type != "cpu" or dtype == torch.float64):
        raise ValueError(
            f"backend is 'compiled', which computes in float32 on a CPU, and the products' operands are {dtype} on "
            f"{device}: ask for 'auto' or 'torch'"
        )
    if backend != "triton":
        return
    by_interpreter = interpreted()
    if device.type != "cuda" and not by_interpreter:
        raise ValueError(
            f"backend is 'triton', which needs CUDA tensors (or TRITON_INTERPRET=1), and the hidden states are on "
            f"{device}: ask for 'auto' or 'torch'"
        )
    if dtype == torch.float64 and not by_interpreter:
        raise ValueError("backend is 'triton', whose kernels compute in float32, and the products are in float64")


def shared_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """The number of vocabulary entries that are compared: the first ones of both heads. `vocab_size` is a count."""
    smaller = min(student, teacher)
    if vocab_size is not None:
        if vocab_size > smaller:
            raise ValueError(f"vocab_size must lie in [1, {smaller}], the smaller head's size, not {vocab_size}")
        return vocab_size
    if student == teacher:
        return student
    if abs(student - teacher) > max(PADDING_TOKENS, PADDING_SHARE * smaller):
        raise ValueError(
            f"student_weight has {student} rows and teacher_weight {teacher}, more than padding explains: name the "
            "shared prefix with vocab_size"
        )
    if not torch.compiler.is_compiling():
        callers.warn(
            f"the heads have {student} and {teacher} entries; comparing the first {smaller}, as for padded heads "
            "(vocab_size names the shared prefix)"
        )
    return smaller


#: Devices on which there is an autocast. Asked once: torch 2.11's compiler cannot trace the question.
WITH_AUTOCAST = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(name)
)


def products_dtype(device: torch.device, **tensors: Tensor) -> torch.dtype:
    """The dtype in which matrix products take their operands: autocast's where it is on, else the inputs' one."""
    if device.type in WITH_AUTOCAST and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1:
        listed = ", ".join(f"{name} {dtype_name(tensor)}" for name, tensor in tensors.items())
        raise TypeError(f"hidden states and heads must share a dtype outside torch.autocast, not: {listed}")
    return dtypes.pop()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


#: Heads that differ by no more than this many entries, or this share of the smaller, are taken to be padded.
PADDING_TOKENS = 1024
PADDING_SHARE = 0.01

#: The least share of a model in a mixture. Some divergences are as small as the square of this share, and are sums of
#: terms as large as the share, which float32 rounds by 6e-8 of their size: a share of 1e-3 leaves an error of 3e-6.
LEAST_SHARE = 1e-3
