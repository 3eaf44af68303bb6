"""Rollouts by vLLM against those by transformers, on models that fit in a test; it serves heads of 32 and more."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sdft import SDFTConfig, SDFTTrainer
from sdft.errors import TrainingError, UsageError
from sdft.rollouts import engine as engines
from sdft.rollouts import vllm as by_vllm
from sdft.rollouts.generate import write
from sdft.rollouts.interface import LENGTH, TOKEN, Request, Sampling
from sdft.rollouts.vllm import VllmRollouts
from tests import tiny

PROMPTS = [[10, 11, 12], [20], list(range(30, 50)), [40, 41]]
GREEDY = Sampling(24, frozenset({1}))
DRAWN = Sampling(24, frozenset({1}), temperature=1.0, logprobs=True)


def model(**options):
    return tiny.tiny_model(**{"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, **options})


def qwen(**options):
    config = tiny.tiny_model().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "initializer_range")
    shape = {name: config[name] for name in names} | {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    }
    torch.manual_seed(2)
    return Qwen3ForCausalLM(Qwen3Config(**shape, max_position_embeddings=160, eos_token_id=1, **options)).eval()


def engine(of, dtype=torch.float32, longest=60):
    return VllmRollouts(of, longest=longest, dtype=dtype, memory_share=0.02, probe=PROMPTS[0])


def moved(of, by=0.05):
    """Other weights, as after a step."""
    with torch.no_grad():
        for parameter in of.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def requests(seeds=False):
    return [Request(prompt, 2**62 + number if seeds else None) for number, prompt in enumerate(PROMPTS)]


def tokens(completions):
    return [completion.tokens for completion in completions]


def assert_writes_as_generate(served, learner, updates=1):
    bare = learner.get_base_model() if hasattr(learner, "get_base_model") else learner
    for _ in range(updates):
        with served.serving(bare) as backend:
            written = write(bare, requests(), GREEDY, backend=backend)
        assert tokens(written) == tokens(write(bare, requests(), GREEDY))
        served.check(bare)
        moved(learner)


@pytest.mark.parametrize("make", [model, lambda: model(tied=True), qwen], ids=["llama", "llama, tied", "qwen3"])
def test_after_each_update_it_writes_what_generate_writes(make):
    learner = make()
    assert_writes_as_generate(engine(learner), learner, updates=5)


def states_of_generators():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_random_numbers_threads_and_processes_are_as_before():
    learner, threads, before = model(), torch.get_num_threads(), torch.set_num_threads
    states = states_of_generators()
    served = engine(learner)
    with served.serving(learner) as backend:
        write(learner, requests(seeds=True), DRAWN, backend=backend)
    assert states_of_generators() == states
    assert torch.get_num_threads() == threads and torch.set_num_threads is before
    assert SDFTConfig(output_dir="runs/none", use_cpu=True).world_size == 1


def test_seeded_rollouts_do_not_depend_on_their_batch_and_say_with_which_probability_they_were_drawn():
    learner = model()
    served = engine(learner)
    with served.serving(learner) as backend:
        together = write(learner, requests(seeds=True), DRAWN, backend=backend)
        alone = write(learner, requests(seeds=True)[::-1], DRAWN, backend=backend, batch_size=1)[::-1]
        others = write(learner, requests(), DRAWN, backend=backend)
    assert tokens(alone) == tokens(together) != tokens(others)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logprobs = learner(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), own, atol=1e-3, rtol=0)


def test_many_prompts_with_seeds_are_not_read_in_pieces():
    """vLLM takes back random numbers of a prompt that it has read in part, which a CPU's generator cannot."""
    learner = model(max_position_embeddings=600)
    asked = [Request([5 + (place + n) % 90 for place in range(450)], n) for n in range(12)]  # 5,400 tokens in all
    with engine(learner, longest=500).serving(learner) as backend:
        written = write(learner, asked, Sampling(3, temperature=1.0), backend=backend)
    assert [len(completion.tokens) for completion in written] == [3] * 12


