import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from sdft.attention import of_any_length
from sdft.errors import TrainingError, UsageError
from sdft.models.load import eos_token_ids
from sdft.rollouts import choice
from sdft.rollouts.continuous import PAGE, STEP_TOKENS
from sdft.rollouts.generate import (
    BACKENDS,
    batches_by_length,
    by_compiled_generate,
    generate,
    register_backend,
    sample,
    seeded,
    write,
)
from sdft.rollouts.interface import Completion, Request, Sampling, cut, finished
from sdft.rollouts.stop_strings import stopped_length
from tests import tiny

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35]]
NO_EOS = frozenset()
both = pytest.mark.parametrize("backend", ["generate", "continuous"])


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
        end = min((position for position, token in enumerate(row) if token in ends), default=12)
        assert rollout == row[: end + 1]
    assert cut(Completion([5, 6, 7, 6], [-1.0, -2.0, -3.0, -4.0]), Sampling(9, frozenset({6}))) == Completion(
        [5, 6], [-1.0, -2.0], "token"
    )
    assert cut(Completion([5, 6]), Sampling(9)) == Completion([5, 6], None, "length")
    assert cut(Completion([5, 6]), Sampling(1)) == Completion([5], None, "length")


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
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # 5.17 has the older name
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


@pytest.mark.parametrize("backend", [*BACKENDS, by_compiled_generate], ids=[*BACKENDS, "compiled"])
@pytest.mark.parametrize("draft", [(), (40, 41, 42)])
def test_rollouts_are_written_without_attention_that_prepares_for_each_length(monkeypatch, backend, draft):
    monkeypatch.setattr(choice, "of_any_length", lambda device: of_any_length(torch.device("cuda")))
    model = tiny.tiny_model()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    write(model, [Request(prompt, draft=draft) for prompt in PROMPTS], Sampling(4), backend=backend)
    assert seen and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_is_left_as_it_was():
    with of_any_length(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(ValueError, match="broken"), of_any_length(torch.device("cuda")):
        raise ValueError("broken")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with of_any_length(torch.device("cuda")):
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


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


SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "cohere": {"num_key_value_heads": 4},
    "gpt2": {},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_backends_write_the_same_greedy_completions(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **ARCHITECTURES[name])).eval()
    long = [(7 * n) % 100 for n in range(80)]  # several pages of the cache, which the two prompts share
    prompts = [*PROMPTS, [*long, 3], [*long, 5], [*long, 3]]
    endless = sample(model, prompts, Sampling(40))
    sampling = Sampling(40, eos_ids=frozenset({endless[0][20], endless[3][30]}))
    expected = sample(model, prompts, sampling)
    assert sorted(map(len, expected)) != [40] * 6
    assert expected[3] == expected[5] != expected[4]
    assert sample(model, prompts, sampling, backend="continuous") == expected


def test_continuous_batching_leaves_the_model_and_the_random_numbers_as_they_were():
    model = tiny.tiny_model()
    model.set_attn_implementation("eager")
    expected = sample(model, PROMPTS, Sampling(12))
    model.train()
    defaults = model.generation_config = GenerationConfig(repetition_penalty=5.0, max_new_tokens=3)
    before = torch.get_rng_state()
    assert sample(model, PROMPTS, Sampling(12), backend="continuous") == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.generation_config is defaults
    assert model.config._attn_implementation == "eager"


def test_continuous_batching_samples_by_torchs_seed_or_by_the_prompts_own():
    model = tiny.tiny_model()

    def draw(seed, **options):
        with seeded(torch.device("cpu"), seed):
            return sample(model, PROMPTS * 2, Sampling(8, temperature=1.0), backend="continuous", **options)

    first = draw(1)
    assert draw(1) == first
    assert draw(2, seeds=range(6)) == draw(3, seeds=range(6)) != first


@pytest.mark.parametrize("restriction", [{}, {"top_p": 0.9, "top_k": 30, "min_p": 0.01}], ids=str)
def test_with_seeds_both_backends_draw_the_same_whatever_is_beside(restriction):
    model = tiny.tiny_model()
    prompts = [*PROMPTS, [(7 * n) % 100 for n in range(80)], *PROMPTS]
    seeds = [11, 12, 13, 14, 21, 22, 23]
    sampling = Sampling(30, frozenset({40, 41, 42}), temperature=1.3, **restriction)
    expected = sample(model, prompts, sampling, seeds=seeds)
    assert expected[:3] != expected[4:]
    assert len(set(map(len, expected))) > 3
    assert sample(model, prompts, sampling, seeds=seeds, backend="continuous") == expected
    assert sample(model, prompts[2:], sampling, seeds=seeds[2:], backend="continuous") == expected[2:]
    assert sample(model, prompts, sampling, seeds=seeds, batch_size=2) == expected
    assert sample(model, prompts, sampling, seeds=seeds, batch_size=3, backend="continuous") == expected


@both
def test_seeded_sampling_of_a_model_that_is_not_finite_is_refused_too(backend):
    model = tiny.tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the model's logits are no longer finite"):
        sample(model, PROMPTS, Sampling(2, temperature=1.0), seeds=[1, 2, 3], backend=backend)


