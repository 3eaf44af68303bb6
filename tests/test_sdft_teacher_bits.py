"""Another model as the teacher, with weights that are rounded to 4 bits as it is loaded.

The tests of what bitsandbytes computes are skipped where it is not installed: `pip install bitsandbytes`.
"""

import importlib.util
import json

import pytest
import torch
import yaml
from transformers import Gemma3Config, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from sdft import SDFTConfig, SDFTTrainer
from sdft.cli import main
from sdft.errors import UsageError
from sdft.models import load
from sdft.models.few_bits import stored_type
from sdft.settings.config import MethodSettings
from sdft.settings.idle import OF_TRAINING, without_effect
from tests import tiny

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install bitsandbytes)"
)
#: Sizes that bitsandbytes packs on any processor.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


def teacher() -> LlamaForCausalLM:
    return tiny.tiny_model(7, **WIDE)


def rounded(folder: str, dtype: str) -> LlamaForCausalLM:
    """The teacher with the weights that bitsandbytes has of it, as numbers."""
    from bitsandbytes import functional

    model = teacher().to(getattr(torch, dtype))
    loaded, _ = load.load_model(folder, dtype, bits=4)
    for name, layer in model.named_modules():
        if type(layer) is torch.nn.Linear and name != "lm_head":
            weight = loaded.get_submodule(name).weight
            numbers = functional.dequantize_4bit(weight.data, weight.quant_state)
            layer.weight.data = numbers.to(layer.weight.dtype).view(layer.weight.shape)
    return model


def trained(folder, **options) -> list[float]:
    """The losses of a training."""
    run = SDFTTrainer(
        tiny.tiny_model(),
        SDFTConfig(
            output_dir=str(folder),
            **{"teacher": "model", "per_device_train_batch_size": 4, "max_steps": 1, "max_completion_length": 6},
            **{"learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True},
            logging_steps=1,
            disable_tqdm=True,
            **{name: value for name, value in options.items() if name != "given"},
        ),
        train_dataset=tiny.rows(),
        processing_class=tiny.tiny_tokenizer(),
        teacher_model=options.get("given"),
    )
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_such_a_teacher_teaches_what_its_rounded_weights_say(dtype, tmp_path):
    folder = tiny.saved(tmp_path / "teacher", teacher())
    cached = {"teacher_cache_gib": 0.1, "teacher_dtype": dtype}
    got = trained(tmp_path / "run", teacher_model=folder, teacher_bits=4, **cached)
    expected = trained(tmp_path / "rounded", given=rounded(folder, dtype))
    plain = trained(tmp_path / "plain", given=teacher().to(getattr(torch, dtype)))
    closeness = 2e-3 if dtype == "float32" else 1e-2  # some processors multiply 4 bits in bfloat16 anyway
    assert got == pytest.approx(expected, rel=closeness)
    assert got != pytest.approx(plain, rel=closeness)


@needs_bitsandbytes
def test_experts_that_would_stay_as_they_are_are_refused(tmp_path):
    config = MixtralConfig(**WIDE, vocab_size=101, num_hidden_layers=1, num_local_experts=4, pad_token_id=0)
    folder = tiny.saved(tmp_path / "experts", MixtralForCausalLM(config))
    with pytest.raises(
        UsageError, match="of whose weights 393,728 are in no linear layers and stay as they are stored"
    ):
        load.load_model(folder, "float32", bits=4)


def test_models_that_see_say_the_type_of_all_their_weights():
    config = Gemma3Config(dtype="bfloat16")
    assert config.get_text_config().dtype is None
    assert stored_type(config) == torch.bfloat16 and stored_type(MixtralConfig()) == torch.float32


@needs_bitsandbytes
def test_a_recipe_names_the_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path)
    assert main(["train", str(recipe)]) == 0
    scores = ["--model", "run", "--teacher", "--eval_file", "rows.jsonl", "--scorer", "exact"]
    assert main(["eval", str(recipe), *scores, "--summary_file", "scores.json"]) == 0
    assert "prompt" in json.loads((tmp_path / "scores.json").read_text())["accuracy_by_template"]


def recipe_of(folder, **options):
    folder.mkdir(exist_ok=True)
    rows = [{name: row[name] for name in ("prompt", "answer")} for row in tiny.rows()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": tiny.saved(folder / "student", tiny.tiny_model()),
        "teacher_model": tiny.saved(folder / "teacher", teacher()),
        "teacher_bits": 4,
        "train_file": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "max_completion_length": 4,
        "use_cpu": True,
        **options,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def test_the_bits_are_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path)
    layers = [m for name, m in teacher().named_modules() if type(m) is torch.nn.Linear and name != "lm_head"]
    rounds = sum(layer.weight.numel() for layer in layers)
    rest = sum(p.numel() for p in teacher().parameters()) - rounds
    for bits, each in (("null", 4), ("4", 0.516)):
        assert main(["plan", str(recipe), "--teacher_bits", bits, "--output_file", "plan.json"]) == 0
        planned = json.loads((tmp_path / "plan.json").read_text())["phases"]["scoring"]["parts"]["teacher"]
        assert planned == pytest.approx(each * rounds + 4 * rest, rel=0.03), bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_bits": 8}, "teacher_bits is 8; it may be 4, or not be set"),
        (
            {"teacher_model": "x", "teacher_bits": 4, "teacher_offload": True},
            "teacher_offload is True and teacher_bits 4",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(UsageError) as refused:
        MethodSettings(**options)
    assert str(refused.value).startswith(said)


def test_bits_without_a_model_do_nothing_and_say_so():
    assert without_effect(OF_TRAINING, MethodSettings(teacher_bits=4)) == [
        "teacher_bits is 4 and does nothing: teacher_model is not set"
    ]


def test_what_cannot_be_rounded_is_refused(tmp_path, monkeypatch, capsys):
    folder = tiny.saved(tmp_path / "teacher", teacher())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="in 4 bits, which needs bitsandbytes: pip install bitsandbytes"):
        load.load_model(folder, bits=4)
    monkeypatch.undo()
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UsageError, match="whose weights are quantised already; they cannot be rounded to 4 bits"):
        load.load_model(folder, bits=4)
    with pytest.raises(UsageError, match="bits is 8; it may be 4"):
        load.load_model(folder, bits=8)
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path / "other", teacher_model=folder)
    assert main(["plan", str(recipe)]) == 2
    assert "teacher_bits is 4, and teacher_model is quantised already; it must not be set" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="adapter', an adapter, which weights of 4 bits cannot take"):
        load.load_model(str(tmp_path / "adapter"), bits=4)
    with pytest.raises(UsageError, match="a GGUF file, which is not loaded in 4 bits; it may be a folder or hub name"):
        load.load_model("smollm2-135m-instruct", bits=4)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_command_asks_for_bitsandbytes_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe, said = str(recipe_of(tmp_path)), "teacher' in 4 bits, which needs bitsandbytes: pip install bitsandbytes"
    assert main(["train", recipe]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", recipe, "--method", "sft", "--max_steps", "1"]) != 0  # rows without demonstrations
    assert "bitsandbytes" not in capsys.readouterr().err
    assert main(["eval", recipe, "--model", str(tmp_path / "student"), "--teacher", "--eval_file", "rows.jsonl"]) == 2
    assert said in capsys.readouterr().err
