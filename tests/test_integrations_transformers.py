"""The fused loss of `labels` is the one that models of transformers compute, in their forward pass and in a Trainer."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from sdft_kernels.integrations.transformers import fused_causal_lm_loss
from tests import tiny
from tests.test_sdft_architectures import FAMILIES, ROPE

NAMES = ["llama, tied", "gemma2", "cohere", "granite", "phi, bias"]
MIXTURE = {**ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
FAMILIES = {**FAMILIES, "mixtral": ("mixtral", {**MIXTURE, "router_aux_loss_coef": 0.5})}


def build(name):
    kind, options = FAMILIES[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).train()


def batch(seed=1):
    torch.manual_seed(seed)
    tokens, mask = torch.randint(3, 101, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = mask[2, 7:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def assert_close(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-9, f"{got} and not {expected}"


def step(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, **inputs):
    """Without logits the model's step is what its own class makes, which it has again afterwards."""
    undo = fused_causal_lm_loss(model)
    got, gradients = step(model, **inputs)
    undo()
    expected, expected_gradients = step(model, **inputs)
    assert got.logits is None and expected.logits is not None
    assert got.keys() == expected.keys() - {"logits"}
    assert_close(got.loss, expected.loss)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 3
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient)
    return got, expected


@pytest.mark.parametrize("name", [*NAMES, "mixtral"])
def test_loss_and_gradients_are_the_models_own(name):
    model, inputs = build(name), batch()
    assert_same_step(model, **inputs)
    assert_same_step(model, **inputs, num_items_in_batch=torch.tensor(7))


def test_what_a_loss_function_is_given_means_what_it_does_there():
    model, inputs = build("gemma2"), batch()
    assert_same_step(model, **inputs, num_items_in_batch=7)
    tokens = inputs["input_ids"]
    assert_same_step(model, input_ids=tokens, labels=tokens, ignore_index=int(tokens[0, 4]))
    shifted = torch.nn.functional.pad(inputs["labels"][:, 2:], (0, 2), value=-100)
    assert_same_step(model, **inputs, shift_labels=shifted)
    undo = fused_causal_lm_loss(model)
    ignored = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    output, gradients = step(model, **ignored)
    assert output.loss == 0 and all(gradient.count_nonzero() == 0 for gradient in gradients.values())
    loss, logits, *_ = model(**inputs, return_dict=False)
    assert logits is None and loss == model(**inputs).loss
    with pytest.raises(ValueError, match="logits_to_keep its default"):
        model(**inputs, logits_to_keep=3)
    undo()


def test_mixtures_of_experts_keep_what_they_add():
    got, expected = assert_same_step(build("mixtral"), **batch())
    assert_close(got.aux_loss, expected.aux_loss)
    assert got.aux_loss > 0


def test_no_logits_are_made_with_labels_in_training_alone():
    model, inputs = build("llama"), batch()
    undo = fused_causal_lm_loss(model)
    tokens = inputs["input_ids"]
    assert model(tokens).logits.shape == (3, 9, 101)
    model.eval()
    evaluated = model(**inputs)
    assert evaluated.logits.shape == (3, 9, 101)
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (3, 11)
    undo()
    undo = fused_causal_lm_loss(model, in_evaluation=True)
    again = model(**inputs)
    assert again.logits is None and not model.training
    assert_close(again.loss, evaluated.loss)
    undo()
    assert "forward" not in vars(model)


