"""The loss against its definition: values and gradients on random inputs and on real hidden states."""

import math
from typing import Any

import pytest
import torch

from sdft_kernels import FusedLinearDivergence, fused_linear_divergence, linear_token_stats
from sdft_kernels.backends import tiles
from sdft_kernels.backends.cpu import backend as compiled
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunk_loop import FLOAT16_BOUNDED_WEIGHT, FLOAT16_WEIGHT, token_weights
from sdft_kernels.divergences import Objective
from sdft_kernels.tokens import LiveTokens
from tests.cases import (
    DIVERGENCES,
    Case,
    Result,
    assert_as_exact_as_products,
    assert_close,
    errors,
    fused,
    random_case,
    reference,
    relative_error,
)

LIMITS = {
    # dtype: (values, gradients); low-precision gradients are rounded once on their way out
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2e-6, 5e-3),
    torch.float16: (2e-6, 1e-3),
}


@pytest.fixture(params=list(LIMITS), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_matches_the_float64_reference(backend: str, divergence: str, reduction: str, dtype: torch.dtype) -> None:
    case = random_case(
        dtype=dtype,
        bias=True,
        divergence=divergence,
        reduction=reduction,
        beta=0.3,
        temperature=1.3,
        student_logit_scale=1.2,
        teacher_logit_scale=0.8,
        student_softcap=9.0,
        teacher_softcap=12.0,
        token_weight=torch.rand(37),
        labels=torch.randint(0, 1003, (37,)),
        old_logprobs=-torch.rand(37) * 8,
        importance_clip=3.0,
    )
    # float16 cannot hold small gradients without the loss scaling that its users apply
    upstream = torch.randn(37) * 100 if reduction == "none" else torch.tensor(700.0)
    actual = fused(case, upstream, max_chunk_bytes=60_000, backend=backend)
    assert_close(actual, reference(case, upstream), *LIMITS[dtype])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shared_head", [True, False])
@pytest.mark.parametrize("trainable", [("student_hidden", "student_weight"), ("student_hidden",), ("student_weight",)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_each_set_of_trainable_inputs(
    backend: str, divergence: str, shared_head: bool, trainable: tuple[str, ...]
) -> None:
    case = random_case(shared_head=shared_head, divergence=divergence)
    case.trainable = trainable
    assert_as_exact_as_products(fused(case, backend=backend), case)


def test_nothing_trainable_gives_the_same_loss() -> None:
    case = random_case()
    case.trainable = ()
    assert not fused(case).output.loss.requires_grad
    assert_close(fused(case), reference(case), *LIMITS[torch.float32])
    case.trainable = ("student_hidden", "student_weight")
    with torch.no_grad():
        tensors = [t.requires_grad_() for t in (case.student_hidden, case.student_weight)]
        output = fused_linear_divergence(*tensors, case.teacher_hidden, case.teacher_weight)
    assert not output.loss.requires_grad


@pytest.mark.parametrize("chunk", [1, 2, 36, 37, 38])
def test_chunk_boundaries(chunk: int) -> None:
    case = random_case(divergence="jsd", bias=True)
    assert_close(fused(case, max_chunk_bytes=chunk * 5 * 1003), reference(case), *LIMITS[torch.float32])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(divergence: str, reduction: str) -> None:
    case = random_case(5, 4, 3, 11, torch.float64, bias=True)
    student = [t.requires_grad_() for t in (case.student_hidden, case.student_weight, case.student_bias)]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_linear_divergence(
            hidden,
            weight,
            case.teacher_hidden,
            case.teacher_weight,
            student_bias=bias,
            divergence=divergence,
            reduction=reduction,
            student_softcap=4.0,
            token_weight=torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]),
            max_chunk_bytes=300,
        ).loss

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_frozen_head_rescales_rows(dtype: torch.dtype, left_out: bool) -> None:
    """reduction="none" then needs no second pass: each token's gradient is multiplied by its upstream one."""
    weight = torch.rand(37)
    weight[:: 2 if left_out else 40] = 0 if left_out else 1
    case = random_case(dtype=dtype, reduction="none", token_weight=weight)
    case.trainable = ("student_hidden",)
    upstream = torch.randn(37) * 100
    assert_close(fused(case, upstream, max_chunk_bytes=60_000), reference(case, upstream), *LIMITS[dtype])


def test_per_token_values_do_not_depend_on_the_reduction() -> None:
    labels = torch.randint(0, 1003, (37,))
    case = random_case(labels=labels, hard_labels=labels, hard_weight=0.3, token_weight=torch.rand(37))
    outputs = [fused(case.with_options(reduction=r), torch.ones(37) if r == "none" else None) for r in ("mean", "none")]
    for mean, none in zip(outputs[0].output[1:], outputs[1].output[1:], strict=True):
        assert torch.equal(mean, none)


def test_a_token_of_weight_zero_contributes_nothing_whatever_it_holds() -> None:
    weight = torch.ones(37)
    weight[[0, 5, 36]] = 0
    clean = random_case(
        bias=True, token_weight=weight, labels=torch.randint(0, 1003, (37,)), old_logprobs=-torch.ones(37)
    )
    poisoned = random_case(bias=True)
    poisoned = clean.with_options(labels=clean.options["labels"].clone(), old_logprobs=-torch.ones(37))
    poisoned.student_hidden, poisoned.teacher_hidden = clean.student_hidden.clone(), clean.teacher_hidden.clone()
    dead = weight == 0
    poisoned.student_hidden[dead] = float("nan")
    poisoned.teacher_hidden[dead] = float("inf")
    poisoned.options["labels"][dead] = -100
    poisoned.options["old_logprobs"][dead] = float("nan")
    expected, actual = fused(clean), fused(poisoned)
    for name, value in actual.output._asdict().items():
        if value is None:
            continue
        assert torch.equal(value, getattr(expected.output, name)), name
        assert value.dim() == 0 or (value[dead] == 0).all(), name
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name
    assert (actual.gradients["student_hidden"][dead] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, torch.zeros(0)])
