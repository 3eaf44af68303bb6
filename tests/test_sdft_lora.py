"""An adapter learns: its teachers need no second model, and what is saved loads again."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from sdft import SDFTTrainer
from sdft.cli import main
from sdft.errors import UsageError
from sdft.head import check_head
from sdft.models.adapters import add_lora, causal_lm
from sdft.models.files import base_of, check_apart, check_model
from sdft.models.load import load_model
from sdft.settings.inputs import LoraArguments
from sdft.teacher import make_teacher
from tests import tiny
from tests.test_sdft_trainer import Gradients, assert_equal_weights, full_logits, trained, trainer, weights

IDS = [5, 6, 7, 8]


def with_adapter(seed=0, **options):
    torch.manual_seed(seed)
    return add_lora(tiny.tiny_model(), LoraArguments(lora_rank=4, **options))


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}


def logits(model):
    with torch.no_grad():
        return causal_lm(model)(torch.tensor([IDS])).logits


def move(model, size=0.1):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["base", "ema", "live"])
def test_teachers_of_an_adapter_are_the_student_itself_for_a_while(kind):
    student = with_adapter()
    base = logits(student)
    teacher = make_teacher(kind, student, 0.25)
    start = adapter(student)
    move(student)
    moved, moved_logits = adapter(student), logits(student)
    teacher.update(student)
    with teacher.scoring() as model:
        assert model is causal_lm(student)
        got, lent = logits(student), adapter(student)
    if kind == "base":
        assert torch.equal(got, base)
    elif kind == "live":
        assert torch.equal(got, moved_logits)
    else:
        for name in start:
            torch.testing.assert_close(lent[name], 0.75 * start[name] + 0.25 * moved[name])
        assert not torch.equal(got, moved_logits)
    assert_equal_weights(adapter(student), moved)
    assert torch.equal(logits(student), moved_logits)
    assert all(p.requires_grad == ("lora" in name) for name, p in student.named_parameters())


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
def test_only_the_adapter_trains_and_the_first_gradient_is_that_of_full_logits(teacher, tmp_path):
    start = weights(with_adapter())
    gradients = Gradients()
    run = trainer(tmp_path, model=with_adapter(), callbacks=[gradients], max_steps=1, max_grad_norm=0, teacher=teacher)
    seen = []
    sample = run.samples
    run.samples = lambda rows: seen.extend(sample(rows)) or seen
    run.train()
    student, base = with_adapter(), tiny.tiny_model()
    total, tokens = 0.0, 0
    for s in seen:
        p = full_logits(causal_lm(student), s.prompt, s.completion)
        q = full_logits(base, s.teacher_prompt, s.completion).detach()
        total, tokens = total + (p.exp() * (p - q)).sum(), tokens + len(s.completion)
    (total / tokens).backward()
    assert run.state.log_history[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert (name in gradients.kept) == parameter.requires_grad
        if parameter.requires_grad:
            assert (gradients.kept[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved and all("lora_B" in name for name in moved)  # A has no gradient while B is 0


@pytest.mark.parametrize("teacher", ["base", "ema"])
def test_a_resumed_adapter_ends_with_the_weights_of_the_uninterrupted_run(teacher, tmp_path):
    options = {"max_steps": 4, "teacher": teacher, "ema_rate": 0.3, "learning_rate": 1e-2}
    straight = trained(tmp_path / "straight", model=with_adapter(), **options)
    trained(tmp_path / "broken", model=with_adapter(), **options, save_strategy="steps", save_steps=2)
    resumed = trainer(tmp_path / "broken", model=with_adapter(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert_equal_weights(weights(resumed.model), weights(straight.model))
    if teacher == "ema":
        assert_equal_weights(resumed.teacher.average, straight.teacher.average)


@pytest.mark.parametrize("how", ["command", "trainer"])
def test_the_seed_covers_an_adapters_first_weights(how, tmp_path, monkeypatch):
    """Whatever random numbers were drawn before it is made."""
    monkeypatch.chdir(tmp_path)
    name = tiny.saved(tmp_path / "base", tiny.tiny_model(max_position_embeddings=512))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    made = {}
    for run, (before, seed) in enumerate([(1, 5), (2, 5), (1, 6)]):
        torch.manual_seed(before)
        if how == "trainer":
            config = peft.LoraConfig(r=4, target_modules=["q_proj"])
            options = {"model": load_model(name)[0], "seed": seed, "arguments": {"peft_config": config}}
            made[run] = adapter(trainer(tmp_path / str(run), **options).learner)
        else:
            flags = {"model": name, "lora_rank": 4, "seed": seed, "output_dir": str(run), "max_steps": 1}
            flags |= {"train_file": "rows.jsonl", "learning_rate": 0, "max_completion_length": 4, "use_cpu": "true"}
            assert main(["train", *(f"--{flag}={value}" for flag, value in flags.items())]) == 0
            made[run] = load_file(str(tmp_path / str(run) / "adapter_model.safetensors"))
    assert_equal_weights(made[0], made[1])
    assert any(not torch.equal(tensor, made[2][name]) for name, tensor in made[0].items())


def test_a_saved_adapter_is_small_and_loads_by_its_folder(tmp_path):
    base = tmp_path / "base"
    tiny.tiny_model().save_pretrained(base)
    tiny.tiny_tokenizer().save_pretrained(base)
    model, tokenizer = load_model(str(base))
    run = SDFTTrainer(
        model,
        trainer(tmp_path, max_steps=2).args,
        train_dataset=tiny.rows(),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded, _ = load_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tiny.tiny_model()))


def test_no_hub_is_asked_about_the_model_of_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked"))
    base = tiny.tiny_model()
    base.config._name_or_path = base.name_or_path = "smollm2-135m-instruct"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(tmp_path, model=add_lora(base, LoraArguments(lora_rank=4))).save_model()
    assert base_of(tmp_path / "adapter_config.json") == "smollm2-135m-instruct"
    assert all("lora" in name for name in peft.load_peft_weights(str(tmp_path)))


@pytest.fixture
def base_folder(tmp_path):
    tiny.tiny_model().save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(name, folder):
    """An adapter of the model `name` that changes it, saved to `folder`; and that model's logits with it."""
    model = add_lora(load_model(str(name))[0], LoraArguments(lora_rank=4))
    move(model)
    model.save_pretrained(folder)
    return logits(model)


