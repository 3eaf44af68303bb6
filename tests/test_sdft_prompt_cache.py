"""Prompts that the teacher has read: the same hidden states as without keeping any, and no more than the budget."""

import pytest
import torch

from sdft.batch import Sample, lay_out
from sdft.errors import TrainingError
from sdft.head import backbone, hidden_states
from sdft.prompt_cache import PromptCache, check_prompt_cache
from tests import tiny
from tests.test_sdft_architectures import FAMILIES, build
from tests.test_sdft_lora import with_adapter
from tests.test_sdft_trainer import trained, weights

SAMPLES = [
    Sample([], [1, 2, 3, 4, 5, 6], [5, 6, 7, 8, 9, 10, 11]),
    Sample([], [7, 8], list(range(20, 32))),
    Sample([], [], [50, 51, 52]),
    Sample([], list(range(9, 17)), [40]),
]
REFUSED = {
    "falcon_h1, multiplier": "remembers what it has read in more than keys and values",
    "recurrent_gemma": "remembers what it has read in more than keys and values",
    "llama4_text": "reads a prompt differently when what follows is long",
}


def without(model, samples, skip_tokens=0):
    batch = lay_out(samples, skip_tokens)
    return hidden_states(model, batch["teacher_input_ids"], batch["teacher_positions"])


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_hidden_states_are_those_of_whole_sequences(family):
    model = build(family, 0)
    prompts = PromptCache(10**9)
    for skip_tokens in (0, 2):  # the second time from what the first has kept
        with torch.no_grad():
            expected = without(model, SAMPLES, skip_tokens)
        assert_same(prompts.hidden_states(backbone(model), SAMPLES, skip_tokens), expected)
    check_prompt_cache(model, backbone(model), [5, 6, 7, 8, 9, 10])


@pytest.mark.parametrize(("family", "reason"), REFUSED.items())
def test_a_model_with_another_kind_of_memory_is_refused(family, reason):
    model = build(family, 0)
    with pytest.raises(TrainingError, match=rf"{reason}, so that .*: teacher_cache_gib must be 0"):
        check_prompt_cache(model, backbone(model), [5, 6, 7, 8])


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_model_that_turns_positions_by_the_length_of_the_whole_is_refused(kind):
    model = tiny.tiny_model()
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4}
    with pytest.raises(TrainingError, match="reads a prompt differently when what follows is long"):
        check_prompt_cache(model, model.model, [5, 6, 7, 8])


def test_a_model_that_kept_prompts_change_is_refused(monkeypatch):
    model = tiny.tiny_model()
    original = model.model.forward

    def after_a_prompt(position_ids=None, **given):
        return original(position_ids=None if position_ids is None else position_ids + 3, **given)

    monkeypatch.setattr(model.model, "forward", after_a_prompt)
    with pytest.raises(TrainingError, match=r"hidden states differ by [\d.]+ of the largest.*must be 0"):
        check_prompt_cache(model, model.model, [5, 6, 7, 8])


def test_each_prompt_is_read_once_and_alone_until_it_is_dropped(monkeypatch):
    model = tiny.tiny_model()
    read = []
    original = model.model.forward

    def forward(**given):
        if given.get("position_ids") is None:
            read.append(given["input_ids"].tolist())
        return original(**given)

    monkeypatch.setattr(model.model, "forward", forward)
    a, b, c = [5, 6, 7, 8], [9, 10, 11, 12, 13], [14, 15, 16]
    token = 2 * 2 * 2 * 8 * 4  # bytes of keys and values: two layers, two heads of width 8, float32
    prompts = PromptCache(8 * token)

    def score(*wanted):
        prompts.hidden_states(model.model, [Sample([], [1, 2], prompt) for prompt in wanted], 0)
        assert prompts.nbytes <= prompts.budget

    score(a, a, b, a)
    assert read == [[a[:-1]], [b[:-1]]] and prompts.nbytes == 7 * token and a in prompts and b in prompts
    score(a)
    assert len(read) == 2
    score(c)  # room for it only without b, which was asked for before a
    assert read[2:] == [[c[:-1]]] and a in prompts and b not in prompts and c in prompts
    score(list(range(20, 40)))  # of itself more than the budget: read, used and not kept
    assert len(read) == 4 and prompts.nbytes == 5 * token and a in prompts and c in prompts


def test_what_is_kept_changes_no_number():
    model = tiny.tiny_model()
    kept, forgetful = PromptCache(10**9), PromptCache(0)
    for samples in (SAMPLES[:2], SAMPLES[1:], SAMPLES):
        first = kept.hidden_states(model.model, samples, 0)
        assert torch.equal(first, forgetful.hidden_states(model.model, samples, 0))


@pytest.mark.parametrize(
    "settings",
    [
        {"rollouts_per_prompt": 2},
        {"activation_checkpointing": True, "model": with_adapter},
        {"max_forward_tokens": 60, "log_completions": 2, "skip_tokens": 1},
    ],
    ids=["several rollouts", "adapter", "pieces"],
)
def test_a_run_is_the_same_as_without(settings, tmp_path):
    model = settings.pop("model", tiny.tiny_model)
    plain, cached = (
        trained(tmp_path / str(gib), model=model(), rows=tiny.rows(4), teacher_cache_gib=gib, **settings)
        for gib in (0, 0.5)
    )
    assert plain.prompt_cache is None
    assert all(row["teacher_prompt_ids"] in cached.prompt_cache for row in cached.train_dataset)
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    expected = weights(plain.model)
    for name, tensor in weights(cached.model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_under_mixed_precision_the_first_loss_is_the_same_but_for_rounding(tmp_path):
    settings = {"bf16": True, "max_steps": 1, "learning_rate": 0.0}
    losses = [
        trained(tmp_path / str(gib), teacher_cache_gib=gib, **settings).state.log_history[0]["loss"] for gib in (0, 0.5)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
