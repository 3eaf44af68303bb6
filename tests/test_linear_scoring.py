"""The kernels that multiply hidden states by heads themselves, run by Triton's interpreter, against float64.

No test here may write logits to memory.
"""

from itertools import cycle
from typing import Any

import pytest
import torch
import triton

from sdft_kernels import chunk_loop, linear_token_stats, scoring
from sdft_kernels.backends import products
from sdft_kernels.backends.gpu import backend as triton_backend
from sdft_kernels.backends.gpu import linear as triton_linear
from sdft_kernels.backends.gpu.linear import LARGEST_TILE, PROCESS_TILES, SCORE_TILES, split_vocabulary
from sdft_kernels.backends.gpu.operands import Operands, Tile, configurations
from sdft_kernels.backends.interface import HeadOperands
from sdft_kernels.chunking import ChunkPlan
from sdft_kernels.divergences import LogitOptions, Objective
from sdft_kernels.tokens import TokenRows, TokenScores
from tests.cases import LEAST_NATS, Case, Result, assert_close, fused, random_case, reference, relative_error
from tests.test_scoring import expected_stats

HALF = (torch.bfloat16, torch.float16)
KL = ("reverse_kl", "forward_kl")


@pytest.fixture(autouse=True)
def _no_logits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("logits were written to memory")

    monkeypatch.setattr(products, "logits", refuse)
    monkeypatch.setattr(triton_backend, "empty_logits", refuse)


def every_tile(tiles: dict[str, tuple[Tile, ...]]) -> list[Tile]:
    """Of every device, those that differ by their warps alone once: the interpreter has none."""
    return list({tile[:3]: tile for of_device in tiles.values() for tile in of_device}.values())