def test_an_adapter_of_a_folder_loads_from_anywhere(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = saved_adapter("base", tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(logits(load_model("../adapter")[0]), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_model_is_gone_says_so(base_folder, tmp_path):
    saved_adapter(base_folder, tmp_path / "adapter")
    base_folder.rename(tmp_path / "moved")
    for find in (load_model, check_model):
        with pytest.raises(UsageError, match=r"an adapter of '.*/base', as its adapter_config.json says: .* no such"):
            find(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(base_folder), str(tmp_path / "adapter")))
    with pytest.raises(UsageError, match="names itself for its model"):
        check_model(str(tmp_path / "adapter"))


def test_an_adapter_of_an_adapter_loads_with_both(base_folder, tmp_path):
    saved_adapter(base_folder, tmp_path / "first")
    expected = saved_adapter(tmp_path / "first", tmp_path / "second")
    loaded, _ = load_model(str(tmp_path / "second"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_comes_with_the_chat_template_that_it_was_trained_with(base_folder, tmp_path):
    saved_adapter(base_folder, tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"))[1].chat_template == tiny.CHAT_TEMPLATE
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "adapter"))[1].chat_template == tokenizer.chat_template


def test_all_weights_learn_from_where_an_adapter_ended(base_folder, tmp_path):
    saved_adapter(base_folder, tmp_path / "adapter")
    model, _ = load_model(str(tmp_path / "adapter"))
    start = weights(model)
    trained(tmp_path / "out", model=model, max_steps=1)
    assert not torch.equal(model.lm_head.weight, start["lm_head.weight"])


def test_an_adapter_may_not_replace_what_it_is_an_adapter_of(base_folder, tmp_path):
    saved_adapter(base_folder, tmp_path / "adapter")
    check_apart(str(tmp_path / "adapter"), tmp_path / "out")
    for folder in (tmp_path / "adapter", base_folder):
        with pytest.raises(UsageError, match=r"output_dir is .* it must be another folder"):
            check_apart(str(tmp_path / "adapter"), folder)


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", ".*q_proj"])
def test_one_layer_is_named_by_its_ending_or_a_pattern(target):
    names = adapter(with_adapter(lora_target_modules=[target]))
    assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"q_proj"}


def test_an_adapter_in_the_head_is_refused():
    with pytest.raises(
        UsageError, match=r"lora_target_modules is \['lm_head', 'q_proj'\]; it must leave out the output"
    ):
        with_adapter(lora_target_modules=["lm_head", "q_proj"])
    model = peft.get_peft_model(tiny.tiny_model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UsageError, match="adapter in its output head"):
        check_head(causal_lm(model), IDS)
    model = peft.get_peft_model(
        tiny.tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with pytest.raises(UsageError, match="modules_to_save"):
        make_teacher("ema", model, 0.1)
    check_head(causal_lm(model), IDS)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_beside_which_the_model_itself_trains_has_no_base(bias):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias=bias)
    model = peft.get_peft_model(tiny.tiny_model(attention_bias=True), config)
    with pytest.raises(
        UsageError,
        match=r"q_proj\.base_layer\.bias trains beside it; with teacher 'base' it must not .* 'none'",
    ):
        make_teacher("base", model, 0.1)


def test_a_wrong_adapter_is_one_sentence():
    with pytest.raises(UsageError, match=r"lora_target_modules is \['nothing_proj'\]"):
        with_adapter(lora_target_modules=["nothing_proj"])
    with pytest.raises(UsageError, match="lora_rank is -1"):
        LoraArguments(lora_rank=-1)
    with pytest.raises(UsageError, match="teacher_offload is True"):
        make_teacher("base", with_adapter(), 0.1, offload=True)


SAVED_HEADS = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", SAVED_HEADS)
def test_an_adapter_around_embeddings_or_head_loads_as_it_was_trained(case, tied, tmp_path):
    """The head keeps its own weights where only the embeddings are adapted, in what is saved after loading, too."""
    base = tiny.saved(tmp_path / "base", tiny.tiny_model(tied=tied))
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **SAVED_HEADS[case])
    run = trainer(tmp_path / "run", model=load_model(base)[0], max_steps=2, arguments={"peft_config": config})
    run.train()
    run.save_model()
    learned = logits(run.learner.eval())
    loaded, _ = load_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits(loaded), learned, rtol=1e-4, atol=1e-4)
    again, _ = load_model(tiny.saved(tmp_path / "again", loaded))
    torch.testing.assert_close(logits(again), learned, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_model_with_added_tokens_loads(tmp_path):
    model, _ = load_model(tiny.saved(tmp_path / "base", tiny.tiny_model()))
    model.resize_token_embeddings(103)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    run = trainer(tmp_path / "run", model=model, max_steps=2, arguments={"peft_config": config})
    run.train()
    run.save_model()
    loaded, _ = load_model(str(tmp_path / "run"))
    assert loaded.config.vocab_size == 103
    torch.testing.assert_close(logits(loaded), logits(run.learner.eval()), rtol=1e-4, atol=1e-4)


NEW_TOKENS = {
    "tokens": {"trainable_token_indices": [101, 102]},
    "tokens, head saved": {"trainable_token_indices": [101, 102], "modules_to_save": ["lm_head"]},
    "embeddings, head saved": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def with_new_tokens(folder, tied, **options):
    model, _ = load_model(tiny.saved(folder / "base", tiny.tiny_model(tied=tied)))
    model.resize_token_embeddings(103)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **options})
    return trainer(folder / "run", model=model, max_steps=2, arguments={"peft_config": config})


