"""The divergence from a teacher who gives K log-probabilities of each token."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ledger import IMPLEMENTATIONS, TRAFFIC
from benchmarks.recorder import record
from sdft_kernels import (
    TopkDivergenceOutput,
    fused_linear_divergence,
    fused_linear_topk_divergence,
    linear_topk_logprobs,
    topk_arguments,
)
from sdft_kernels.backends.gpu import top
from sdft_kernels.coarse import LEAST_TAIL
from sdft_kernels.reference import divergence_per_token, reference_divergence, reference_topk_divergence
from sdft_kernels.topk import fused_linear_topk_divergence_op
from tests.cases import DIVERGENCES, LEAST_NATS, Float32Products, relative_error
from tests.test_operator import NoWaiting, as_on_a_device

BACKENDS = ("torch", "compiled", "triton")
TAILS = ("bucket", "dropped")


def inputs(tokens: int, vocab: int, k: int, dtype: torch.dtype = torch.float32, size: int = 48) -> dict[str, Tensor]:
    """Hidden states, head, bias, and a teacher's K likeliest entries in any order."""
    logprobs, ids = (2 * torch.randn(tokens, vocab)).log_softmax(-1).topk(k)
    order = torch.rand(tokens, k).argsort(1)
    return {
        "hidden": torch.randn(tokens, size).to(dtype),
        "weight": (torch.randn(vocab, size) * 2 / size**0.5).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "teacher_ids": ids.gather(1, order),
        "teacher_logprobs": logprobs.gather(1, order),
    }


def every_option(given: dict[str, Tensor]) -> dict[str, Any]:
    """All at once; some tokens have fewer entries, or weight 0, and some labels are among the entries."""
    tokens, k = given["teacher_ids"].shape
    weight, labels = torch.rand(tokens) + 0.1, torch.randint(0, len(given["weight"]), (tokens,))
    weight[1::5] = 0
    labels[::2] = given["teacher_ids"][::2, 0]
    if k > 1:
        given["teacher_logprobs"][::3, 1:2], given["teacher_ids"][::3, 1:2] = -torch.inf, -7
    return {
        "beta": 0.3,
        "temperature": 1.3,
        "logit_scale": 1.2,
        "softcap": 9.0,
        "token_weight": weight,
        "labels": labels,
        "old_logprobs": (2 * torch.randn(tokens) - 2 - math.log(len(given["weight"]))).clamp(max=0),
        "importance_clip": 3.0,
    }