@pytest.fixture(params=[False, True], ids=["pointers", "copied"])
def copied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tiles come by an engine that copies them, as on Hopper."""
    monkeypatch.setattr(triton_linear, "copies_tiles", lambda matrix: request.param)
    return bool(request.param)


def one_configuration(tile: Tile) -> list[triton.Config]:
    return configurations({"cuda": (tile,)}, "cuda")


def without_gradient(case: Case, **extra: Any) -> Result:
    case.trainable = ()
    return fused(case, backend="triton", **extra)


def expected(case: Case) -> Result:
    case.trainable = ()
    return reference(case)


@pytest.mark.parametrize(("tile", "dtype"), [*zip(every_tile(SCORE_TILES), cycle(HALF), strict=False)])
def test_scores_of_odd_shapes_in_every_tile(
    monkeypatch: pytest.MonkeyPatch, tile: Tile, dtype: torch.dtype, copied: bool
) -> None:
    monkeypatch.setattr(triton_linear.score_hidden_kernel, "configs", one_configuration(tile))
    hidden, weight = torch.randn(131, 75).to(dtype), (torch.randn(643, 75) / 4).to(dtype)
    bias, labels = None if copied else torch.randn(643).to(dtype), torch.randint(0, 643, (131,))
    options = {"softcap": 8.0, "temperature": 0.7}
    wanted = expected_stats(hidden, weight, labels, bias, scale=1.5, **options)
    actual = linear_token_stats(hidden, weight, labels, bias=bias, logit_scale=1.5, backend="triton", **options)
    for name in ("logprob", "entropy", "logsumexp"):
        assert relative_error(getattr(actual, name), getattr(wanted, name)) <= 3e-6, name
    assert torch.equal(actual.top1, wanted.top1)


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 255, 256, 257])
def test_vocabularies_around_the_tile(vocab: int, copied: bool) -> None:
    """Of so many tokens, for models of two entries may agree on a few, and leave differences without digits."""
    case = random_case(16, vocab=vocab, dtype=torch.bfloat16, labels=torch.randint(0, vocab, (16,)))
    assert_close(without_gradient(case), expected(case), 3e-6, 0)
    hidden, weight, labels = case.student_hidden, case.student_weight, case.options["labels"]
    actual = linear_token_stats(hidden, weight, labels, backend="triton")
    wanted = expected_stats(hidden, weight, labels, None).logprob
    assert relative_error(actual.logprob, wanted, LEAST_NATS * 16**0.5) <= 3e-6


def test_top1_where_tokens_tie() -> None:
    """Whole numbers, so that products are exact: tokens 5 and 300, splits apart, are equally likely."""
    weight = torch.randint(-2, 3, (600, 16)).to(torch.bfloat16)
    weight[5] = weight[300] = 4
    hidden = torch.ones(4, 16, dtype=torch.bfloat16)
    stats = linear_token_stats(hidden, weight, torch.tensor([5, 300, 6, 599]), backend="triton")
    assert stats.top1.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("divergence", "dtype", "shared_head"),
    [("reverse_kl", torch.bfloat16, True), ("forward_kl", torch.float16, False)],
)
@pytest.mark.parametrize("tile", every_tile(PROCESS_TILES))
def test_divergences_in_every_tile(
    monkeypatch: pytest.MonkeyPatch,
    divergence: str,
    dtype: torch.dtype,
    shared_head: bool,
    tile: Tile,
    copied: bool,
) -> None:
    monkeypatch.setattr(triton_linear.process_hidden_kernel, "configs", one_configuration(tile))
    tokens, vocab = 133, 387
    case = random_case(
        tokens,
        student_size=75,
        teacher_size=130,
        vocab=vocab,
        dtype=dtype,
        shared_head=shared_head,
        bias=not copied,
        divergence=divergence,
        teacher_bias=None if copied else torch.randn(vocab),
        temperature=1.3,
        student_logit_scale=1.2,
        teacher_logit_scale=0.8,
        student_softcap=9.0,
        teacher_softcap=12.0,
        token_weight=torch.rand(tokens) * (torch.rand(tokens) > 0.2),
        labels=torch.randint(0, vocab, (tokens,)),
        old_logprobs=-torch.rand(tokens) * 8,
        importance_clip=3.0,
    )
    assert_close(without_gradient(case), expected(case), 3e-6, 0)


@pytest.mark.parametrize("divergence", KL)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_plain_options(divergence: str, reduction: str) -> None:
    case = random_case(5, vocab=517, dtype=torch.bfloat16, shared_head=True, divergence=divergence, reduction=reduction)
    assert_close(without_gradient(case), expected(case), 3e-6, 0)


def test_entropies_of_nearly_certain_tokens() -> None:
    """Σ exp(z - max) is kept as one float32, so of what lies beside the largest logit the digits below 6e-8 are lost:
    little of any entropy, as far as nats go, but several percent of one of 1e-7. So it is with whole rows of logits."""
    hidden = torch.zeros(9, 16, dtype=torch.bfloat16)
    hidden[:, 3] = torch.tensor([2.0, 8.0, 12.0, 14.0, 16.0, 18.0, 20.0, 25.0, 40.0])
    weight, labels = torch.eye(16, dtype=torch.bfloat16), torch.full((9,), 3)
    actual = linear_token_stats(hidden, weight, labels, backend="triton")
    wanted = expected_stats(hidden, weight, labels, None)
    for name in ("entropy", "logprob"):
        difference = getattr(actual, name).double() - getattr(wanted, name)
        assert (difference.abs() <= 1.2e-7 + 3e-7 * getattr(wanted, name).abs()).all(), name
    assert (actual.entropy > 0).all()


@pytest.mark.parametrize("divergence", KL)
def test_nearly_one_hot_rows(divergence: str) -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 1.0, 0.0], [1.0, -1.0, -1.0, -1.0]])
    case = random_case(4, divergence=divergence)
    case.student_weight = case.teacher_weight = torch.eye(4).bfloat16()
    for size in (1.0, 8.0, 64.0, 1024.0):
        case.student_hidden, case.teacher_hidden = (logits * size).bfloat16(), (logits.flip(0) * size).bfloat16()
        assert_close(without_gradient(case), expected(case), 3e-6, 0)


@pytest.mark.parametrize("divergence", KL)
def test_peaks_in_different_splits(divergence: str) -> None:
    """Whole numbers, so that products are exact: each row has one far likelier token, and six splits have them."""
    student, teacher = (torch.randint(-1, 2, (6, 64)).bfloat16() for _ in range(2))
    weight = torch.randint(-1, 2, (1000, 64)).bfloat16()
    weight[[0, 140, 280, 510, 760, 999]] = student
    case = Case(student, weight, teacher, weight, options={"divergence": divergence, "temperature": 4.0})
    assert_close(without_gradient(case), expected(case), 3e-6, 0)


def test_same_student_and_teacher() -> None:
    case = random_case(4, vocab=517, dtype=torch.bfloat16, shared_head=True)
    case.teacher_hidden = case.student_hidden.clone()
    assert without_gradient(case).output.token_loss.abs().max() < 1e-6


def test_non_contiguous_inputs() -> None:
    case = random_case(
        8,
        vocab=300,
        dtype=torch.bfloat16,
        labels=torch.randint(0, 300, (8,)),
        old_logprobs=-torch.rand(8) * 8,
        teacher_bias=torch.randn(300, 2)[:, 0],
    )
    case.student_bias = torch.randn(300, 2)[:, 1]
    wanted = expected(case)
    for name in ("student_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).T.contiguous().T)
    for name in ("teacher_hidden", "student_weight"):
        setattr(case, name, torch.stack((getattr(case, name),) * 2, 1)[:, 1])
    for name in ("labels", "old_logprobs"):
        case.options[name] = case.options[name].repeat_interleave(2)[::2]
        assert not case.options[name].is_contiguous()
    assert_close(without_gradient(case), wanted, 3e-6, 0)
    actual = linear_token_stats(
        case.student_hidden,
        case.student_weight,
        case.options["labels"],
        bias=case.student_bias,
        backend="triton",
    )
    assert relative_error(actual.logprob, wanted.output.student_logprob) <= 3e-6


def test_heads_padded_differently() -> None:
    case = random_case(3, vocab=300, dtype=torch.bfloat16)
    wanted = expected(case)
    case.teacher_weight = torch.cat((case.teacher_weight, torch.full((7, 40), float("nan"), dtype=torch.bfloat16)))
    with pytest.warns(UserWarning, match="300 and 307"):
        assert_close(without_gradient(case), wanted, 3e-6, 0)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("shared_head", [True, False])
def test_a_shared_head_is_read_once(monkeypatch: pytest.MonkeyPatch, autocast: bool, shared_head: bool) -> None:
    launched = []
    launch = triton_linear.process_hidden_kernel.run

    def note(*arguments: Any, **options: Any) -> None:
        launched.append(options["SHARED_HEAD"])
        launch(*arguments, **options)

    monkeypatch.setattr(triton_linear.process_hidden_kernel, "run", note)
    case = random_case(3, vocab=150, dtype=torch.bfloat16, shared_head=shared_head)
    wanted = expected(case)
    if autocast:
        for name in ("student_hidden", "teacher_hidden", "student_weight"):
            setattr(case, name, getattr(case, name).float())
        case.teacher_weight = case.student_weight if shared_head else case.teacher_weight.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = without_gradient(case)
    assert_close(result, wanted, 3e-6, 0)
    assert launched == [shared_head]


def test_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device no chunk has more hidden states than its cache; here all would be one."""
    for module in (chunk_loop, scoring):
        monkeypatch.setattr(module, "plan_chunks", lambda tokens, *rest, **more: ChunkPlan(4, 3, 1))
    labels = torch.randint(0, 300, (11,))
    case = random_case(11, vocab=300, dtype=torch.bfloat16, labels=labels, old_logprobs=-torch.rand(11) * 8)
    assert_close(without_gradient(case), expected(case), 3e-6, 0)
    actual = linear_token_stats(case.student_hidden, case.student_weight, labels, backend="triton")
    wanted = expected_stats(case.student_hidden, case.student_weight, labels, None)
    assert relative_error(actual.entropy, wanted.entropy) <= 3e-6
    assert relative_error(actual.logprob, wanted.logprob) <= 3e-6


