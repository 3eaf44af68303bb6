import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from sdft.errors import TrainingError
from sdft.rollouts.generate import generate
from sdft.rollouts.row_sampler import RowSampler, sample_rows, seed_of
from tests import tiny

CPU = torch.device("cpu")
PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41]]


def rollouts(model, numbers, **options):
    settings = {"max_new_tokens": 12, "eos_ids": frozenset({1}), "temperature": 1.0, **options}
    return generate(model, [PROMPTS[n] for n in numbers], seeds=[seed_of(5, n) for n in numbers], **settings)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 3}], ids=str)
def test_a_row_is_sampled_alike_whatever_is_beside_it(options):
    model = tiny.tiny_model()
    together = rollouts(model, [0, 1, 2, 3], **options)
    torch.manual_seed(99)  # torch's own generator has no part in it
    assert rollouts(model, [3, 1], **options) + rollouts(model, [2], **options) == [together[n] for n in (3, 1, 2)]
    assert len(set(map(tuple, together))) == 4


def test_seeds_differ_by_each_number_and_by_order():
    keys = [(0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 2), (3, 0, 1), (0, 3)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert [seed_of(*key) for key in keys] == seeds
    assert all(0 <= seed < 2**63 for seed in seeds)


def drawn(settings, scores, count):
    """Shares of the tokens that `count` rows with the same scores draw."""
    processors = sample_rows(settings, RowSampler([seed_of(n) for n in range(count)], CPU))
    chosen = processors(torch.zeros(count, 1, dtype=torch.long), scores.expand(count, -1).clone()).argmax(-1)
    return torch.bincount(chosen, minlength=scores.numel()) / count


def test_draws_follow_the_distribution_after_temperature_and_cut_offs():
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -20.0])
    for settings, kept in (
        ({"temperature": 1.0}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 2.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_p": 0.7}, 2),
        ({"temperature": 1.0, "min_p": 0.15}, 3),
    ):
        expected = (scores / settings["temperature"]).softmax(-1)
        expected[kept:] = 0
        expected /= expected.sum()
        measured = drawn(GenerationConfig(do_sample=True, **settings), scores, 4000)
        assert (measured - expected).abs().max() < 0.03, settings  # four standard deviations
        assert measured[kept:].sum() == 0


def test_the_draws_of_a_row_are_independent_from_token_to_token():
    sampler = RowSampler([7], CPU)
    scores = torch.zeros(1, 50)
    chosen = [sampler(torch.zeros(1, 1), scores).argmax().item() for _ in range(60)]
    assert len(set(chosen)) > 25


def test_settings_become_greedy_so_that_nothing_is_drawn_or_scaled_twice():
    settings = GenerationConfig(do_sample=True, temperature=0.5, top_k=5, top_p=0.9, min_p=0.1)
    processors = sample_rows(settings, RowSampler([1], CPU))
    assert isinstance(processors, LogitsProcessorList)
    assert [type(p).__name__ for p in processors] == [
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "RowSampler",
    ]
    assert not settings.do_sample
    assert settings.temperature is settings.top_k is settings.top_p is settings.min_p is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_a_training_error(value):
    model = tiny.tiny_model()
    model.lm_head.weight.data[7] = value
    with pytest.raises(TrainingError, match="no longer finite"):
        rollouts(model, [0, 1], max_new_tokens=2)