def test_a_copy_has_the_loss_of_its_own_weights():
    model, inputs = build("granite"), batch()
    fused_causal_lm_loss(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert other(**inputs).logits is None
    assert abs(other(**inputs).loss - model(**inputs).loss) > 0.1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_adapter_trains_as_it_does_with_logits(first):
    def trained(fuse):
        model = build("llama")
        if fuse and first:
            fused_causal_lm_loss(model)
        torch.manual_seed(2)
        lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(model, lora)
        if fuse and not first:
            fused_causal_lm_loss(model)
        return step(model, **batch())

    (output, gradients), (expected, expected_gradients) = trained(True), trained(False)
    assert output.logits is None
    assert_close(output.loss, expected.loss)
    assert gradients.keys() == expected_gradients.keys() and any("lm_head" in name for name in gradients)
    for name, gradient in expected_gradients.items():
        assert_close(gradients[name], gradient)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_trains_as_it_does_with_logits(name, accumulation, tmp_path):
    def trained(fuse):
        model = build(name)
        if fuse:
            fused_causal_lm_loss(model, in_evaluation=True)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2, "max_steps": 2}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        args = TrainingArguments(str(tmp_path), learning_rate=0.1, optim="sgd", **options, **quiet)
        rows = [{k: v[n] for k, v in batch(seed).items()} for seed in range(4) for n in range(3)]
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        found = [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]
        return torch.tensor([*found, trainer.evaluate()["eval_loss"]]), dict(model.named_parameters())

    (logged, weights), (expected, expected_weights) = trained(True), trained(False)
    assert len(logged) == 5
    assert_close(logged, expected)
    for key, weight in expected_weights.items():
        assert_close(weights[key], weight)


@pytest.mark.parametrize("name", ["llama, tied", "gemma2"])
def test_a_compiled_model_makes_the_same_step(name):
    model, inputs = build(name), batch()
    expected, expected_gradients = step(model, **inputs)
    fused_causal_lm_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    output = compiled(**inputs)
    output.loss.backward()
    assert output.logits is None and compiled(inputs["input_ids"]).logits is not None
    assert_close(output.loss, expected.loss)
    for key, weight in model.named_parameters():
        assert_close(weight.grad, expected_gradients[key])
    with pytest.raises(RuntimeError, match=r"OptimizedModule has another forward.* torch\.compile"):
        fused_causal_lm_loss(torch.compile(build(name), backend="eager"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing_and_new_entries_of_the_vocabulary(reentrant):
    model, inputs = build("llama, tied"), batch()
    fused_causal_lm_loss(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.resize_token_embeddings(128)
    other = build("llama, tied")
    other.resize_token_embeddings(128)
    other.load_state_dict(model.state_dict())
    (output, gradients), (expected, expected_gradients) = step(model, **inputs), step(other, **inputs)
    assert output.logits is None
    assert_close(output.loss, expected.loss)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert_close(gradients[key], gradient)


def refuse(change, message, kind=ValueError):
    model = build("llama")
    with pytest.raises(kind, match=message):
        fused_causal_lm_loss(change(model) or model)
    return model


def test_what_does_not_fit_is_refused_and_left_as_it_was():
    refuse(lambda model: setattr(model, "loss_function", print), "ForCausalLMLoss of its labels")
    refuse(lambda model: setattr(model, "forward", model.forward), "another forward than its class", RuntimeError)
    refuse(lambda model: model.model, "LlamaModel does not compute")
    refuse(lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"])), "adapter in its output head")
    refuse(lambda model: model.lm_head.register_forward_hook(lambda *args: 2 * args[-1]) and None, "head do not give")
    model = build("llama")
    fused_causal_lm_loss(model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has the fused loss already"):
        fused_causal_lm_loss(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="adapter in its output head"):
        adapted(**batch())


class Rounded(type(tiny.tiny_model())):
    """A model whose loss is of other logits than it gives."""

    def forward(self, input_ids, labels=None, **named):
        output = super().forward(input_ids, **named)
        if labels is not None:
            output.loss = self.loss_function(output.logits.round(), labels, self.vocab_size)
        return output


class ByItself(Rounded):
    def forward(self, input_ids, labels=None, **named):
        output = super().forward(input_ids, **named)
        if labels is not None:
            output.loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


@pytest.mark.parametrize("kind", [Rounded, ByItself])
def test_a_loss_that_is_made_in_another_way_is_refused(kind):
    model = kind(tiny.tiny_model().config)
    with pytest.raises(ValueError, match=f"{kind.__name__} makes its loss of labels in another way"):
        fused_causal_lm_loss(model)
    assert "forward" not in vars(model) and model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 101)
