"""Every setting of transformers' Trainer and every type of adapter: it works, it is refused, or it has no use here."""

import dataclasses

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from sdft import SDFTConfig
from sdft.errors import TrainingError, UsageError
from sdft.models.adapters import ADAPTERS, LORA_OPTIONS, REFUSED_ADAPTERS, REFUSED_LORA, check_adapter
from sdft.models.load import load_model
from sdft.settings.fields import training_fields
from sdft.settings.inherited import CHOICES, DEBUG, NO_BEARING, NUMBERS, REFUSED, REFUSED_ARGUMENTS, WORKS
from tests import tiny
from tests.test_sdft_trainer import trainer

IDS = torch.arange(5, 20)[None]

#: What some types of adapters need besides the layers that they are in.
OPTIONS = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
}


def adapter_config(kind, **options):
    made = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **OPTIONS.get(kind, {}), **options}
    return made(**options)


def test_each_setting_of_the_trainer_stands_in_one_list():
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    lists = [WORKS, frozenset(REFUSED), NO_BEARING]
    assert {name: sum(name in names for names in lists) for name in fields} == dict.fromkeys(fields, 1)


def test_each_number_of_the_trainers_has_what_it_may_be():
    numbers = {name for name, field in training_fields().items() if field.inherited and field.kinds & {"int", "float"}}
    assert numbers - NUMBERS.keys() <= NO_BEARING | REFUSED.keys()
    assert NUMBERS.keys() <= WORKS


def test_the_words_of_the_trainers_are_those_that_it_knows():
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for name, choices in CHOICES.items():
        assert set(choices) <= set(fields[name].metadata["choices"]), name
    assert tuple(option.value for option in DebugOption) == DEBUG


def test_each_type_of_adapter_stands_in_one_list():
    kinds = [kind.name for kind in peft.PeftType]
    assert {kind: (kind in ADAPTERS) + (kind in REFUSED_ADAPTERS) for kind in kinds} == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_setting_that_would_do_nothing_is_refused(name, tmp_path):
    field = next(field for field in dataclasses.fields(TrainingArguments) if field.name == name)
    value = 0.1 if isinstance(field.default, float) else True if field.default is False else "x"
    with pytest.raises(UsageError, match=f"{name} is {value!r}; it must be "):
        SDFTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_an_argument_that_would_do_nothing_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match=f"{name} is set; it must not be"):
        trainer(tmp_path, arguments={name: lambda *_: None})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_batches_that_accelerate_would_split_are_refused(name, tmp_path):
    with pytest.raises(UsageError, match=f"accelerator_config has {name}"):
        trainer(tmp_path, accelerator_config={name: True})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy is 'group_by_length'; it may be"),
        ({"train_sampling_strategy": "sequential", "num_iterations": 2}, "come in random order"),
    ],
)
def test_an_order_of_rows_that_is_not_kept_is_refused(options, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        SDFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_what_the_machine_has_not_is_a_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"the settings ask for something, which cannot be had here: .*fsdp"):
        trainer(tmp_path, fsdp=True)


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_an_adapter_of_any_type_loads_as_it_was_trained(kind, tmp_path):
    if kind not in peft.PeftType.__members__:
        pytest.skip(f"this peft has no {kind}")
    model = tiny.saved(tmp_path / "base", tiny.tiny_model())
    run = trainer(
        tmp_path / "run",
        model=load_model(model)[0],
        arguments={"peft_config": adapter_config(kind)},
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
    )
    start = load_model(model)[0](IDS).logits
    run.train()
    run.save_model()
    learned = run.learner.eval()(IDS).logits
    with run.learner.disable_adapter():
        torch.testing.assert_close(run.learner(IDS).logits, start, rtol=1e-5, atol=1e-5)
    assert (learned - start).abs().max() > 1e-3
    torch.testing.assert_close(load_model(str(tmp_path / "run"))[0](IDS).logits, learned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(REFUSED_ADAPTERS))
def test_an_adapter_that_the_loss_does_not_see_is_refused(kind):
    with pytest.raises(UsageError, match=f"peft_config is of type {kind}, which is refused: "):
        check_adapter(peft.PeftConfig(peft_type=kind))


def test_each_option_of_lora_stands_in_one_list():
    options = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert {name: (name in LORA_OPTIONS) + (name in REFUSED_LORA) for name in options} == dict.fromkeys(options, 1)


@pytest.mark.parametrize("name", sorted(REFUSED_LORA))
def test_an_option_of_lora_that_does_something_else_here_is_refused(name):
    config = adapter_config("LORA")
    setattr(config, name, True)
    with pytest.raises(UsageError, match=f"{name} is True; it must not be set"):
        check_adapter(config)


def test_an_option_of_lora_that_is_not_known_is_refused(monkeypatch):
    check_adapter(adapter_config("LORA", alpha_pattern={"q_proj": 2}))
    monkeypatch.setattr("sdft.models.adapters.LORA_OPTIONS", LORA_OPTIONS - {"use_dora", "alpha_pattern"})
    check_adapter(adapter_config("LORA"))
    for name, value in {"use_dora": True, "alpha_pattern": {"q_proj": 2}}.items():
        with pytest.raises(UsageError, match=f"{name} is {value!r}; it must not be set: it is not known to work here"):
            check_adapter(adapter_config("LORA", **{name: value}))


def without_lists(monkeypatch, kind):
    """What there is beside the lists finds it, too."""
    monkeypatch.setattr("sdft.models.adapters.ADAPTERS", ADAPTERS | {kind})
    monkeypatch.setattr("sdft.models.adapters.REFUSED_STARTS", ("none",))
    monkeypatch.setattr("sdft.models.adapters.LORA_OPTIONS", LORA_OPTIONS | {*REFUSED_LORA})


RANDOM = {"PVERA": lambda: {"r": 4}, "LORA": lambda: {"monteclora_config": peft.tuners.lora.MontecloraConfig()}}
CHANGING = {
    "pissa": lambda: {"init_lora_weights": "pissa"},
    "kasa": lambda: {"kasa_config": peft.tuners.lora.KasaConfig()},
}


@pytest.mark.parametrize("kind", RANDOM)
def test_an_adapter_that_is_random_in_training_is_found(kind, tmp_path, monkeypatch):
    """While its weights are zeros, which hide it."""
    without_lists(monkeypatch, kind)
    config = adapter_config(kind, **RANDOM[kind]())
    with pytest.raises(TrainingError, match="computes something else in training"):
        trainer(tmp_path, arguments={"peft_config": config})


@pytest.mark.parametrize("how", CHANGING)
def test_an_adapter_that_changes_the_weights_under_it_is_found(how, tmp_path, monkeypatch):
    without_lists(monkeypatch, "LORA")
    with pytest.raises(UsageError, match=r"peft_config is .* it changes the model's own weights"):
        trainer(tmp_path, arguments={"peft_config": adapter_config("LORA", r=4, **CHANGING[how]())})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_the_weights_under_it_is_refused(start, tmp_path):
    config = adapter_config("LORA", r=4, init_lora_weights=start)
    with pytest.raises(UsageError, match=f"init_lora_weights is '{start}'; it must not be"):
        trainer(tmp_path, arguments={"peft_config": config})