def test_a_completion_ends_with_its_token_and_not_before():
    learner = model()
    served = engine(learner)
    with served.serving(learner) as backend:
        (whole,) = write(learner, [Request(PROMPTS[0])], Sampling(24), backend=backend)
        end = whole.tokens[5]
        first = whole.tokens.index(end)
        (ended,) = write(learner, [Request(PROMPTS[0])], Sampling(24, frozenset({end})), backend=backend)
    assert len(whole.tokens) == 24 and whole.end == LENGTH
    assert ended.tokens == whole.tokens[: first + 1] and ended.end == TOKEN


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"target_modules": "all-linear"}),
        (True, {"target_modules": "all-linear", "use_rslora": True}),
        (True, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        (False, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["embed_tokens", "v_proj"]}),
    ],
    ids=["lora", "tied, rslora", "tied, dora", "head", "tied embeddings"],
)
def test_an_adapter_is_served_and_stays_as_it_is(tied, options):
    from peft import LoraConfig, get_peft_model

    learner = get_peft_model(model(tied=tied), LoraConfig(r=4, lora_alpha=8, **options)).eval()
    served = engine(learner.get_base_model())
    moved(learner, 0.2)
    before = {name: weight.clone() for name, weight in learner.state_dict().items()}
    with served.serving(learner.get_base_model()):
        pass
    assert all(torch.equal(before[name], weight) for name, weight in learner.state_dict().items())
    assert_writes_as_generate(served, learner, updates=2)


def test_weights_that_were_not_pushed_are_found(monkeypatch):
    learner = model()
    served = engine(learner)
    whole = engines.weights_of
    monkeypatch.setattr(by_vllm, "weights_of", lambda of: (p for p in whole(of) if "layers.1.mlp.down" not in p[0]))
    with pytest.raises(TrainingError, match=r"not model.layers.1.mlp.down_proj.weight"):
        served.push(learner)
    stale = dict(whole(model()))
    monkeypatch.setattr(
        by_vllm, "weights_of", lambda of: ((n, stale[n] if "1.mlp.down" in n else w) for n, w in whole(of))
    )
    moved(learner)
    served.push(learner)
    with pytest.raises(TrainingError, match="other log-probabilities than LlamaForCausalLM has"):
        served.check(learner)


def test_the_check_takes_rounding_in_bfloat16_for_what_it_is():
    learner = model(initializer_range=0.1).bfloat16()
    served = engine(learner, torch.bfloat16)
    with torch.no_grad():
        learner.lm_head.weight.mul_(-1)
    with pytest.raises(TrainingError, match=r"rounding in torch\.bfloat16"):
        served.check(learner)


def test_a_model_that_vllm_cannot_serve_is_one_sentence():
    with pytest.raises(
        UsageError,
        match=r"^rollout_backend is 'vllm', which cannot serve LlamaForCausalLM in .*: .*[Hh]ead.*\(it may be",
    ):
        engine(model(head_dim=16))


def losses(folder, backend, make=model, **options):
    settings = {"max_steps": 5, "learning_rate": 1e-2, "rollout_backend": backend, **options}
    run = SDFTTrainer(
        make(),
        SDFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_completion_length=12,
            teacher_template="turn",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=tiny.rows(),
        processing_class=tiny.tiny_tokenizer(),
    )
    run.train()
    return [line for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("tied", [False, True])
def test_training_with_it_is_training_with_generate(tied, tmp_path):
    options = {"rollout_top_k": 1, "make": lambda: model(tied=tied)}
    ours, theirs = (losses(tmp_path / name, name, **options) for name in ("generate", "vllm"))
    assert len(theirs) == 5 and len({line["loss"] for line in theirs}) == 5
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=1e-4)


def test_the_log_has_how_far_it_draws_from_other_probabilities(tmp_path):
    for line in losses(tmp_path, "vllm"):
        assert 0 < line["rollout_gap"] < 1e-3


def test_mixed_precision_is_served_in_its_type(tmp_path):
    for line in losses(tmp_path, "vllm", bf16=True):
        assert 0 < line["rollout_gap"] < 0.25


def check_a_step_ahead(folder, **options):
    """Where nothing is learned, rollouts a step ahead are those of their own step; where something is, they are not."""
    ours, theirs = (losses(folder / str(lag), "vllm", learning_rate=0.0, rollout_lag=lag, **options) for lag in (0, 1))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=1e-5)
    assert [line["rollout_lag"] for line in theirs] == [0, 1, 1, 1, 0]
    learned = losses(folder / "learned", "vllm", rollout_lag=1, **options)
    gaps = [line["rollout_gap"] for line in learned]
    assert max(gaps[0], gaps[4]) < 1e-3 < 1e-2 < min(gaps[1:4])  # the weights of now, and those before an update


def test_a_step_ahead(tmp_path):
    check_a_step_ahead(tmp_path)
