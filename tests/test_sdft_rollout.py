import pytest
import torch
from transformers import GenerationConfig

from sdft.errors import TrainingError
from sdft.models import eos_token_ids
from sdft.rollout import cut, generate, seeded
from tests import tiny

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35]]
NO_EOS = frozenset()


@torch.no_grad()
def greedy_alone(model, prompt, count):
    """One prompt, no padding, no cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_batched_greedy_is_what_each_prompt_gives_alone():
    model = tiny.tiny_model()
    together = generate(model, PROMPTS, max_new_tokens=12, eos_ids=NO_EOS)
    assert together == [greedy_alone(model, prompt, 12) for prompt in PROMPTS]


def test_every_declared_end_of_sequence_id_ends_a_rollout():
    model = tiny.tiny_model()
    endless = generate(model, PROMPTS, max_new_tokens=12, eos_ids=NO_EOS)
    ends = frozenset({endless[0][3], endless[1][5]})
    for row, rollout in zip(endless, generate(model, PROMPTS, max_new_tokens=12, eos_ids=ends), strict=True):
        assert rollout == cut(row, ends)
    assert cut([5, 6, 7, 6], frozenset({6})) == [5, 6]
    assert cut([5, 6], frozenset()) == [5, 6]


def test_end_of_sequence_ids_come_from_generation_settings_model_and_tokenizer():
    model, tokenizer = tiny.tiny_model(eos_token_id=7), tiny.tiny_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[8, 9])
    assert eos_token_ids(model, tokenizer) == {7, 8, 9, tokenizer.eos_token_id}


def test_the_models_own_generation_defaults_are_set_aside_and_put_back():
    model = tiny.tiny_model()
    expected = generate(model, PROMPTS, max_new_tokens=8, eos_ids=NO_EOS)
    defaults = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    model.generation_config = defaults
    assert generate(model, PROMPTS, max_new_tokens=8, eos_ids=NO_EOS) == expected
    assert model.generation_config is defaults


def test_generation_under_gradient_checkpointing_uses_the_cache_and_restores_training_mode(monkeypatch):
    model = tiny.tiny_model()
    expected = generate(model, PROMPTS, max_new_tokens=8, eos_ids=NO_EOS)
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    lengths = []
    forward = model.model.forward

    def watched(*args, **kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", watched)
    assert generate(model, PROMPTS, max_new_tokens=8, eos_ids=NO_EOS) == expected
    assert lengths == [6] + [1] * 7
    assert model.training


def test_sampling_follows_the_models_own_distribution():
    model = tiny.tiny_model()
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    torch.manual_seed(0)
    first = [r[0] for r in generate(model, [PROMPTS[0]] * 4000, max_new_tokens=1, eos_ids=NO_EOS, temperature=0.7)]
    measured = torch.bincount(torch.tensor(first), minlength=101) / 4000
    assert (measured - expected).abs().sum() < 0.25  # about 0.15 is expected of 4000 draws
    top = generate(model, [PROMPTS[0]] * 50, max_new_tokens=1, eos_ids=NO_EOS, temperature=0.7, top_k=1)
    assert {r[0] for r in top} == {expected.argmax().item()}


def test_random_numbers_depend_on_the_seed_alone_and_disturb_nothing():
    def draw(*entropy):
        with seeded(torch.device("cpu"), *entropy):
            return torch.rand(4).tolist()

    torch.manual_seed(5)
    undisturbed = torch.rand(2)
    torch.manual_seed(5)
    first = draw(0, 3, 1)
    assert torch.equal(torch.rand(2), undisturbed)
    assert draw(0, 3, 1) == first
    assert len({tuple(draw(*e)) for e in [(0, 3, 1), (1, 3, 1), (0, 4, 1), (0, 3, 2), (3, 0, 1)]}) == 5


def test_a_student_that_is_no_longer_finite_is_a_training_error():
    model = tiny.tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="no longer finite"):
        generate(model, PROMPTS, max_new_tokens=2, eos_ids=NO_EOS, temperature=1.0)