@pytest.mark.parametrize(
    ("tied", "case"), [*((False, case) for case in NEW_TOKENS), (True, "embeddings, head saved"), (True, "both saved")]
)
def test_an_adapter_that_learns_new_tokens_loads_as_it_was_trained(tied, case, tmp_path):
    run = with_new_tokens(tmp_path, tied, **NEW_TOKENS[case])
    run.train()
    run.save_model()
    loaded, _ = load_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits(loaded), logits(run.learner.eval()), rtol=1e-4, atol=1e-4)


def test_a_head_for_new_tokens_that_would_not_be_saved_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the model has 103 tokens, .*base has 101, .*modules_to_save must name the"):
        with_new_tokens(tmp_path, False, target_modules=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("options", [{"trainable_token_indices": [5]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_trained_tokens_of_a_tied_head_are_refused_with_the_way_out(options, tmp_path):
    words = r"leave out of the adapter \(target_modules, trainable_token_indices\) the head, and embeddings that it is"
    with pytest.raises(UsageError, match=words):
        with_new_tokens(tmp_path, True, **options)


def test_another_adapter_than_peft_saves_where_the_model_is_is_refused(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    two = peft.get_peft_model(tiny.tiny_model(), config)
    two.add_adapter("mine", config)
    for model, words in {
        peft.get_peft_model(tiny.tiny_model(), config, adapter_name="mine"): r"the model has 1 adapter \(mine\); it",
        two: r"the model has 2 adapters \(default, mine\); it must have one, which is called 'default'",
        peft.get_peft_model(tiny.tiny_model(), config, mixed=True): "model is a PeftMixedModel, which does not load",
    }.items():
        with pytest.raises(UsageError, match=words):
            trainer(tmp_path, model=model)
    for model in (peft.get_peft_model(tiny.tiny_model(), config), with_adapter_by_transformers(config)):
        with pytest.raises(UsageError, match="peft_config is set, and the model has an adapter"):
            trainer(tmp_path, model=model, arguments={"peft_config": config})


def with_adapter_by_transformers(config):
    model = tiny.tiny_model()
    model.add_adapter(config)
    return model


def test_an_adapter_by_transformers_loads_as_it_was_trained(tmp_path):
    base = tiny.saved(tmp_path / "base", tiny.tiny_model())
    model, _ = load_model(base)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    run = trainer(tmp_path / "run", model=model, max_steps=2)
    run.train()
    run.save_model()
    assert not torch.allclose(logits(run.learner), logits(load_model(base)[0]))
    torch.testing.assert_close(logits(load_model(str(tmp_path / "run"))[0]), logits(run.learner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("teacher", ["ema", "live"])
def test_biases_train_beside_an_adapter_whose_teacher_is_not_the_base(teacher, tmp_path):
    base = tiny.saved(tmp_path / "base", tiny.tiny_model(attention_bias=True))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all")
    model, arguments = load_model(base)[0], {"peft_config": config, "general_dataset": [{"prompt": "a b"}]}
    run = trainer(tmp_path / "run", model=model, teacher=teacher, max_steps=2, arguments=arguments)
    start = logits(load_model(base)[0])
    run.train()
    with run.starting_model.scoring() as lent:
        assert torch.equal(logits(lent), start)
    run.save_model()
    torch.testing.assert_close(logits(load_model(str(tmp_path / "run"))[0]), logits(run.learner), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_is_held_to_the_rounding_of_its_type(dtype, tmp_path):
    """Layer by layer: over many layers, whose rounding adds up, the logits say little."""
    base = tiny.saved(tmp_path / "base", tiny.tiny_model(num_hidden_layers=12))
    model = add_lora(load_model(base)[0], LoraArguments(lora_rank=4))
    move(model)
    model.save_pretrained(tmp_path / "run")
    assert load_model(str(tmp_path / "run"), dtype=dtype)[0].dtype == getattr(torch, dtype)


def test_an_adapter_that_merges_into_something_else_is_refused(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", model=named(with_adapter(), tmp_path), max_steps=2)
    run.train()
    run.save_model()
    merge = peft.LoraModel.merge_and_unload

    def wrongly(self):
        merged = merge(self)
        merged.lm_head.weight.data.neg_()
        return merged

    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", wrongly)
    with pytest.raises(UsageError, match="an adapter that cannot be merged into its model"):
        load_model(str(tmp_path / "run"))


def named(model, folder):
    """The model, whose base is in a folder that its adapter will name."""
    name = tiny.saved(folder / "base", tiny.tiny_model())
    causal_lm(model).config._name_or_path = name
    model.peft_config["default"].base_model_name_or_path = name
    return model


class QuantisedLlama(LlamaForCausalLM):
    """A model that calls itself quantised, with weights that take no gradient until they are numbers again."""

    is_quantized = True

    def requires_grad_(self, requires_grad=True):
        assert not (self.is_quantized and requires_grad)
        return super().requires_grad_(requires_grad)

    def dequantize(self):
        self.is_quantized = False
        return self


def test_an_adapter_of_a_quantised_model_is_merged_into_its_weights_as_numbers(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", model=named(with_adapter(), tmp_path), max_steps=2)
    run.train()
    run.save_model()
    monkeypatch.setattr("sdft.models.load._from_pretrained", lambda name, **_: QuantisedLlama.from_pretrained(name))
    loaded, _ = load_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits(loaded), logits(run.learner.eval()), rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_quantised_model_that_cannot_be_had_as_numbers_is_refused(tmp_path, monkeypatch):
    def no_numbers(self):
        raise NotImplementedError("gptq has no dequantize")

    run = trainer(tmp_path / "run", model=named(with_adapter(), tmp_path), max_steps=2)
    run.train()
    run.save_model()
    monkeypatch.setattr("sdft.models.load._from_pretrained", lambda name, **_: QuantisedLlama.from_pretrained(name))
    monkeypatch.setattr(QuantisedLlama, "dequantize", no_numbers)
    with pytest.raises(UsageError, match="an adapter of a quantised model whose weights cannot be had as numbers"):
        load_model(str(tmp_path / "run"))


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
def test_noise_of_training_does_not_reach_the_teacher(teacher, tmp_path):
    """NEFTune's is in the embeddings, which student and teacher share; the first step's rollouts are the same."""
    seen = {}
    for noise in (None, 5.0):
        folder = tmp_path / str(noise)
        options = {"max_steps": 1, "log_completions": 1, "neftune_noise_alpha": noise, "teacher": teacher}
        trainer(folder, model=with_adapter(), **options).train()
        lines = (folder / "completions.jsonl").read_text().splitlines()
        seen[noise] = [json.loads(line)["teacher_logprob"] for line in lines]
    assert seen[None] == seen[5.0]
