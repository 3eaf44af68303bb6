"""What the compiled kernels do beside the loss, which the tests of the loss cover: they run wherever "auto" does."""

import threading

import pytest
import torch

from sdft_kernels import cpu_backend, fused_linear_divergence, linear_token_stats, pages, torch_backend
from sdft_kernels.chunk_loop import backend_module
from sdft_kernels.cpu_backend import Workspace
from tests.cases import DIVERGENCES, assert_close, fused, random_case, reference

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles of a small vocabulary."""
    monkeypatch.setattr(cpu_backend, "TILE_BYTES", 1)


def test_they_are_built_here_and_taken_for_float32_logits() -> None:
    assert cpu_backend.library() is not None
    assert backend_module("auto", CPU, torch.float32) is cpu_backend
    assert backend_module("auto", CPU, torch.float64) is torch_backend
    assert backend_module("torch", CPU, torch.float32) is torch_backend


def test_where_they_are_not_built_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "library", lambda: None)
    assert backend_module("auto", CPU, torch.float32) is torch_backend
    case = random_case()
    assert_close(fused(case), reference(case), 2e-6, 2e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (3, 65), (17, 129), (64, 1003), (130, 333)])
def test_any_number_of_tokens_and_entries(divergence: str, tokens: int, vocab: int) -> None:
    """Of which blocks, tiles and threads take what there is."""
    case = random_case(tokens, vocab=vocab, divergence=divergence, bias=True, labels=torch.arange(tokens) % vocab)
    if vocab == 1:
        assert fused(case).output.token_loss.abs().max() == 0
    else:
        assert_close(fused(case), reference(case), 2e-6, 2e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "skew_reverse_kl"])
def test_any_number_of_threads(threads: int, divergence: str) -> None:
    case = random_case(40, vocab=65, divergence=divergence, student_softcap=5.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(fused(case), reference(case), 2e-6, 2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "jsd"])
def test_largest_logits_that_come_late_and_far_above(divergence: str) -> None:
    """What was summed before a new largest logit is moved, down to nothing; the peak's own terms keep their digits.

    Not all of them for the jsd, whose score is nearly the same wherever p is far above q.
    """
    steps = torch.arange(-480, 481).unsqueeze(1) / 8  # whose products with the hidden states are exact
    case = random_case(6, 1, 1, divergence=divergence)
    case.student_weight, case.teacher_weight = steps, steps.flip(0)
    case.student_hidden = torch.tensor([[1.0], [-1.0], [0.125], [-0.125], [0.0], [2.0]])
    case.teacher_hidden = torch.tensor([[-1.0], [-1.0], [0.125], [0.125], [1.0], [-2.0]])
    assert_close(fused(case), reference(case), 2e-6, 2e-6)


def test_what_is_not_a_number_stays_one_and_among_its_tokens() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(300, 8)
    hidden[2] = torch.nan
    for divergence in DIVERGENCES:
        loss = fused_linear_divergence(hidden, weight, torch.randn(5, 8), weight, divergence=divergence).token_loss
        assert loss.isnan().tolist() == [False, False, True, False, False]
    assert linear_token_stats(hidden, weight).entropy.isnan().tolist() == [False, False, True, False, False]


def test_passes_turn_around() -> None:
    workspace = Workspace(torch.empty(0), 32, 300, keep=True)
    workspace.tile = 128
    there, back = ([part.start for part, _ in workspace.tiles(32)] for _ in range(2))
    assert there == [0, 128, 256] and back == there[::-1]


def test_a_workspace_is_kept_for_the_next_call() -> None:
    count = 5 << 20
    first = pages.take(torch.empty(0), count, torch.float32)
    memory = first.data_ptr()
    pages.give_back(first)
    again = pages.take(torch.empty(0), count - 5, torch.float32)
    assert again.data_ptr() == memory
    assert pages.take(torch.empty(0), count, torch.float32).data_ptr() != memory  # while another call has it
    pages.give_back(again)
    assert len(pages.take(torch.empty(0), count + 5, torch.float32)) == count + 5


def test_calls_at_once_do_not_share_a_workspace() -> None:
    cases = [random_case(200, vocab=4003, seed=seed) for seed in range(4)]
    alone = [fused(case) for case in cases]
    together = [alone[0]] * len(cases)

    def work(number: int) -> None:
        for _ in range(5):
            together[number] = fused(cases[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, other in zip(together, alone, strict=True):
        assert_close(mine, other, 1e-6, 1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_defaults_of_dtype_and_device_are_not_those_of_the_kernels(divergence: str) -> None:
    """Their arrays are float32 and float64 on the CPU, whatever new tensors are elsewhere in a program."""
    labels = torch.arange(37)
    case = random_case(divergence=divergence, labels=labels)
    expected = reference(case)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = fused(case)
            stats = linear_token_stats(case.student_hidden, case.student_weight, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(actual, expected, 2e-6, 2e-6)
    torch.testing.assert_close(stats.logprob, actual.output.student_logprob)
