"""The cache with room to spare holds what transformers' own does, is copied seldom, and changes no rollout."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicLayer

from sdft.errors import UsageError
from sdft.launch import check_rollouts
from sdft.rollouts.generate import by_compiled_generate, sample
from sdft.rollouts.interface import Sampling
from sdft.rollouts.kv_cache import RoomyLayer, check_static_cache, roomy_cache, static_cache
from tests import tiny
from tests.test_sdft_architectures import FAMILIES
from tests.test_sdft_trainer import trainer


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


# A cache of one length, whose passes can be compiled


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gptj, bias", "llama4_text", "recurrent_gemma"])
def test_rollouts_are_the_same_with_a_cache_of_one_length(family):
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()
    assert (check_static_cache(model) is None) == (name != "recurrent_gemma")
    if name == "recurrent_gemma":
        return
    prompts, seeds = [list(range(5, 15)), [7, 6], [9] * 5], [1, 2, 3]
    for sampling in (Sampling(30), Sampling(30, frozenset({9}), temperature=1.0, top_k=20)):
        ours = sample(model, prompts, sampling, seeds=seeds, backend=by_compiled_generate)
        assert ours == sample(model, prompts, sampling, seeds=seeds)


def test_a_pass_has_one_shape_whatever_the_prompts(monkeypatch):
    """Passes that would be compiled on a GPU: one shape, and so one graph, for lengths up to a multiple of 256."""
    model, shapes = tiny.tiny_model(max_position_embeddings=800), set()

    def compiled(*args):
        def noted(**inputs):
            shapes.add((inputs["input_ids"].shape, inputs["attention_mask"].shape, inputs["position_ids"].shape))
            return model(**inputs)

        return noted

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda self, given, settings: True)
    monkeypatch.setattr(type(model), "get_compiled_call", compiled)
    for longest in (3, 90, 240):
        prompts = [[5] * longest, [6, 7]]
        sample(model, prompts, Sampling(12, temperature=1.0), seeds=[1, 2], backend=by_compiled_generate)
    assert shapes == {((2, 1), (2, 1, 1, 256), (2, 1))}
    assert static_cache(model, 257).layers[0].max_cache_len == 512


def test_compiled_passes_are_for_a_gpu_and_for_models_that_have_them(tmp_path, monkeypatch, caplog):
    run = trainer(tmp_path, rollout_compile=True)
    assert "rollout_compile has no effect on a CPU" in caplog.text
    student = run.student
    with run._backend(student) as backend:
        assert backend == "generate"
    monkeypatch.setattr(type(student), "device", torch.device("cuda"))
    with run._backend(student) as backend:
        assert backend is by_compiled_generate
    with pytest.raises(
        UsageError, match=r"^rollout_compile is True; .* False for LlamaForCausalLM: its weights are sh"
    ):
        check_rollouts(student, run.args, sharded=True)
    settings = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings))
    with pytest.raises(UsageError, match=r"it must be False for MambaForCausalLM: it cannot keep its keys and values"):
        check_rollouts(mamba, run.args, sharded=False)
    for name, value in {
        "rollout_backend": "continuous",
        "rollout_draft": "history",
        "rollout_batch_size": "auto",
    }.items():
        with pytest.raises(UsageError, match=f"^rollout_compile is True and {name} '{value}'; it must be False"):
            trainer(tmp_path, rollout_compile=True, **{name: value})
