"""The cache with room to spare holds what transformers' own does, is copied seldom, and changes no rollout."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from sdft.rollouts.generate import sample
from sdft.rollouts.interface import Sampling
from sdft.rollouts.kv_cache import RoomyLayer, roomy_cache
from tests import tiny
from tests.test_sdft_architectures import FAMILIES


def states(rows, tokens):
    """Keys and values of new tokens; values may be of another width."""
    return torch.randn(rows, 2, tokens, 8), torch.randn(rows, 2, tokens, 6)


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda layer: layer.crop(-4), 3),
        (lambda layer: layer.batch_select_indices(torch.tensor([2, 0])), 2),
        (lambda layer: layer.batch_repeat_interleave(2), 6),
        (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])), 3),
        (lambda layer: layer.reset(), 3),
    ],
)
def test_a_layer_holds_what_transformers_holds_whatever_is_done_to_it(change, rows):
    ours, theirs = RoomyLayer(), DynamicLayer()

    def update_both(count, tokens):
        new = states(count, tokens)
        for mine, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)

    for tokens in (17, 1, 1, 60, 1):
        update_both(3, tokens)
    change(ours)
    change(theirs)
    for tokens in (1, 1, 200, 1):
        update_both(rows, tokens)


def test_a_token_more_is_seldom_a_copy_and_keeps_little_room():
    layer, places = RoomyLayer(), set()
    layer.update(*states(1, 100))
    for _ in range(400):
        keys, _ = layer.update(*states(1, 1))
        places.add(keys.data_ptr())
        assert keys.untyped_storage().nbytes() <= 1.125 * keys.numel() * 4 + 32 * 2 * 8 * 4
    assert len(places) <= 13


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_are_those_that_transformers_writes_with_its_own_cache(family):
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()
    model.generation_config = GenerationConfig()  # which would end completions
    prompt, sampling = list(range(5, 15)), Sampling(40)
    plain = GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = model.generate(input_ids=torch.tensor([prompt, prompt[::-1]]), generation_config=plain)
    assert sample(model, [prompt, prompt[::-1]], sampling) == expected[:, 10:].tolist()


def test_a_model_with_another_kind_of_memory_keeps_its_own():
    settings = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).eval()
    assert roomy_cache(model) is None
    assert len(sample(model, [[5, 6, 7]], Sampling(4))[0]) == 4
    assert roomy_cache(tiny.tiny_model()) is not None
