"""Any causal LM: for tiny models of many families, the loss from hidden states is that of the model's own logits.

The reference runs one sequence at a time, unpadded, through `model(...).logits`; the loss runs all of them at once,
padded on the right and without a mask. Windows of attention are shorter than the sequences, where a family has them.
"""

import math

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2ForCausalLM,
    LlamaForCausalLM,
)

from sdft.batch import Sample, lay_out
from sdft.errors import TrainingError
from sdft.head import check_head, check_same_in_training, find_head
from sdft.launch import switch_off_dropout
from sdft.loss import divergence
from sdft.models.load import load_model
from sdft.rollouts.generate import sample
from sdft.rollouts.interface import Sampling
from tests import tiny
from tests.test_sdft_trainer import trainer

SAMPLES = [
    Sample([5, 6, 7], [8, 9, 10, 1], [20, 21, 22, 23, 24, 25]),
    Sample([11], [12, 1], [30, 31, 32]),
    Sample([13, 14, 15, 16, 17, 2, 3], [18, 19, 20, 21, 22, 23], [40]),
]
COMMON = {"vocab_size": 101, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
ROPE = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
NARROW = {"head_dim": 8, "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": ("llama", ROPE),
    "llama, tied": ("llama", {**ROPE, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", ROPE),
    "qwen2, window": ("qwen2", {**ROPE, **MIXED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {**ROPE, "head_dim": 8}),
    "gemma2": ("gemma2", {**ROPE, **NARROW, **MIXED, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", {**ROPE, **NARROW, **MIXED}),
    "gemma3_text, soft-cap": ("gemma3_text", {**ROPE, **NARROW, **MIXED, "final_logit_softcapping": 2.0}),
    "mistral": ("mistral", {**ROPE, "sliding_window": 4}),
    "phi3": ("phi3", {**ROPE, "sliding_window": 4}),
    "cohere": ("cohere", {**ROPE, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**ROPE, **MIXED, "head_dim": 8, "logit_scale": 3.0}),
    "granite": ("granite", {**ROPE, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "olmo2": ("olmo2", ROPE),
    "smollm3": ("smollm3", {**ROPE, "no_rope_layers": [1, 0]}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**ROPE, "rotary_pct": 0.5}),
    "gptj, bias": ("gptj", {**GPT2, "rotary_dim": 4}),
    "opt, learned positions": (
        "opt",
        {**ROPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3, "enable_bias": False},
    ),
    "phi, bias": ("phi", ROPE),
    "falcon_h1, multiplier": ("falcon_h1", {**ROPE, "lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**ROPE, "num_hidden_layers": 3, "head_dim": 8, "logits_soft_cap": 2.0, "lru_width": 32},
    ),
    "llama4_text": ("llama4_text", {**ROPE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
}


def build(name, seed):
    kind, options = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    bias = find_head(model).bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model


def logprobs(model, prompt, completion):
    """log-probabilities (completion length, V) of the distributions that predict each completion token."""
    logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def full_logits_loss(student, teacher):
    total = torch.zeros(())
    for one in SAMPLES:
        p = logprobs(student, one.prompt, one.completion)
        with torch.no_grad():
            q = logprobs(teacher, one.teacher_prompt, one.completion)
        total = total + (p.exp() * (p - q)).sum()
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name):
    student, teacher = build(name, 0), build(name, 1)
    check_head(student, [5, 6, 7, 8, 9, 10, 11, 12])
    expected = full_logits_loss(student, teacher)
    expected.backward()
    expected_gradients = gradients(student)
    student.zero_grad()
    loss = divergence(student, teacher, lay_out(SAMPLES, 0), divergence="reverse_kl", reduction="sum").loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
    found = gradients(student)
    assert found.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        error = (found[parameter] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, (parameter, error.item(), gradient.norm().item())


def test_descriptions_are_those_of_the_configurations():
    assert find_head(build("cohere", 0)).scale == 0.25
    assert find_head(build("granite", 0)).scale == 0.25
    assert find_head(build("falcon_h1, multiplier", 0)).scale == 0.5
    assert find_head(build("gemma2", 0)).softcap == find_head(build("recurrent_gemma", 0)).softcap == 2.0
    assert find_head(build("gemma3_text", 0)).softcap is None
    assert find_head(build("gptj, bias", 0)).bias is not None
    tied = build("llama, tied", 0)
    assert find_head(tied).weight is tied.model.embed_tokens.weight


class Unannounced(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 1.5
        return output


def test_logits_scaled_unannounced_are_refused_with_the_difference():
    model = Unannounced(tiny.tiny_model().config).eval()
    with pytest.raises(TrainingError, match=r"Unannounced has logits.*differ by 0\.33 of the largest"):
        check_head(model, [5, 6, 7, 8])


def test_a_scale_that_changes_after_loading_is_refused():
    torch.manual_seed(0)
    model = Cohere2ForCausalLM(AutoConfig.for_model("cohere2", **FAMILIES["cohere2"][1])).eval()
    model.config.logit_scale = 6.0  # the model keeps its own copy: 3
    with pytest.raises(TrainingError, match=r"scale 6.*differ by 1 of the largest"):
        check_head(model, [5, 6, 7, 8])


def test_models_whose_tokens_see_what_comes_after_them_are_refused():
    options = {**ROPE, "max_position_embeddings": 64}
    torch.manual_seed(0)
    bidirectional = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert-generation", **options)).eval()
    with pytest.raises(TrainingError, match="lets a token see those after it"):
        check_head(bidirectional, [5, 6, 7, 8])
    causal = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert-generation", **options, is_decoder=True)
    ).eval()
    check_head(causal, [5, 6, 7, 8])


def test_a_layer_between_backbone_and_head_is_refused():
    electra = AutoConfig.for_model("electra", **ROPE, embedding_size=16, is_decoder=True)
    with pytest.raises(TrainingError, match="hidden states of size 32 and a head for size 16"):
        check_head(AutoModelForCausalLM.from_config(electra).eval(), [5, 6, 7, 8])


def test_windows_are_shorter_than_the_sequences():
    """What the windows above are for: with a wider one the same weights give other logits."""
    narrow = build("mistral", 0)
    torch.manual_seed(0)
    wide = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **{**ROPE, "sliding_window": None})).eval()
    wide.load_state_dict(narrow.state_dict())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    difference = (narrow(ids).logits - wide(ids).logits).abs().amax(-1)[0]
    assert difference[:4].max() < 1e-5 and difference[4:].min() > 1e-3
    assert not math.isnan(difference.max().item())


NOISY = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2, "layerdrop": 0.5},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.2},
    "biogpt": {"hidden_dropout_prob": 0.2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.3},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.2},
}


@pytest.mark.parametrize("family", NOISY)
def test_what_would_be_noise_in_training_is_switched_off(family):
    """Dropout is a module, or a number that a function takes; routers have noise of their own."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**ROPE, **NOISY[family]}))
    with pytest.raises(TrainingError, match="computes something else in training"):
        check_same_in_training(model, [*range(5, 20)])
    switch_off_dropout(model)
    check_same_in_training(model, [*range(5, 20)])
    model.train()
    ids = torch.tensor([[*range(5, 20)]])
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_noise_that_cannot_be_switched_off_is_refused_by_its_name():
    options = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **options))
    switch_off_dropout(model)
    with pytest.raises(TrainingError, match=r"\(its configuration has hidden_dropout 0.3\)"):
        check_same_in_training(model, [*range(5, 20)])


TEXT = {**ROPE, "max_position_embeddings": 160}
VISION = {"hidden_size": 16, "intermediate_size": 16}
SEEING = {
    "gemma3": {
        "text_config": {**TEXT, **NARROW},
        "vision_config": {**VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
        "mm_tokens_per_image": 4,
        **{"image_token_index": 100, "boi_token_index": 99, "eoi_token_index": 98},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 32},
        **{"image_token_id": 100, "video_token_id": 99, "vision_start_token_id": 98, "vision_end_token_id": 97},
    },
}


@pytest.mark.parametrize("family", SEEING)
def test_models_that_see_train_on_text_and_load_again(family, tmp_path):
    torch.manual_seed(0)
    made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **SEEING[family]))
    name = tiny.saved(tmp_path / "base", made)
    model, _ = load_model(name)
    run = trainer(tmp_path / "run", model=model, max_steps=2)
    cached = run.student.config.get_text_config().use_cache
    run.train()
    run.save_model()
    loaded, _ = load_model(str(tmp_path / "run"))
    assert type(loaded) is type(made)
    assert loaded.config.get_text_config().use_cache == cached
    ids = torch.tensor([[*range(5, 20)]])
    assert torch.equal(loaded(ids).logits, run.student.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, made.eval()(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SEEING)
def test_adapters_of_models_that_see_load_as_they_were_trained(family, tied, tmp_path):
    """Around the embeddings too, of which the head may be one: which configuration says so differs."""
    torch.manual_seed(0)
    settings = {**SEEING[family], "tie_word_embeddings": tied}
    name = tiny.saved(
        tmp_path / "base", AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings))
    )
    model, _ = load_model(name)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    run = trainer(tmp_path / "run", model=model, max_steps=2, learning_rate=1e-2, arguments={"peft_config": config})
    run.train()
    run.save_model()
    ids = torch.tensor([[*range(5, 20)]])
    learned = run.learner.eval()(input_ids=ids).logits
    torch.testing.assert_close(load_model(str(tmp_path / "run"))[0](ids).logits, learned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SEEING)
def test_rollouts_of_models_that_see_are_those_of_prompts_by_themselves(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **SEEING[family])).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    settings = Sampling(8, frozenset({1}), temperature=1e-4)
    assert sample(model, prompts, settings) == [sample(model, [prompt], settings)[0] for prompt in prompts]
