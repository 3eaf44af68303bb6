"""Drafts: rollouts in fewer passes of the model, and the same tokens as without them."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdft.errors import UsageError
from sdft.rollouts.drafts import _Pace, _Row, check_drafts
from sdft.rollouts.generate import write
from sdft.rollouts.interface import Completion, Request, Sampling
from sdft.rollouts.known_texts import KnownTexts
from sdft.settings.config import SDFTConfig
from tests import tiny
from tests.test_sdft_rollout import byte_tokenizer
from tests.test_sdft_trainer import trained, trainer


def damaged(tokens, random_):
    """A text that resembles the tokens: some are others, left out or added, or it is another text altogether."""
    draft = list(tokens)
    if random_.random() < 0.15:
        return [random_.randint(5, 95) for _ in range(random_.randint(0, 20))]
    for _ in range(random_.choice([0, 1, 3, 8])):
        place, kind = random_.randint(0, max(len(draft) - 1, 0)), random_.randint(0, 2)
        if kind == 0:
            draft.insert(place, random_.randint(5, 95))
        elif draft:
            draft[place : place + 1] = [random_.randint(5, 95)] if kind == 1 else []
    return draft


def drawn_case(random_):
    """Prompts with seeds, and how they are answered: batches, temperatures, cut-offs, ends and stop strings."""
    count = random_.randint(1, 5)
    prompts = [[random_.randint(5, 95) for _ in range(random_.randint(1, 30))] for _ in range(count)]
    temperature = random_.choice([None, 0.05, 0.5, 1.0, 1.5])
    cut_off = random_.choice([{}, {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}]) if temperature else {}
    ends = frozenset(random_.sample(range(5, 95), random_.randint(0, 4)))
    stop = (chr(random_.randint(65, 90)),) if random_.random() < 0.3 else ()
    sampling = Sampling(random_.randint(1, 12), ends, temperature, stop=stop, logprobs=True, **cut_off)
    return [Request(prompt, random_.randint(0, 9999)) for prompt in prompts], sampling


@pytest.mark.parametrize("cases", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_tokens_are_those_without_drafts(cases):
    """The passes are fewer where drafts are right."""
    model, tokenizer, random_ = tiny.tiny_model(), byte_tokenizer(), random.Random(cases)
    tokens = passes = 0
    for _ in range(cases):
        requests, sampling = drawn_case(random_)
        plain = write(model, requests, sampling, tokenizer=tokenizer)
        drafts = [damaged(completion.tokens, random_) for completion in plain]
        right = random_.choice([0.1, 0.5, 0.9, 1.0])
        helped = [Request(r.prompt, r.seed, draft, right) for r, draft in zip(requests, drafts, strict=True)]
        written = write(model, helped, sampling, tokenizer=tokenizer)
        assert [(c.tokens, c.end) for c in written] == [(c.tokens, c.end) for c in plain]
        for one, other in zip(written, plain, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert one.accepted <= one.drafted and one.passes <= len(one.tokens)
            assert one.accepted <= one.foreseen <= len(one.tokens)
        tokens += sum(len(c.tokens) for c in written if c.passes)
        passes += sum(c.passes for c in written)
    assert passes < tokens


def test_a_draft_that_is_right_is_read_in_one_pass_where_a_pass_takes_one_time(monkeypatch):
    monkeypatch.setattr(_Pace, "seconds", lambda self, tokens: 1.0)
    model = tiny.tiny_model()
    request, sampling = Request([5, 6, 7], 3), Sampling(30, temperature=1.0)
    (plain,) = write(model, [request], sampling)
    # In the first batch nothing is known of passes, and the prompt's pass draws the first token alone.
    for drafted, passes in ((28, 2), (29, 1)):
        (written,) = write(model, [Request([5, 6, 7], 3, plain.tokens)], sampling)
        assert written.tokens == plain.tokens and written.foreseen == 30
        assert (written.drafted, written.accepted, written.passes) == (drafted, drafted, passes)


def test_where_each_token_of_a_pass_takes_its_time_nothing_is_read_ahead(monkeypatch):
    monkeypatch.setattr(_Pace, "seconds", lambda self, tokens: tokens)
    model = tiny.tiny_model()
    (plain,) = write(model, [Request([5, 6, 7], 3)], Sampling(20, temperature=1.0))
    draft = [token + (place % 2) for place, token in enumerate(plain.tokens)]
    (written,) = write(model, [Request([5, 6, 7], 3, draft, 0.4)], Sampling(20, temperature=1.0))
    assert written.tokens == plain.tokens and written.drafted == 0


def test_a_row_finds_its_place_in_the_draft_again():
    row = _Row(0, 1, [1, 2, 3, 4, 5, 6, 7])
    for token, expected in (
        (1, [2, 3, 4]),
        (2, [3, 4, 5]),
        (9, []),  # another token, which may stand for the 3
        (4, [5, 6, 7]),
        (8, []),
        (3, []),
        (4, [5, 6, 7]),  # after 3, 4
        (1, []),
        (2, [3, 4, 5]),
    ):
        row.follow(token)
        assert list(row.proposal(3)) == expected


def test_pace_tells_what_a_pass_takes_from_what_each_token_does():
    pace = _Pace()
    pace.add(100, 1.0)
    assert pace.seconds(50) == pytest.approx(0.5)  # one pass says nothing of what is fixed
    pace.add(10, 0.55)
    for tokens in (10, 20, 400):
        assert pace.seconds(tokens) == pytest.approx(0.5 + 0.005 * tokens)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {}, None),
        ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}, None),
        ("gpt_neox", {}, None),
        ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48}, None),
        ("gemma3_text", {"head_dim": 16}, "it keeps something else than keys and values of all tokens"),
        ("mamba", {}, "it keeps something else than keys and values of all tokens"),
        ("bloom", {}, None),
        ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2}, "a token that is masked changes what comes after it"),
    ],
)
def test_models_that_cannot_read_drafts_are_found(name, options, reason):
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **options))
    assert check_drafts(model.eval()) == reason


def test_sources_of_drafts():
    row = {"prompt_ids": [5, 6], "draft_ids": [7, 8]}
    history = KnownTexts("history")
    history.note(row, 1, Completion([9, 10]))
    assert list(history.draft(row, 1)) == [9, 10] and list(history.draft(row, 0)) == []
    history.note(row, 1, Completion([11]))
    assert list(history.draft({"prompt_ids": [5, 6]}, 1)) == [11] and list(history.draft({"prompt_ids": [5]}, 1)) == []
    assert KnownTexts("demonstration").draft(row, 3) == [7, 8]
    for other in (KnownTexts("none"), KnownTexts("demonstration")):
        other.note(row, 0, Completion([9]))
    assert list(KnownTexts("none").draft(row, 0)) == []
    for _ in range(50):
        history.note(row, 1, Completion([9, 10, 11, 12], passes=2, foreseen=3))
        history.note(row, 0, Completion([9]))  # written without a draft, which says nothing of drafts
    assert history.right == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("source", ["demonstration", "history"])
def test_a_run_with_drafts_is_the_run_without(source, tmp_path):
    options = {"num_train_epochs": 3, "max_steps": -1, "rollout_temperature": 0.05, "rollouts_per_prompt": 2}
    plain, helped = (trained(tmp_path / draft, rollout_draft=draft, **options) for draft in ("none", source))
    for one, other in zip(plain.state.log_history[:-1], helped.state.log_history[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    last = [log for log in helped.state.log_history if "loss" in log][-1]
    assert 0 <= last["draft_accepted"] <= 1 <= last["tokens_per_pass"]
    assert not any("tokens_per_pass" in log for log in plain.state.log_history)
    if source == "history":
        assert "tokens_per_pass" not in helped.state.log_history[0]  # in the first epoch nothing is known


def test_drafts_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(UsageError, match="rollout_draft is 'history'; it must be none where rollout_backend is 'cont"):
        SDFTConfig(output_dir=str(tmp_path), rollout_draft="history", rollout_backend="continuous")
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(UsageError, match="it must be none for Gemma3ForCausalLM: it keeps something else"):
        trainer(tmp_path, model=AutoModelForCausalLM.from_config(config), rollout_draft="history")


def test_drafts_are_left_where_tokens_are_drawn_without_seeds():
    torch.manual_seed(0)
    (completion,) = write(tiny.tiny_model(), [Request([5, 6], None, [7, 8, 9])], Sampling(4, temperature=1.0))
    assert len(completion.tokens) == 4 and not completion.passes