def test_an_attention_that_continuous_batching_lacks_is_refused_in_one_sentence():
    model = tiny.tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(TrainingError, match=r"LlamaForCausalLM with flex_attention attention in torch\.float32 on cpu"):
        sample(model, PROMPTS, Sampling(4), backend="continuous")
    assert model.config._attn_implementation == "flex_attention"


def test_a_cache_that_finds_no_room_says_what_to_change(monkeypatch):
    monkeypatch.setitem(PAGE, "cpu", 2**40)
    with pytest.raises(TrainingError, match="a smaller rollout_batch_size needs less"):
        sample(tiny.tiny_model(), PROMPTS, Sampling(4), backend="continuous")


@both
def test_a_model_that_is_not_finite_cannot_be_sampled(backend):
    model = tiny.tiny_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the model's logits are no longer finite"):
        sample(model, PROMPTS, Sampling(2, temperature=1.0), backend=backend)


@both
@pytest.mark.parametrize("restriction", [{"min_p": 0.2}, {"top_p": 0.5}, {"top_k": 3}], ids=str)
def test_sampling_keeps_to_the_tokens_that_it_is_restricted_to(restriction, backend):
    model = tiny.tiny_model()
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1)
    order = p.argsort(descending=True)
    kept = {
        "min_p": (p >= 0.2 * p.max()).nonzero().flatten(),
        "top_p": order[: int((p[order].cumsum(0) < 0.5).sum()) + 1],
        "top_k": order[:3],
    }[next(iter(restriction))]
    assert 1 < len(kept) < 50
    torch.manual_seed(0)
    draws = sample(model, [PROMPTS[0]] * 400, Sampling(1, temperature=1.5, **restriction), backend=backend)
    measured = torch.bincount(torch.tensor(draws).flatten(), minlength=101) / 400
    assert set(measured.nonzero().flatten().tolist()) <= set(kept.tolist())
    expected = torch.zeros(101).index_put((kept,), p[kept] / p[kept].sum())
    assert (measured - expected).abs().sum() < 0.3  # about 0.15 is expected of 400 draws from ten tokens


# Stop strings