def test_no_tokens(reduction: str, weight: torch.Tensor | None) -> None:
    case = random_case(0, reduction=reduction, token_weight=weight, labels=torch.zeros(0, dtype=torch.int64))
    result = fused(case)
    assert result.output.loss.shape == ((0,) if reduction == "none" else ())
    assert result.output.loss.sum() == 0
    assert result.gradients["student_hidden"].shape == (0, 48)
    assert torch.equal(result.gradients["student_weight"], torch.zeros(1003, 48))


def test_all_weights_zero() -> None:
    result = fused(random_case(bias=True, token_weight=torch.zeros(37)))
    assert result.output.loss == 0
    for gradient in result.gradients.values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_same_student_and_teacher(divergence: str) -> None:
    case = random_case(shared_head=True, divergence=divergence)
    case.teacher_hidden = case.student_hidden.clone()
    result = fused(case)
    assert result.output.token_loss.abs().max() < 1e-6
    scale = fused(random_case(shared_head=True, divergence=divergence)).gradients["student_hidden"].norm()
    assert result.gradients["student_hidden"].norm() < 1e-6 * scale


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_extreme_logits_stay_finite_and_right(divergence: str, size: float, backend: str) -> None:
    """One-hot models, ties, and teacher probabilities that underflow to 0."""
    logits = torch.tensor(
        [
            [1.0, 0.0, 0.0, -1.0],
            [0.0, 0.0, 0.0, 0.0],
            [-1.0, 1.0, 1.0, 0.0],
            [1.0, -1.0, -1.0, -1.0],
            [-1.0, -1.0, 0.0, 1.0],
        ]
    )
    identity = torch.eye(4)
    case = random_case(divergence=divergence)
    case.student_hidden, case.student_weight = logits * size, identity
    case.teacher_hidden, case.teacher_weight = logits.flip(0) * size, identity
    actual, expected = fused(case, backend=backend), reference(case)
    assert_close(actual, expected, *LIMITS[torch.float32])
    for tensor in (*actual.output[:4], *actual.gradients.values()):
        assert tensor is None or tensor.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_mixture_that_is_nearly_the_teacher_stays_finite(backend: str) -> None:
    """With the largest β, and no token that both models know."""
    case = random_case(4, divergence="skew_reverse_kl", beta=0.999, backend=backend)
    case.student_hidden, case.student_weight = torch.eye(4) * 1e3, torch.eye(4)
    case.teacher_hidden, case.teacher_weight = torch.eye(4).flip(0) * 1e3, torch.eye(4)
    result = fused(case)
    assert relative_error(result.output.token_loss, torch.full((4,), -math.log(1e-3))) < 2e-6
    for gradient in result.gradients.values():
        assert gradient is None or (gradient.isfinite().all() and gradient.norm() < 1e-3)