def test_one_split_or_several_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(2, vocab=700, dtype=torch.bfloat16, labels=torch.tensor([0, 699]))
    wanted = expected(case)
    for splits in (1, 2, 4):
        monkeypatch.setattr(triton_linear, "split_vocabulary", lambda tokens, vocab, splits=splits: splits)
        assert_close(without_gradient(case), wanted, 3e-6, 0)


def test_few_tokens_still_fill_the_device() -> None:
    assert split_vocabulary(64, 152_000) >= 132
    assert split_vocabulary(2048, 152_000) * (2048 // LARGEST_TILE[0]) >= 2 * 132
    assert split_vocabulary(64, LARGEST_TILE[1]) == 1
    assert split_vocabulary(64, 10 * LARGEST_TILE[1]) == 8
    assert split_vocabulary(1 << 20, 152_000) == 1
    for tiles in (SCORE_TILES, PROCESS_TILES):
        assert all(tile[0] <= LARGEST_TILE[0] and tile[1] <= LARGEST_TILE[1] for tile in every_tile(tiles))


def test_rows_past_two_to_the_31st_element() -> None:
    """Three rows 2³⁰ elements apart, in memory that is only mapped: pages that are not touched do not exist."""
    apart, size = 2**30, 48

    def spaced(values: torch.Tensor) -> torch.Tensor:
        return torch.empty(2 * apart + size).as_strided((3, size), (apart, 1)).copy_(values)

    plain = list(torch.randn(4, 3, size))
    results = []
    for hidden, weight, teacher_hidden, teacher_weight in (plain, [spaced(values) for values in plain]):
        scores = TokenScores(None, None, None, *torch.empty(2, 3).unbind())
        student, teacher = HeadOperands(weight, None), HeadOperands(teacher_weight, None)
        triton_linear.score_hidden(hidden, student, scores, LogitOptions())
        rows = TokenRows(torch.ones(3), None, None, *torch.empty(3, 3).unbind(), None, None)
        triton_linear.process_hidden(hidden, teacher_hidden, student, teacher, rows, Objective())
        results.append((scores.entropy, scores.logsumexp, rows.loss, rows.teacher_entropy))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_head_is_laid_out_once_for_all_chunks() -> None:
    """Copies of a whole head, where its rows have to be padded, stay out of the loop over chunks."""
    operands, weight = Operands(), torch.randn(40, 75).bfloat16()
    first = operands.head(HeadOperands(weight, None))
    again = operands.head(HeadOperands(weight, torch.zeros(40)))
    assert first.weight is again.weight and first.weight.shape == (40, 80)
    assert torch.equal(first.weight[:, :75], weight.float()) and not first.weight[:, 75:].any()
    assert operands.head(HeadOperands(weight.clone(), None)).weight is not first.weight