def run(function: Any, given: dict[str, Tensor], upstream: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Every value, and the gradients of what requires one."""
    trained = {name: given[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    out: TopkDivergenceOutput = function(**{**given, **trained}, **options)
    out.loss.backward(torch.ones_like(out.loss) if upstream is None else upstream.to(out.loss.dtype))
    values = {name: value for name, value in out._asdict().items() if value is not None}
    return values | {f"grad of {name}": tensor.grad for name, tensor in trained.items() if tensor.grad is not None}


def wide(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def assert_matches(given: dict[str, Tensor], options: dict[str, Any], limit: float = 3e-6, **of: Any) -> None:
    """Beside float64 full logits: within `limit`, or 1.5 times what float32 products alone make of the inputs, which
    leave some draws fewer digits; logarithms as exact as float32 near 1."""
    upstream = torch.randn(len(given["hidden"])) if options.get("reduction") == "none" else torch.tensor(0.7)
    if given["hidden"].dtype == torch.float16:  # a factor as a GradScaler's: small returned gradients have few digits
        upstream = 4096 * upstream
    expected = run(reference_topk_divergence, wide(given), upstream, **options)
    with Float32Products(given["hidden"].dtype):
        from_products = run(reference_topk_divergence, wide(given), upstream, **options)
    actual = run(fused_linear_topk_divergence, given, upstream, **options, **of)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if value.isinf().all() and torch.equal(value.double(), expected[name]):
            continue
        least = LEAST_NATS * len(given["hidden"]) ** 0.5 if name.endswith(("entropy", "logprob")) else 0
        error = relative_error(value, expected[name], least)
        most = max(
            limit if name.startswith("grad") else 3e-6, 1.5 * relative_error(from_products[name], expected[name])
        )
        assert error <= most, (name, error, most)


def test_the_definition_is_a_divergence_of_few_outcomes() -> None:
    """Written out here: the entries and the rest, or the entries alone."""
    given, v = wide(inputs(6, 11, 3)), 11
    log_p = (given["hidden"] @ given["weight"].T + given["bias"]).log_softmax(-1)
    for divergence in DIVERGENCES:
        for tail in TAILS:
            found = reference_topk_divergence(**given, divergence=divergence, tail=tail).token_loss
            for row in range(6):
                ids, q = given["teacher_ids"][row], given["teacher_logprobs"][row].exp()
                p = log_p[row, ids].exp()
                if tail == "bucket":
                    rest = [entry for entry in range(v) if entry not in ids.tolist()]
                    p = torch.cat((p, log_p[row, rest].exp().sum()[None]))
                    q = torch.cat((q, 1 - q.sum()[None]))
                p, q = p / p.sum(), q / q.sum()
                expected = divergence_per_token(p.log()[None], q.log()[None], divergence)
                torch.testing.assert_close(found[row : row + 1], expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_float64_reference(backend: str, divergence: str) -> None:
    shapes = ((5, 1003, 1), (33, 1008, 7), (70, 333, 40)) if backend != "triton" else ((5, 1003, 1), (6, 1008, 7))
    for number, (tokens, vocab, k) in enumerate(shapes):
        for tail in TAILS if k > 1 else TAILS[:1]:  # a single outcome has no divergence
            plain: dict[str, Any] = {
                "divergence": divergence,
                "tail": tail,
                "reduction": ("mean", "none", "sum")[number],
            }
            of = {"backend": backend, "max_chunk_bytes": 60_000}
            given = inputs(tokens, vocab, k)
            assert_matches(given, plain, **of)
            assert_matches(given, {**every_option(given), **plain}, **of)


@pytest.mark.parametrize("scale", [1.0, -1.1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_entry_given_is_the_whole_divergence(backend: str, scale: float) -> None:
    """K = V: nothing is left for the bucket, whatever the sum's rounding leaves."""
    given = inputs(5, 333, 333)
    teacher = torch.zeros(5, 333).scatter(1, given["teacher_ids"], given["teacher_logprobs"])
    for divergence in DIVERGENCES:
        options: dict[str, Any] = {"divergence": divergence, "logit_scale": scale}
        assert_matches(given, options, backend=backend)
        found = fused_linear_topk_divergence(**given, backend=backend, **options)
        whole = reference_divergence(
            given["hidden"].double(),
            given["weight"].double(),
            teacher.double(),
            torch.eye(333).double(),
            student_bias=given["bias"].double(),
            divergence=divergence,
            student_logit_scale=scale,
        )
        assert relative_error(found.token_loss, whole.token_loss) < 3e-6
        assert (found.student_tail_logprob == -torch.inf).all()


def test_it_is_at_most_the_whole_divergence_and_grows_with_k() -> None:
    given = inputs(9, 333, 333)
    given["teacher_logprobs"], order = given["teacher_logprobs"].sort(descending=True)
    given["teacher_ids"] = given["teacher_ids"].gather(1, order)
    for divergence in DIVERGENCES:
        losses = [
            fused_linear_topk_divergence(
                **given | {name: given[name][:, :k] for name in ("teacher_ids", "teacher_logprobs")},
                divergence=divergence,
            ).token_loss
            for k in (1, 2, 10, 100, 333)
        ]
        assert all((less <= more + 1e-6).all() for less, more in pairwise(losses))


def test_where_the_rest_is_in_proportion_it_is_the_whole_divergence() -> None:
    hidden, weight = torch.randn(5, 16).double(), torch.randn(90, 16).double()
    z = hidden @ weight.T
    ids = z.topk(4).indices
    logprobs = z.scatter_add(1, ids, torch.randn(5, 4).double()).log_softmax(-1)
    given = (hidden, weight, ids, logprobs.gather(1, ids))
    for divergence in DIVERGENCES:
        found = fused_linear_topk_divergence(*given, divergence=divergence).token_loss
        assert relative_error(found, divergence_per_token(z.log_softmax(-1), logprobs, divergence)) < 1e-12


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_whose_entries_hold_nearly_everything(backend: str, divergence: str) -> None:
    """Down to a rest of 1e-12, whose logarithm 1 - Σ p would not know in float32; the teacher's is 1e-3. Products are
    exact, so that what is measured is what is made of them."""
    vocab, size, gaps = 1008, 16, torch.tensor([2.0, 10.0, 15.0, 22.0, 27.0, 34.0])
    weight, ids = (torch.randn(vocab, size) * 16).round() / 16, torch.arange(3).expand(len(gaps), 3)
    weight[:, 0] = torch.where(torch.arange(vocab) < 3, 1.0, 0.0)
    hidden = (3 * torch.randn(len(gaps), size)).round() / 16
    hidden[:, 0] = gaps
    logprobs = (torch.tensor([0.5, 0.3, 0.2]) * 0.999).log().expand(len(gaps), 3)
    given = {"hidden": hidden, "weight": weight, "bias": torch.zeros(vocab)}
    given |= {"teacher_ids": ids, "teacher_logprobs": logprobs}
    expected = run(reference_topk_divergence, wide(given), divergence=divergence, reduction="sum")
    actual = run(fused_linear_topk_divergence, given, divergence=divergence, reduction="sum", backend=backend)
    assert expected["student_tail_logprob"].min() < -26
    for name, value in actual.items():
        least = LEAST_NATS * len(gaps) ** 0.5 if name.endswith("entropy") else 0
        assert relative_error(value, expected[name], least) < 2e-6, name
    rows = (actual["grad of hidden"].double() - expected["grad of hidden"]).norm(dim=1)
    assert (rows / expected["grad of hidden"].norm(dim=1)).max() < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teachers_own_tail(backend: str) -> None:
    """Where the entries hold all but 1e-9, which their float32 sum does not tell."""
    given = inputs(4, 1003, 5)
    logits = 3 * torch.randn(4, 6).double()
    logits[:, 5] = -20
    logprobs = logits.log_softmax(-1)
    given["teacher_logprobs"], given["teacher_tail_logprob"] = logprobs[:, :5].float(), logprobs[:, 5].float()
    for divergence in ("reverse_kl", "jsd"):
        assert_matches(given, {"divergence": divergence}, backend=backend)
    del given["teacher_tail_logprob"]
    without = fused_linear_topk_divergence(**given, backend=backend).token_loss
    given["teacher_tail_logprob"] = torch.full((4,), math.log(LEAST_TAIL))
    torch.testing.assert_close(fused_linear_topk_divergence(**given, backend=backend).token_loss, without)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype, limit: float) -> None:
    """Gradients are rounded once, on their way out; the teacher may have another dtype."""
    given = inputs(6, 1003, 9, dtype)
    given["teacher_logprobs"] = given["teacher_logprobs"].to(dtype)
    assert_matches(given, {"divergence": "forward_kl"}, limit, backend=backend)
    given["teacher_logprobs"] = given["teacher_logprobs"].double()
    assert_matches(given, every_option(given), limit, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str, reduction: str) -> None:
    given = wide(inputs(4, 11, 3, size=4))
    trained = [given.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    options = {"divergence": divergence, "softcap": 5.0, "reduction": reduction, "max_chunk_bytes": 300}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sum(
            fused_linear_topk_divergence(hidden, weight, **given, bias=bias, tail=tail, **options).loss
            for tail in TAILS
        )

    assert torch.autograd.gradcheck(loss, trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_weight_zero_may_hold_anything(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, too, where they are not left out and the host may not look."""
    given = inputs(8, 1003, 4)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0] * 2)
    tail = -torch.rand(8)
    given["teacher_logprobs"] += torch.log1p(-tail.exp())[:, None] - given["teacher_logprobs"].logsumexp(1)[:, None]
    given["teacher_tail_logprob"] = tail
    expected = run(fused_linear_topk_divergence, given, token_weight=weight, backend=backend)
    dead = weight == 0
    poisoned = {name: tensor.clone() for name, tensor in given.items()}
    for name in ("hidden", "teacher_logprobs", "teacher_tail_logprob"):
        poisoned[name][dead] = torch.nan
    poisoned["teacher_ids"][dead] = 10**9
    found = [run(fused_linear_topk_divergence, poisoned, token_weight=weight, backend=backend)]
    if backend != "compiled":
        as_on_a_device(monkeypatch)
        monkeypatch.setattr(topk_arguments, "reads_are_free", lambda tensor: False)
        found.append(run(fused_linear_topk_divergence, poisoned, token_weight=weight, backend=backend))
    for values in found:
        for name, value in values.items():
            assert relative_error(value, expected[name]) < 1e-6, name
        assert not values["token_loss"][dead].any() and not values["grad of hidden"][dead].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_never_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    as_on_a_device(monkeypatch)
    monkeypatch.setattr(topk_arguments, "reads_are_free", lambda tensor: False)
    given = inputs(4, 50, 3, size=8)
    options = every_option(given)
    hidden = given.pop("hidden").requires_grad_()
    with NoWaiting() as mode:
        fused_linear_topk_divergence(hidden, **given, **options, backend=backend).loss.backward(torch.tensor(0.5))
    assert mode.calls > 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_that_the_students_head_masks(backend: str) -> None:
    """In the rest they have no part; where only the student masks, its divergence is large and finite; a masked entry
    has no gradient."""
    given = inputs(5, 1003, 4)
    given["teacher_ids"] = torch.arange(4).expand(5, 4).clone()
    given["bias"][100:] = -torch.inf
    assert_matches(given, {"divergence": "jsd"}, backend=backend)
    given["bias"][2] = -torch.inf
    assert_matches(given, {"divergence": "forward_kl"}, backend=backend)
    given["bias"][4:] = -torch.inf  # nothing is left for the student's rest
    given["teacher_logprobs"] = given["teacher_logprobs"].log_softmax(-1)
    found = run(fused_linear_topk_divergence, given, divergence="jsd", backend=backend)
    assert (found["token_loss"] < math.log(2)).all() and not found["grad of bias"][2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_cap_under_a_negative_scale(backend: str) -> None:
    """What is taken out of the logits lies below all others there, too."""
    given = inputs(5, 1003, 9)
    assert_matches(given, {"logit_scale": -1.1, "softcap": 9.0}, backend=backend)
    assert_matches(given, {**every_option(given), "logit_scale": -0.7, "divergence": "jsd"}, backend=backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_whose_head_masks_every_entry(backend: str, divergence: str) -> None:
    """Among entries that are all as unlikely, each has the same share, and none has a gradient."""
    given = inputs(4, 1003, 6)
    given["teacher_ids"] = torch.arange(6).expand(4, 6)
    given["bias"][:6] = -torch.inf
    found = run(fused_linear_topk_divergence, given, divergence=divergence, tail="dropped", backend=backend)
    log_q = given["teacher_logprobs"].double().log_softmax(-1)
    expected = divergence_per_token(torch.full_like(log_q, -math.log(6)), log_q, divergence)
    torch.testing.assert_close(found["token_loss"].double(), expected, rtol=3e-6, atol=0)
    assert not any(value.any() for name, value in found.items() if name.startswith("grad"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rest_that_the_students_head_masks_has_no_gradient(backend: str) -> None:
    """Though the teacher has some of it; where forward KL is as large as can be, the entries' gradient is p - q."""
    given = inputs(4, 1003, 6)
    given["teacher_ids"] = torch.arange(6).expand(4, 6)
    given["bias"][6:] = -torch.inf
    found = run(fused_linear_topk_divergence, given, divergence="forward_kl", reduction="sum", backend=backend)
    wider = wide(given)
    p = (wider["hidden"] @ wider["weight"][:6].T + wider["bias"][:6]).softmax(-1)
    assert found["loss"].isfinite() and not found["grad of bias"][6:].any() and not found["grad of weight"][6:].any()
    torch.testing.assert_close(
        found["grad of bias"][:6].double(), (p - wider["teacher_logprobs"].exp()).sum(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_who_has_nothing_of_the_rest(backend: str, divergence: str) -> None:
    given = inputs(4, 1003, 6)
    given["teacher_logprobs"] = given["teacher_logprobs"].log_softmax(-1)
    given["teacher_tail_logprob"] = torch.full((4,), -torch.inf)
    assert_matches(given, {"divergence": divergence}, backend=backend)


class WithFloat32:
    """A kernel whose numbers have float32's digits, as on a device; the interpreter hands on all that Python has."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            rounded = [torch.tensor(a).item() if isinstance(a, float) else a for a in arguments]
            self.kernel[grid](*rounded, **constants)

        return launch


@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl"])
def test_a_kernels_numbers_need_not_have_all_digits(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32's share of a mixture leaves the other share few digits. Products are exact here."""
    monkeypatch.setattr(top, "compare_kernel", WithFloat32(top.compare_kernel))
    given = inputs(5, 303, 9, size=8)
    for name in ("hidden", "weight", "bias"):
        given[name] = (given[name] * 8).round() / 8
    z = given["hidden"].double() @ given["weight"].double().T + given["bias"]
    logprobs = (z + torch.randn(5, 303)).log_softmax(-1)
    given["teacher_logprobs"] = logprobs.gather(1, given["teacher_ids"])
    options: dict[str, Any] = {"divergence": divergence, "beta": 0.999}
    expected = run(reference_topk_divergence, wide(given), **options)
    found = run(fused_linear_topk_divergence, given, **options, backend="triton")
    assert max(relative_error(found[name], expected[name]) for name in ("loss", "grad of hidden")) < 6e-6


@pytest.mark.parametrize("tokens", [0, 3])
def test_no_token_that_counts_gives_zeros(tokens: int) -> None:
    given = inputs(tokens, 50, 4)
    found = run(fused_linear_topk_divergence, given, token_weight=torch.zeros(tokens))
    assert found["loss"] == 0
    assert not any(found[f"grad of {name}"].any() for name in ("hidden", "weight", "bias"))


def test_without_gradients_with_part_of_the_vocabulary_and_under_autocast() -> None:
    given = inputs(6, 1003, 5)
    given["teacher_ids"] = torch.rand(6, 900).argsort(1)[:, :5]
    expected = reference_topk_divergence(**wide(given), vocab_size=900)
    for backend in BACKENDS:
        found = fused_linear_topk_divergence(**given, vocab_size=900, backend=backend)
        assert not found.loss.requires_grad
        assert relative_error(found.token_loss, expected.token_loss) < 3e-6
    given["weight"].requires_grad_()
    fused_linear_topk_divergence(**given, vocab_size=900).loss.backward()
    assert given["weight"].grad is not None and not given["weight"].grad[900:].any()
    with torch.autocast("cpu", torch.bfloat16):
        lowered = fused_linear_topk_divergence(**given)
    given |= {name: given[name].detach().bfloat16() for name in ("hidden", "weight")}
    torch.testing.assert_close(lowered.loss, fused_linear_topk_divergence(**given).loss)


def test_the_operator_is_one_of_torchs_and_is_traced() -> None:
    given = inputs(3, 50, 4, size=8)
    tensors = (given["hidden"].requires_grad_(), given["weight"], None, given["teacher_ids"], given["teacher_logprobs"])
    options = ("jsd", 0.5, "bucket", 1.0, 1.0, None, None, "mean", None, None, "torch", torch.float32)
    absent = (None, None, torch.tensor([1, 2, 3]), None)
    torch.library.opcheck(fused_linear_topk_divergence_op, (*tensors, *absent, *options, True, False, False))
    del given["bias"]
    compiled = torch.compile(lambda: fused_linear_topk_divergence(**given).loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(), fused_linear_topk_divergence(**given).loss)


@pytest.mark.parametrize("trainable_head", [True, False])
def test_it_takes_three_products_or_two_with_a_frozen_head(trainable_head: bool) -> None:
    tokens, size, vocab, k = 1024, 256, 32_768, 20
    hidden = torch.empty(tokens, size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head = torch.empty(vocab, size, dtype=torch.bfloat16, device="meta", requires_grad=trainable_head)
    ids = torch.empty(tokens, k, dtype=torch.int64, device="meta")
    logprobs = torch.empty(tokens, k, device="meta")

    def call() -> None:
        fused_linear_topk_divergence(hidden, head, ids, logprobs).loss.backward()

    noted = record(call, TRAFFIC, IMPLEMENTATIONS)
    assert sum(op.flops for op in noted.ops) == (3 if trainable_head else 2) * 2 * tokens * size * vocab
    assert not any(op.waits for op in noted.ops)


class LargestTensor(TorchDispatchMode):
    """The most entries of a tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            self.entries = max(self.entries, value.numel() if isinstance(value, Tensor) else 0)
        return out


@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_it_never_holds_all_logits(backend: str) -> None:
    """In chunks of 64 of 512 tokens."""
    given, vocab = inputs(512, 4003, 5, size=8), 4003
    tensors = (given["hidden"], given["weight"], None, given["teacher_ids"], given["teacher_logprobs"])
    options = ("jsd", 0.5, "bucket", 1.0, 1.0, None, None, "mean", None, 4 * vocab * 64, backend, torch.float32)
    with LargestTensor() as mode:
        IMPLEMENTATIONS[fused_linear_topk_divergence_op](*tensors, *[None] * 4, *options, True, True, False)
    assert 64 * vocab <= mode.entries <= 1.1 * 64 * vocab


def test_on_a_device_it_holds_the_logits_of_a_block() -> None:
    tokens, vocab, k = 8192, 32_768, 20
    hidden = torch.empty(tokens, 256, dtype=torch.bfloat16, device="meta", requires_grad=True)
    head = torch.empty(vocab, 256, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, k, dtype=torch.int64, device="meta")
    logprobs = torch.empty(tokens, k, device="meta")

    def call() -> None:
        fused_linear_topk_divergence(hidden, head, ids, logprobs).loss.backward()

    assert record(call, TRAFFIC, IMPLEMENTATIONS).peak < 4 * tokens * vocab / 5


WRONG = torch.tensor([[0.4, 0.2], [0.3, 0.3], [0.2, 0.6]]).log()


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, "divergence must be one of", {"divergence": "kl"}),
        (ValueError, "tail must be one of 'bucket', 'dropped', not 'none'", {"tail": "none"}),
        (ValueError, "beta must lie between 0.001", {"divergence": "jsd", "beta": 0.0}),
        (
            ValueError,
            r"teacher_ids must have shape \(3, K\), K at least 1, not \(3, 0\)",
            {"teacher_ids": "no columns"},
        ),
        (ValueError, r"teacher_ids must have shape \(3, K\)", {"teacher_ids": torch.tensor([1, 2, 3])}),
        (ValueError, "teacher_logprobs must have the shape of teacher_ids", {"teacher_logprobs": torch.zeros(3, 3)}),
        (TypeError, "teacher_ids must be int64, not int32", {"teacher_ids": torch.ones(3, 2, dtype=torch.int32)}),
        (TypeError, "teacher_logprobs must be float32", {"teacher_logprobs": torch.ones(3, 2, dtype=torch.int64)}),
        (TypeError, "teacher_logprobs must be a tensor", {"teacher_logprobs": [[0.0]]}),
        (ValueError, "teacher_ids run from 1 to 50", {"teacher_ids": torch.tensor([[1, 2], [3, 50], [5, 6]])}),
        (ValueError, "teacher_ids run from -1 to 6", {"teacher_ids": torch.tensor([[1, 2], [3, -1], [5, 6]])}),
        (
            ValueError,
            "teacher_ids must name each entry once for a token, and name 3 twice",
            {"teacher_ids": torch.tensor([[1, 2], [3, 3], [5, 6]])},
        ),
        (ValueError, "some are NaN", {"teacher_logprobs": WRONG * torch.tensor([1, torch.nan])}),
        (ValueError, "at most 0, and reach 0.5", {"teacher_logprobs": WRONG + torch.tensor([1.4162907, 0])}),
        (ValueError, "sum to 1.11111 for a token", {"teacher_logprobs": (WRONG.exp() / 0.72).log()}),
        (ValueError, "teacher_logprobs are all -inf", {"teacher_logprobs": torch.full((3, 2), -torch.inf)}),
        (ValueError, "sum to 0.7 for a token: the tail's", {"teacher_tail_logprob": torch.full((3,), 0.1).log()}),
        (ValueError, "tail='dropped'", {"teacher_tail_logprob": -torch.ones(3), "tail": "dropped"}),
        (ValueError, "old_logprobs needs labels", {"old_logprobs": -torch.ones(3)}),
        (ValueError, "importance_clip needs old_logprobs", {"importance_clip": 2.0}),
        (ValueError, "labels run from 1 to 77", {"labels": torch.tensor([1, 77, 3])}),
        (ValueError, "more than the vocabulary's 1", {"vocab_size": 1}),
        (ValueError, r"token_weight must have shape \(3,\)", {"token_weight": torch.ones(2)}),
    ],
)
def test_a_wrong_argument_is_named(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"hidden": torch.randn(3, 8), "weight": torch.randn(50, 8)}
    given |= {"teacher_ids": torch.tensor([[1, 2], [3, 4], [5, 6]]), "teacher_logprobs": WRONG, **changed}
    if isinstance(given["teacher_ids"], str):
        given |= {"teacher_ids": torch.zeros(3, 0, dtype=torch.int64), "teacher_logprobs": torch.zeros(3, 0)}
    with pytest.raises(error, match=message):
        fused_linear_topk_divergence(**given)


def test_decimal_text_and_halves_are_log_probabilities_still() -> None:
    """Rounded so that they sum to somewhat more than 1."""
    hidden, weight = torch.randn(1, 8), torch.randn(50, 8)
    for logprobs in (torch.tensor([[-0.69314, -0.69314]]), torch.tensor([[-0.7, -0.684]]).bfloat16()):
        assert logprobs.double().exp().sum() > 1
        out = fused_linear_topk_divergence(hidden, weight, torch.tensor([[1, 2]]), logprobs)
        assert out.loss.isfinite()


def test_beside_the_divergence_of_a_teacher_with_hidden_states() -> None:
    """The same teacher, by its hidden states and by all of its log-probabilities: the same gradients."""
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(60, 16)
    teacher = torch.randn(7, 16)
    logprobs, ids = (teacher @ weight.T).log_softmax(-1).topk(60)
    (whole,) = torch.autograd.grad(fused_linear_divergence(hidden, weight, teacher, weight).loss, hidden)
    (found,) = torch.autograd.grad(fused_linear_topk_divergence(hidden, weight, ids, logprobs).loss, hidden)
    assert relative_error(found, whole) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_teacher_gives(dtype: torch.dtype) -> None:
    """Its likeliest entries, then the same ones by name; with every option, in chunks."""
    hidden, weight, bias = torch.randn(37, 16).to(dtype), torch.randn(333, 16).to(dtype), torch.randn(333).to(dtype)
    options: dict[str, Any] = {"temperature": 0.8, "logit_scale": -1.2, "softcap": 9.0, "vocab_size": 300}
    z = -1.2 * (hidden.double() @ weight[:300].double().T + bias[:300].double())
    log_p = (9 * torch.tanh(z / 9) / 0.8).log_softmax(-1)
    expected, ids = log_p.topk(7)
    found = linear_topk_logprobs(hidden, weight, 7, bias=bias, max_chunk_bytes=30_000, **options)
    assert torch.equal(found.ids, ids)
    again = linear_topk_logprobs(hidden, weight, ids=ids, bias=bias, **options)
    for got in (found, again):
        assert relative_error(got.logprobs, expected) < 1e-6
        assert relative_error(got.tail_logprob, torch.log1p(-expected.exp().sum(-1))) < 1e-6
    everything = linear_topk_logprobs(hidden, weight, 333)
    assert (everything.tail_logprob == -torch.inf).all()


def test_a_student_is_at_no_distance_from_itself() -> None:
    """Of what it gives of itself, with a rest that float32's sum of the entries would not tell."""
    hidden, weight = 3 * torch.randn(20, 16), torch.randn(200, 16)
    ids, logprobs, tail = linear_topk_logprobs(hidden, weight, 10)
    assert tail.min() < -16
    out = fused_linear_topk_divergence(hidden, weight, ids, logprobs, teacher_tail_logprob=tail)
    assert out.token_loss.abs().max() < 1e-6
    torch.testing.assert_close(out.student_tail_logprob, tail)


@pytest.mark.parametrize(
    ("error", "message", "asked"),
    [
        (ValueError, "needs one of k and ids", {}),
        (ValueError, "k must lie between 1 and 50, the vocabulary's size, not be 51", {"k": 51}),
        (ValueError, "k must be positive", {"k": 0}),
        (TypeError, "k must be a number of entries", {"k": 1.5}),
        (ValueError, r"ids must have shape \(3, K\)", {"ids": torch.zeros(2, 2, dtype=torch.int64)}),
        (TypeError, "ids must be int64, not float32", {"ids": torch.zeros(3, 2)}),
        (ValueError, "ids must name each entry once", {"ids": torch.tensor([[0, 1], [2, 2], [3, 4]])}),
        (ValueError, "ids run from 0 to 50", {"ids": torch.tensor([[0, 1], [2, 50], [3, 4]])}),
    ],
)
def test_a_wrong_question_is_named(error: type[Exception], message: str, asked: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        linear_topk_logprobs(torch.randn(3, 8), torch.randn(50, 8), **asked)