def byte_tokenizer():
    """A token for each byte, and one for "ab"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two", ["two"], "one two"),
        ("one two one", ["one", "two"], "one"),
        ("xyxyz", ["xyz", "none"], "xyxyz"),
        ("so é ü", ["é"], "so é"),
        ("so é ü", [" ü", "so é ü!"], "so é ü"),
        ("xabc", ["a"], "xab"),
        ("a\n\nb", ["\n\n"], "a\n\n"),
        ("one<eos>two", ["<eos>t"], "one<eos>t"),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_the_first_stop_string(text, stop, kept):
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    sampling = Sampling(99, stop=tuple(stop))
    completion = cut(Completion(tokens), sampling, tokenizer)
    assert tokenizer.decode(completion.tokens) == kept and completion.end == "string"
    assert finished(completion.tokens, sampling, tokenizer)
    assert not finished(completion.tokens[:-1], sampling, tokenizer)


def test_without_a_stop_string_in_it_a_completion_stays_as_it_is():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("one two")["input_ids"]
    assert stopped_length(tokens, ["three"], tokenizer) is None
    assert stopped_length([], ["three"], tokenizer) is None
    assert cut(Completion(tokens), Sampling(99, stop=("three",)), tokenizer) == Completion(tokens)
    assert not finished(tokens, Sampling(99, stop=("three",)), tokenizer)
    assert finished(tokens, Sampling(99, frozenset({tokens[-1]}), stop=("three",)), tokenizer)


def first_stop(tokens, stop, tokenizer):
    """The length at which one of the stop strings is first in the text, tried one token after the other."""
    counts = range(1, len(tokens) + 1)
    return next((n for n in counts if any(s in tokenizer.decode(tokens[:n]) for s in stop)), len(tokens))


@both
def test_rollouts_end_at_stop_strings(backend, monkeypatch):
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    endless = sample(model, PROMPTS, Sampling(24))
    stop = (tokenizer.decode(endless[0][5:8]), tokenizer.decode(endless[2][1:3]), tokenizer.decode(endless[1][14:16]))
    ends = [first_stop(tokens, stop, tokenizer) for tokens in endless]
    assert ends == [8, 16, 3]
    unseen = min(set(range(101)) - {token for tokens in endless for token in tokens})
    forward, steps = model.model.forward, []
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    sampling = Sampling(24, frozenset({unseen}), stop=stop)
    stopped = sample(model, PROMPTS, sampling, tokenizer=tokenizer, backend=backend)
    assert stopped == [tokens[:end] for tokens, end in zip(endless, ends, strict=True)]
    assert len(steps) == max(ends) + (backend == "continuous")  # which ends a completion by one more token
    without_end = Sampling(24, stop=stop)
    assert sample(model, PROMPTS, without_end, tokenizer=tokenizer, backend=backend) == stopped
    drawn = Sampling(24, frozenset({unseen}), temperature=1e-3, stop=stop)
    for seeds in (None, [1, 2, 3]):
        assert sample(model, PROMPTS, drawn, tokenizer=tokenizer, backend=backend, seeds=seeds) == stopped


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(UsageError, match="tokenizer is not set"):
        sample(tiny.tiny_model(), PROMPTS, Sampling(4, stop=("x",)))


# Batches and back-ends


def test_batches_hold_prompts_of_similar_length_and_results_keep_their_order(monkeypatch):
    assert batches_by_length([3, 1, 6, 2], 2) == [[2, 0], [3, 1]]
    assert batches_by_length([3, 1, 6], None) == batches_by_length([3, 1, 6], 3) == [[0, 1, 2]]
    assert batches_by_length([], None) == batches_by_length([], 2) == []
    seen = []

    def echo(model, requests, sampling, tokenizer):
        seen.append([len(request.prompt) for request in requests])
        return [Completion([len(request.prompt)]) for request in requests]

    monkeypatch.setitem(BACKENDS, "echo", echo)
    prompts = [[0] * length for length in (2, 5, 1, 4, 3)]
    assert sample(tiny.tiny_model(), prompts, Sampling(4), backend="echo", batch_size=2) == [[2], [5], [1], [4], [3]]
    assert seen == [[5, 4], [3, 2], [1]]


def test_a_backend_of_ones_own_can_be_named_and_is_held_to_its_contract(monkeypatch):
    monkeypatch.setattr("sdft.rollouts.generate.BACKENDS", dict(BACKENDS))
    model = tiny.tiny_model()
    register_backend("own", lambda model, requests, *_: [Completion([5, 6, 7, 8]) for _ in requests])
    assert sample(model, PROMPTS, Sampling(3, frozenset({6})), backend="own") == [[5, 6]] * 3
    register_backend("short", lambda *_: [Completion([5])])
    with pytest.raises(TrainingError, match="'short' gave 1 completion for 3 prompts"):
        sample(model, PROMPTS, Sampling(3), backend="short")
    with pytest.raises(UsageError, match="backend is 'vllm'; it may be generate, continuous, own, short"):
        sample(model, PROMPTS, Sampling(3), backend="vllm")


def test_prompts_longer_than_a_step_are_sampled_by_their_own_seeds_too():
    """A step that reads a part of a prompt has a row of scores for it, and no token to write."""
    model = tiny.tiny_model(max_position_embeddings=1024)
    prompts = [[5 + (row + place) % 90 for place in range(STEP_TOKENS + 88)] for row in range(3)]
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    one, other = (
        sample(model, prompts, sampling, seeds=[7, 8, 9], backend=name) for name in ("generate", "continuous")
    )
    assert one == other


@both
@pytest.mark.parametrize(
    "restriction", [{}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05}, {"temperature": 0.6}], ids=str
)
def test_log_probabilities_are_those_that_tokens_were_drawn_with(restriction, backend):
    model = tiny.tiny_model()
    sampling = Sampling(12, frozenset({40, 41, 42}), logprobs=True, **{"temperature": 1.3, **restriction})
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS * 2)]
    completions = write(model, requests, sampling, backend=backend)
    assert {completion.end for completion in completions} == {"token", "length"}
    for request, completion in zip(requests, completions, strict=True):
        assert (completion.tokens[-1] in sampling.eos_ids) == (completion.end == "token")
        with torch.no_grad():
            ids = torch.tensor([*request.prompt, *completion.tokens])
            logits = model(ids[None]).logits[0, len(request.prompt) - 1 : -1].double() / sampling.temperature
        ordered, order = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = (before < sampling.top_p) & (ordered >= sampling.min_p * ordered[:, :1])
        if sampling.top_k:
            kept &= torch.arange(kept.shape[1]) < sampling.top_k
        logprobs = (ordered * kept / (ordered * kept).sum(-1, keepdim=True)).log()
        expected = logprobs.gather(-1, order.argsort(-1)).gather(-1, ids[len(request.prompt) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@both
def test_log_probabilities_are_kept_only_where_asked_for(backend):
    completions = write(
        tiny.tiny_model(), [Request(p, 1) for p in PROMPTS], Sampling(3, temperature=1.0), backend=backend
    )
    assert [completion.logprobs for completion in completions] == [None] * 3


def test_seeds_draw_the_same_by_continuous_batching_whatever_parts_prompts_are_read_in():
    model = tiny.tiny_model(max_position_embeddings=1024)
    lengths = [STEP_TOKENS - 2, 1, STEP_TOKENS, 3, STEP_TOKENS + 1, 90, 200, 310, 7]
    for count in (2, 5, 9):
        prompts = [
            [5 + (row * 7 + place) % 90 for place in range(length)] for row, length in enumerate(lengths[:count])
        ]
        sampling = Sampling(max_new_tokens=4, temperature=1.0)
        one, other = (
            sample(model, prompts, sampling, seeds=range(count), backend=name) for name in ("generate", "continuous")
        )
        assert one == other