@pytest.mark.parametrize(
    ("divergence", "largest"), [("reverse_kl", FLOAT16_WEIGHT), ("skew_reverse_kl", FLOAT16_BOUNDED_WEIGHT)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_float16_the_largest_weight_is_fixed_and_a_factor_says_what_it_was(
    reduction: str, divergence: str, largest: float
) -> None:
    """Else small weights, such as 1 / length, would make gradients of logits that float16 cannot hold."""
    given = torch.rand(9) / 8192
    dtypes = Dtypes.of(torch.float16, torch.float16, given.device)
    live, objective = LiveTokens(given, 9), Objective(divergence)
    weight, factor = token_weights(live, given, torch.zeros(9), reduction, dtypes, objective)
    assert weight.max() == largest
    torch.testing.assert_close(weight * factor, given / given.sum() if reduction == "mean" else given)
    case = random_case(9, dtype=torch.float16, token_weight=given, reduction=reduction, divergence=divergence)
    upstream = torch.rand(9) * 4096 if reduction == "none" else torch.tensor(4096.0)
    assert_close(fused(case, upstream), reference(case, upstream), *LIMITS[torch.float16])
    case.trainable = ("student_hidden",)
    assert_close(fused(case, upstream), reference(case, upstream), *LIMITS[torch.float16])


@pytest.mark.parametrize(
    ("divergence", "most", "log_ratio", "clip"),
    [
        ("reverse_kl", FLOAT16_WEIGHT, 6.0, None),
        ("reverse_kl", FLOAT16_WEIGHT, 13.0, None),
        ("reverse_kl", FLOAT16_WEIGHT, 13.0, 400.0),
        ("jsd", FLOAT16_BOUNDED_WEIGHT, 4.0, None),
        ("jsd", FLOAT16_BOUNDED_WEIGHT, 13.0, None),
        ("jsd", FLOAT16_BOUNDED_WEIGHT, 13.0, 60.0),
    ],
)
def test_in_float16_importance_weights_have_the_limit_that_is_documented(
    divergence: str, most: float, log_ratio: float, clip: float | None
) -> None:
    labels, upstream = torch.arange(9), torch.tensor(1 / 64)
    case = random_case(9, dtype=torch.float16, reduction="sum", labels=labels, divergence=divergence)
    logprob = fused(case).output.student_logprob
    assert logprob is not None
    case = case.with_options(old_logprobs=logprob - log_ratio, importance_clip=clip)
    found, expected = fused(case, upstream), reference(case, upstream)
    largest = expected.gradients["student_hidden"]
    assert largest is not None
    fits = bool(largest.abs().max() / upstream < 65504 / most)
    assert fits == (log_ratio < 7 or clip is not None)
    if fits:
        assert_close(found, expected, *LIMITS[torch.float16])
    else:
        assert found.gradients["student_hidden"].isinf().any()


def test_inputs_of_any_layout() -> None:
    case = random_case(20, 48, 48, 1003)
    tokens = torch.randn(40, 96)
    case.student_hidden = tokens[::2, ::2]
    case.student_weight = case.student_weight.T.contiguous().T
    case.teacher_hidden = torch.randn(1, 48).expand(20, 48)
    assert_close(fused(case), reference(case), *LIMITS[torch.float32])


@pytest.mark.parametrize(("student", "teacher", "vocab"), [(1003, 1019, None), (1019, 1003, None), (1003, 600, 512)])
def test_heads_of_different_sizes(student: int, teacher: int, vocab: int | None) -> None:
    case = random_case(vocab=max(student, teacher), vocab_size=vocab, bias=True)
    case.student_weight, case.student_bias = case.student_weight[:student], case.student_bias[:student]
    case.teacher_weight = case.teacher_weight[:teacher]
    if vocab is None:
        with pytest.warns(UserWarning, match="comparing the first 1003"):
            actual = fused(case)
    else:
        actual = fused(case)
    assert_close(actual, reference(case), *LIMITS[torch.float32])
    assert (actual.gradients["student_weight"][vocab or 1003 :] == 0).all()


def test_bfloat16_weight_gradient_accumulates_in_float32() -> None:
    """Many chunks add up without losing what a bfloat16 sum would."""
    case = random_case(512, vocab=64, dtype=torch.bfloat16, reduction="sum")
    actual = fused(case, max_chunk_bytes=64 * 5)
    assert errors(actual, reference(case))["grad of student_weight"] < 3e-3


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_takes_operands_in_its_dtype_and_returns_gradients_in_the_parameters(lower: torch.dtype) -> None:
    case = random_case(bias=True)
    case.student_hidden = case.student_hidden.to(lower)
    rounded = random_case(seed=0, bias=True)
    rounded.__dict__.update(case.__dict__)
    for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
        setattr(rounded, name, getattr(case, name).to(lower).float())
    with torch.autocast("cpu", lower):
        actual = fused(case, torch.tensor(100.0))
    assert actual.gradients["student_weight"].dtype == torch.float32
    assert actual.gradients["student_hidden"].dtype == lower
    expected = reference(rounded, torch.tensor(100.0))
    assert_close(actual, expected, 2e-6, 5e-3)
    assert relative_error(actual.gradients["student_weight"], expected.gradients["student_weight"]) < 2e-6


def test_the_module_is_the_function_with_its_settings_kept() -> None:
    case = random_case(labels=torch.randint(0, 1003, (37,)), old_logprobs=-torch.rand(37) * 8)
    criterion = FusedLinearDivergence("jsd", beta=0.2, temperature=1.5, importance_clip=2.0, reduction="sum")
    tensors = (case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight)
    actual = criterion(*tensors, **case.options)
    options = {"divergence": "jsd", "beta": 0.2, "temperature": 1.5, "importance_clip": 2.0, "reduction": "sum"}
    expected = fused_linear_divergence(*tensors, **case.options, **options)
    for name, value in actual._asdict().items():
        if value is None:
            continue
        assert torch.equal(value, getattr(expected, name)), name
    assert torch.equal(criterion(*tensors).token_loss, expected.token_loss)  # without old log-probs, nothing to clip
    assert "divergence='jsd', beta=0.2" in repr(criterion)
    with pytest.raises(ValueError, match=r"beta must lie between 0\.001 and 1 - 0\.001 for jsd, not be 1"):
        FusedLinearDivergence("jsd", beta=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_real_hidden_states(smollm2_hidden_states: tuple[torch.Tensor, ...], divergence: str, backend: str) -> None:
    """SmolLM2's own hidden states and head, in float32 and bfloat16.

    Its states are large and its logits small differences of them: a float32 product alone moves the gradient by
    about 5e-6. The loss may add no more than half of that.
    """
    student, teacher, head = smollm2_hidden_states
    case = random_case(1, divergence=divergence)
    case.student_hidden, case.teacher_hidden = student, teacher
    case.student_weight = case.teacher_weight = head
    actual = fused(case, backend=backend)
    assert_as_exact_as_products(actual, case)
    assert_close(actual, reference(case), 1e-5, 1e-5)

    case.student_hidden, case.teacher_hidden = student.bfloat16(), teacher.bfloat16()
    case.student_weight = case.teacher_weight = head.bfloat16()
    assert_close(fused(case, backend=backend), reference(case), 1e-5, 5e-3)


MASKS = {"both": (True, True), "student": (True, False), "teacher": (False, True)}


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masks", MASKS)
def test_entries_that_a_bias_masks(masks: str, divergence: str, backend: str) -> None:
    """Of a model's first entries; what both mask might as well not be there. All stays finite where one does.

    What the student masks is a constant: it takes no gradient, and none comes through it.
    """
    case, student, teacher = masked_case(*MASKS[masks], divergence=divergence, backend=backend)
    result = fused(case)
    for tensor in (*result.output[:4], *result.gradients.values()):
        assert tensor is None or tensor.isfinite().all()
    if masks != "teacher":
        assert not result.gradients["student_bias"][:9].any() and not result.gradients["student_weight"][:9].any()
    del case.options["backend"]
    # Where the teacher alone masks what is the student's likeliest, scores are relative to one 100 nats away, and
    # rounded as that is: the last digit of 100 is 7.6e-6.
    assert_close(result, reference(case), 3e-6, 1e-5 if masks == "teacher" else 3e-6)
    if masks == "both":
        rest = case.with_options(labels=case.options["labels"] - 9, teacher_bias=teacher[9:])
        rest.student_weight, rest.teacher_weight = case.student_weight[9:], case.teacher_weight[9:]
        rest.student_bias = student[9:]
        expected = reference(rest)
        assert_close(Result(result.output, {}), expected, 3e-6, 0)
        gradient = result.gradients["student_weight"]
        assert relative_error(gradient[9:], expected.gradients["student_weight"]) <= 3e-6


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_bias_masks_under_a_negative_scale_too(softcap: float | None, backend: str) -> None:
    scales = {"student_logit_scale": -1.3, "teacher_logit_scale": -0.7}
    case, *_ = masked_case(True, True, backend=backend, **scales, student_softcap=softcap, teacher_softcap=softcap)
    result = fused(case)
    assert not result.gradients["student_bias"][:9].any()
    del case.options["backend"]
    assert_close(result, reference(case), 3e-6, 3e-6)
    stats = linear_token_stats(
        case.student_hidden,
        case.student_weight,
        torch.zeros(5, dtype=torch.int64),
        bias=case.student_bias,
        logit_scale=-1.3,
        softcap=softcap,
        backend=backend,
    )
    assert stats.logprob is not None and (stats.logprob < (-25.0 if softcap else -1e29)).all()


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_the_largest_soft_cap_caps_nothing(backend: str) -> None:
    """Of a million temperatures, here of 0.7: larger ones are refused."""
    case, *_ = masked_case(True, True, backend=backend, divergence="forward_kl")
    plain = fused(case)
    capped = case.with_options(student_softcap=6e5, teacher_softcap=6e5)
    assert_close(fused(capped), plain, 3e-6, 3e-6)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_negative_weights_are_taken_as_they_are(backend: str) -> None:
    case = random_case(5, token_weight=torch.tensor([1.0, -0.5, 0.0, 2.0, -0.25]))
    expected = reference(case)
    case.options["backend"] = backend
    assert_close(fused(case), expected, 3e-6, 3e-6)


def masked_case(masked: bool, masked_by_teacher: bool, **options: Any) -> tuple[Case, torch.Tensor, torch.Tensor]:
    student, teacher = torch.randn(2, 1003).unbind()
    student[:9] = -torch.inf if masked else 0
    teacher[:9] = torch.finfo(torch.float32).min if masked_by_teacher else 0
    case = random_case(5, labels=torch.randint(9, 1003, (5,)), teacher_bias=teacher, temperature=0.7, **options)
    case.student_bias, case.trainable = student, (*case.trainable, "student_bias")
    return case, student, teacher


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("divergence", ["jsd", "skew_reverse_kl", "skew_forward_kl"])
@pytest.mark.parametrize("gap", [3.0, 10.0, 20.0])
def test_a_mixture_where_p_is_far_above_q_keeps_its_gradient(gap: float, divergence: str, backend: str) -> None:
    """Each model knows half of the tokens: the mixture is one of the models, and nearly the same wherever p is."""
    case = random_case(37, divergence=divergence)
    mine = torch.arange(1003) < 500
    case.options["teacher_bias"], case.student_bias = gap * (~mine).float(), gap * mine.float()
    assert_as_exact_as_products(fused(case, backend=backend), case, beyond=2)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("divergence", ["jsd", "skew_reverse_kl", "skew_forward_kl"])
@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_a_mixture_that_is_nearly_one_of_the_models(beta: float, divergence: str, backend: str) -> None:
    """Some values are of beta's square, and sums of terms of beta, of which float32 knows 6e-8: 6e-5 of the value in
    one token, and a sixth of that in the norm of 37 whose errors differ in sign."""
    case = random_case(divergence=divergence, beta=beta)
    assert_close(fused(case, backend=backend), reference(case), 1e-5, 2e-6)


@pytest.mark.parametrize("weight", [torch.full((4,), 1e-50, dtype=torch.float64), torch.full((4,), 2e38)])
def test_token_weights_whose_sum_float32_cannot_hold(weight: torch.Tensor, dtype: torch.dtype) -> None:
    case = random_case(4, dtype=dtype)
    plain = fused(case).output.loss.item()
    assert abs(fused(case.with_options(token_weight=weight)).output.loss.item() / plain - 1) < 1e-6


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"teacher_logit_scale": 1.1}])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_a_tile_of_masked_entries_alone(
    backend: str, divergence: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what is masked is rounded, an exponential of the rounding would be infinite."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 1)
    monkeypatch.setattr(compiled, "TILE_BYTES", 1)
    case = random_case(5, vocab=500, bias=True, divergence=divergence, **options)
    assert case.student_bias is not None
    case.student_bias[100:400] = -torch.inf
    case.options["teacher_bias"] = torch.where(case.student_bias == -torch.inf, -torch.inf, 0)
    assert_close(fused(case, backend=backend), reference(case), 3e-6, 3e-6)
