"""The training loop, on models that train in a second."""

import importlib.util
import json
import logging
import math
import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.models.llama import modeling_llama

from sdft import SDFTConfig, SDFTTrainer, attention
from sdft.attention import ShapesSeen
from sdft.errors import TrainingError, UsageError
from sdft.forward import as_forward_of
from sdft.repeats import RepeatedRows
from sdft.rollouts.generate import BACKENDS, sample, write
from sdft.rollouts.interface import Completion, Sampling
from tests import tiny


def trainer(folder, *, model=None, rows=None, eval_dataset=None, callbacks=None, arguments=None, **options):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "teacher_template": "turn",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SDFTTrainer(
        tiny.tiny_model() if model is None else model,
        SDFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=tiny.rows() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tiny.tiny_tokenizer(),
        callbacks=callbacks,
        **(arguments or {}),
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def trained(*args, **kwargs):
    run = trainer(*args, **kwargs)
    run.train()
    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher": "ema", "ema_rate": 0.2},
        {"teacher": "live"},
        {"teacher_offload": True},
        {"teacher": "ema", "ema_rate": 0.2, "teacher_offload": True},
        {"method": "sft"},
        {"freeze_embeddings": True},
    ],
    ids=str,
)
def test_training_moves_the_student_and_only_what_trains(options, tmp_path):
    start = weights(tiny.tiny_model())
    run = trained(tmp_path, **options)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, start[name])}
    frozen = {"model.embed_tokens.weight"} if "freeze_embeddings" in options else set()
    assert moved == start.keys() - frozen
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4


def test_a_dataset_works_as_well_as_rows(tmp_path):
    a = trained(tmp_path, rows=datasets.Dataset.from_list(tiny.rows()), max_steps=1)
    b = trained(tmp_path, max_steps=1)
    assert_equal_weights(weights(a.model), weights(b.model))


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "sdft"},
        {"method": "sft"},
        {"loss_normalisation": "sequence", "demonstration_weight": 0.25},
        {"demonstration_weight": 0.25},
    ],
    ids=str,
)
def test_the_loss_is_the_mean_over_the_step_whatever_the_accumulation(options, tmp_path):
    kept, losses = [], []
    for batch, accumulation, tokens in ((8, 1, None), (2, 4, None), (1, 8, None), (3, 3, None), (8, 1, 40), (4, 2, 1)):
        gradients = Gradients()
        run = trained(
            tmp_path,
            callbacks=[gradients],
            **options,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_forward_tokens=tokens,
            max_steps=1,
        )
        kept.append(gradients.kept)
        losses.append(run.state.log_history[0]["loss"])
    for other, loss in zip(kept[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, gradient in kept[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_first_steps_gradient_is_that_of_full_logits_on_the_same_rollouts(tmp_path):
    gradients = Gradients()
    run = trainer(
        tmp_path, callbacks=[gradients], max_steps=1, max_grad_norm=0, skip_tokens=1, gradient_accumulation_steps=2
    )
    seen = []
    make = run.samples
    run.samples = lambda rows: seen.extend(make(rows)) or seen
    run.train()
    student, teacher = tiny.tiny_model(), tiny.tiny_model()
    total, tokens = 0.0, 0
    for s in seen:
        ids = torch.tensor([[*s.prompt, *s.completion]])
        teacher_ids = torch.tensor([[*s.teacher_prompt, *s.completion]])
        p = student(ids).logits[0, len(s.prompt) : -1].log_softmax(-1)
        q = teacher(teacher_ids).logits[0, len(s.teacher_prompt) : -1].log_softmax(-1).detach()
        total = total + (p.exp() * (p - q)).sum()
        tokens += len(s.completion) - 1
    (total / tokens).backward()
    assert run.state.log_history[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        error = (gradients.kept[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


def test_with_the_teacher_seeing_the_students_prompt_the_first_loss_is_nothing(tmp_path):
    gradients = Gradients()
    run = trainer(tmp_path, callbacks=[gradients], max_steps=1)
    for row in run.train_dataset:
        row["teacher_prompt_ids"] = row["prompt_ids"]
    run.train()
    assert abs(run.state.log_history[0]["loss"]) < 1e-6
    assert max(g.abs().max().item() for g in gradients.kept.values()) < 1e-6


VARIANTS = [
    {},
    {"teacher": "ema", "ema_rate": 0.2},
    {"method": "sft"},
    {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    {"num_iterations": 3, "teacher": "live", "num_train_epochs": 1},
    {"rollouts_per_prompt": 2, "teacher_cache_gib": 0.1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("saved", [1, 4], ids=["within the epoch", "at its end"])
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(options, saved, tmp_path):
    steps = {"max_steps": 6, "num_train_epochs": 2, **options}
    straight = trained(tmp_path / "straight", **steps)
    trained(tmp_path / "broken", **steps, save_strategy="steps", save_steps=saved, save_total_limit=None)
    torch.manual_seed(99)  # whatever happened in between
    resumed = trainer(tmp_path / "broken", **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / f"checkpoint-{saved}"))
    assert resumed.state.global_step == 6
    assert_equal_weights(weights(resumed.model), weights(straight.model))
    if straight.teacher is not None:
        with straight.teacher.scoring() as expected, resumed.teacher.scoring() as got:
            assert_equal_weights(weights(got), weights(expected))


@pytest.mark.parametrize("done", [3, 4], ids=["within the epoch", "at its end"])
def test_resuming_a_complete_run_makes_no_step_and_has_its_model(done, tmp_path):
    options = {"teacher": "ema", "save_strategy": "steps", "save_steps": 1}
    straight = trained(tmp_path, max_steps=done, **options)

    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.parent != tmp_path}

    before = times()
    for fewer in (0, 1):
        again = trainer(tmp_path, max_steps=done - fewer, **options)
        again.samples = lambda rows: pytest.fail("a step was begun")
        assert again.train(resume_from_checkpoint=True).global_step == done
        assert_equal_weights(weights(again.model), weights(straight.model))
        with straight.teacher.scoring() as expected, again.teacher.scoring() as got:
            assert_equal_weights(weights(got), weights(expected))
    assert times() == before


def test_the_model_of_a_complete_run_is_its_best_where_that_is_asked_for(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    options |= {"load_best_model_at_end": True, "eval_dataset": tiny.rows(2)}
    best = trained(tmp_path, **options)  # all of them answer nothing right, and the first is the best
    again = trainer(tmp_path, **options)
    again.train(resume_from_checkpoint="last")
    assert_equal_weights(weights(again.model), weights(best.model))
    assert best.state.best_global_step == 1


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_average_follows_the_student_through_training_every_so_many_steps(interval, tmp_path):
    states = [weights(tiny.tiny_model())]

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states.append(weights(model))

    run = trained(tmp_path, callbacks=[Keep()], teacher="ema", ema_rate=0.3, ema_interval=interval)
    average = states[0]
    for step in range(interval, 5, interval):
        average = {name: value + 0.3 * (states[step][name] - value) for name, value in average.items()}
    with run.teacher.scoring() as model:
        for name, value in weights(model).items():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-7)
            assert not torch.equal(value, states[0][name])


def test_rollouts_are_sampled_as_the_settings_say(tmp_path):
    run = trainer(
        tmp_path,
        rollout_temperature=0.7,
        rollout_top_p=0.8,
        rollout_top_k=9,
        rollout_min_p=0.1,
        rollout_stop=["ab"],
        max_completion_length=5,
    )
    assert run.sampling == Sampling(5, frozenset({1}), 0.7, 0.8, 9, 0.1, ("ab",))


def test_a_back_end_of_ones_own_writes_the_rollouts_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "own", lambda model, requests, *_: [Completion([7, 8, 1])] * len(requests))
    run = trainer(tmp_path, rollout_backend="own", max_steps=1)
    seen = []
    make = run.samples
    run.samples = lambda rows: seen.extend(make(rows)) or seen
    run.train()
    assert [sample.completion for sample in seen] == [[7, 8, 1]] * 2


def test_a_step_never_holds_logits(tmp_path):
    """Neither model's, for all of a step's tokens: nothing with the vocabulary in its shape is larger than the head."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            largest.extend(value.numel() for value in tensors if 101 in value.shape)
            return out

    run = trainer(tmp_path, per_device_train_batch_size=8, max_steps=1, max_chunk_bytes=4096)
    with Watch():
        run.train()
    head = run.model.lm_head.weight
    assert len(run.train_dataset) * run.args.max_completion_length * 101 > head.numel() == max(largest)


def test_what_would_not_train_as_it_should_is_refused_before_it_begins(tmp_path):
    pytest.importorskip("liger_kernel")
    for options, words in (
        ({"use_liger_kernel": True}, "use_liger_kernel is True; on a CPU it must be False"),
        (
            {"learning_rate": float("inf")},
            "learning_rate is inf; it must be a number of at least 0, and finite in float32",
        ),
        ({"save_strategy": "best"}, "save_strategy is 'best', and eval_strategy is 'no'"),
        ({"model": torch.compile(tiny.tiny_model())}, r"model is what torch.compile returns; .* model\.compile\(\)"),
        ({"model": tiny.tiny_model().half()}, "embed_tokens.weight trains in float16, .* float32 or bfloat16"),
    ):
        with pytest.raises(UsageError, match=words):
            trainer(tmp_path, **options)
    with pytest.raises(UsageError, match="its name is no text in UTF-8"):
        trainer(tmp_path / "o\udcff")
    assert not list(tmp_path.iterdir())


def test_arguments_of_another_class_are_refused(tmp_path):
    with pytest.raises(UsageError, match="args is a TrainingArguments; it must be an SDFTConfig"):
        SDFTTrainer(tiny.tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_training_is_refused_within_what_would_change_it(tmp_path):
    run = trainer(tmp_path)
    for context, words in (
        (torch.no_grad(), "where torch keeps no gradients"),
        (torch.inference_mode(), "where torch keeps no gradients"),
        (torch.autocast("cpu", dtype=torch.bfloat16), r"train is called within torch\.autocast"),
    ):
        with context, pytest.raises(UsageError, match=words):
            run.train()
    assert not list(tmp_path.iterdir())


def test_liger_kernels_are_in_the_student_and_in_its_teacher(tmp_path, monkeypatch):
    rms_norm = pytest.importorskip("liger_kernel.transformers.rms_norm").LigerRMSNorm
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(
            modeling_llama, name, getattr(modeling_llama, name)
        )  # put back afterwards: liger replaces it
    monkeypatch.setattr("sdft.launch.check_for_liger", lambda device: None)
    for check in ("check_head", "check_same_in_training"):  # Triton's interpreter does not run their kernels
        monkeypatch.setattr(f"sdft.trainer.{check}", lambda *_: None)
    run = trainer(tmp_path, use_liger_kernel=True)
    with run.teacher.scoring() as teacher:
        for model in (run.student, teacher):
            assert model.model.norm.forward.__func__ is rms_norm.forward
            assert model.model.norm.forward.__self__ is model.model.norm
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: False)
    with pytest.raises(
        UsageError, match=r"use_liger_kernel is True, which cannot be had here: .*pip install liger-kernel"
    ):
        trainer(tmp_path, use_liger_kernel=True)


# Where the package is, there is nothing to refuse; the project itself asks for it nowhere.
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_that_is_not_installed_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match=r"optim is 'adamw_bnb_8bit', which cannot be had here: .*bitsandbytes"):
        trainer(tmp_path, optim="adamw_bnb_8bit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim_args": "abc"}, "optim is 'adamw_torch_fused', optim_args is 'abc', which cannot be had here"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_type is 'linear', lr_scheduler_kwargs is {'a': 1}, which"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type is 'cosine_with_min_lr', which cannot be had"),
        ({"activation_checkpointing_kwargs": {"a": 1}}, "activation_checkpointing_kwargs is {'a': 1}, which cannot be"),
        ({"push_to_hub": True}, "push_to_hub is True, which cannot be had here"),
        ({"arguments": {"peft_config": {"r": 2}}}, "peft_config is an object; it must be a configuration of peft's"),
        ({"model": tiny.tiny_model().requires_grad_(False)}, "the model has no parameter that trains"),
        ({"model": 3}, "model is a number; it must be a name or a path"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_before_training(options, said, tmp_path):
    with pytest.raises(UsageError, match=f"^{re.escape(said)}"):
        trainer(tmp_path, **options)


def test_the_base_teacher_of_a_resumed_run_is_the_original_model(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=2)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(resumed.teacher.model), weights(tiny.tiny_model()))


def test_rollouts_depend_on_seed_and_step_alone(tmp_path):
    run = trainer(tmp_path)
    rows = run.train_dataset[:4]

    def completions():
        return [s.completion for s in run.samples(rows)]

    first = completions()
    torch.rand(7)
    assert completions() == first
    run.state.global_step = 1
    assert completions() != first
    run.state.global_step = 0
    run.args.seed = 43
    assert completions() != first


def test_several_rollouts_of_a_prompt_are_side_by_side_and_differ(tmp_path):
    run = trainer(tmp_path, rollouts_per_prompt=3, rollout_batch_size=4)
    samples = run.samples(run.train_dataset[:2])
    assert [s.prompt for s in samples] == [row["prompt_ids"] for row in run.train_dataset[:2] for _ in range(3)]
    assert len({tuple(s.completion) for s in samples}) == 6
    as_many_as_fit = trainer(tmp_path, rollouts_per_prompt=3, rollout_batch_size="auto")
    assert as_many_as_fit.samples(as_many_as_fit.train_dataset[:2]) == samples
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_rollouts_can_come_from_the_teacher_who_sees_the_demonstration(backend, tmp_path):
    run = trainer(tmp_path, rollout_from="teacher", rollout_temperature=1e-4, rollout_backend=backend)
    run.model.lm_head.weight.data.neg_()  # the student would write something else
    teacher = tiny.tiny_model()
    for s in run.samples(run.train_dataset[:2]):
        ids = list(s.teacher_prompt)
        for token in s.completion:
            assert teacher(torch.tensor([ids])).logits[0, -1].argmax().item() == token
            ids.append(token)
        assert s.prompt in [row["prompt_ids"] for row in run.train_dataset[:2]]


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_with_an_adapter_the_base_teacher_writes_rollouts_without_it(backend, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(tiny.tiny_model(), adapter)
    options = {"model": model, "rollout_temperature": 1e-4, "rollout_backend": backend}
    from_teacher = trainer(tmp_path, rollout_from="teacher", **options)
    from_student = trainer(tmp_path, **options)
    rows = from_teacher.train_dataset[:2]
    prompts = [row["teacher_prompt_ids"] for row in rows]
    expected = sample(tiny.tiny_model(), prompts, Sampling(6, frozenset({1})))
    assert [s.completion for s in from_teacher.samples(rows)] == expected
    for row, prompt in zip(rows, prompts, strict=True):
        row["prompt_ids"] = prompt
    assert [s.completion for s in from_student.samples(rows)] != expected


def test_stop_strings_end_rollouts_and_count_as_finished(tmp_path):
    run = trainer(tmp_path, max_completion_length=40, max_steps=1, rollout_stop=["a", "e", "i", "o", "u", " ", "r"])
    run.train()
    log = run.state.log_history[0]
    assert log["finished"] == 1
    assert log["completion_length"] < 40


def launched(monkeypatch, plugin=None, **attributes):
    """Have the Trainer believe that it was launched otherwise."""
    made = SDFTTrainer.create_accelerator_and_postprocess

    def as_if(self):
        made(self)
        vars(self).update(attributes)
        self.accelerator.state.fsdp_plugin = plugin

    monkeypatch.setattr(SDFTTrainer, "create_accelerator_and_postprocess", as_if)


def test_torch_compile_and_deepspeed_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="torch_compile is True; it must be False"):
        trainer(tmp_path, torch_compile=True)
    launched(monkeypatch, is_deepspeed_enabled=True)
    with pytest.raises(UsageError, match="deepspeed is set; it must not be"):
        trainer(tmp_path)


def test_under_fsdp_version_1_is_refused_and_2_does_not_round_what_the_loss_returns(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    plugin = SimpleNamespace(fsdp_version=1)
    launched(monkeypatch, plugin, is_fsdp_enabled=True)
    with pytest.raises(UsageError, match="fsdp_version is 1; it must be 2"):
        trainer(tmp_path)
    plugin.fsdp_version, plugin.activation_checkpointing = 2, True
    adapter = peft.LoraConfig(target_modules=["q_proj"], r=2)
    with pytest.raises(UsageError, match="with an adapter it must not"):
        trainer(tmp_path, model=peft.get_peft_model(tiny.tiny_model(), adapter))
    plugin.activation_checkpointing, plugin.mixed_precision_policy = False, None
    with pytest.raises(UsageError, match=r"teacher_cache_gib is 0.5; under FSDP with an adapter"):
        trainer(tmp_path, model=peft.get_peft_model(tiny.tiny_model(), adapter), teacher_cache_gib=0.5)
    with pytest.raises(UsageError, match=r"rollout_batch_size is 'auto'; under FSDP"):
        trainer(tmp_path, rollout_batch_size="auto")
    plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.bfloat16)
    trainer(tmp_path)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16)


def test_continuous_batching_under_mixed_precision_samples_in_the_weights_type(tmp_path):
    run = trainer(tmp_path, bf16=True, rollout_backend="continuous", max_steps=2, eval_dataset=tiny.rows(2))
    written = []
    sample = run.samples
    run.samples = lambda rows: written.append(sample(rows)) or written[-1]
    run.train()
    assert [len(samples) for samples in written] == [2, 2]
    forward = run.student.forward
    run.samples(run.train_dataset[:2])
    assert run.student.forward is forward and "_original_forward" in vars(run.student)  # accelerate's, around its own


def test_predict_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="evaluate does"):
        trainer(tmp_path).predict([])


def lines(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_normalisation": "sequence", "demonstration_weight": 0.5},
        {"num_iterations": 2},
        {"max_forward_tokens": 20},
    ],
    ids=str,
)
def test_logged_completions_have_the_numbers_of_full_logits(options, tmp_path):
    run = trainer(
        tmp_path,
        max_steps=1,
        skip_tokens=2,
        loss_temperature=1.7,
        gradient_accumulation_steps=2,
        rollouts_per_prompt=2,
        log_completions=True,
        **options,
    )
    seen = []
    make = run.samples
    run.samples = lambda rows: seen.extend(make(rows)) or seen
    run.train()
    student, teacher, tokenizer = tiny.tiny_model(), tiny.tiny_model(), tiny.tiny_tokenizer()
    logged = lines(tmp_path)
    assert len(logged) == len(seen) == 8
    for s in seen:
        completion = torch.tensor(s.completion)
        record = next(r for r in logged if r["completion_ids"] == s.completion)
        assert record["step"] == 1
        assert record["prompt"] == tokenizer.decode(s.prompt)
        assert record["teacher_prompt"] == tokenizer.decode(s.teacher_prompt)
        assert record["completion"] == tokenizer.decode(s.completion)
        p, q = (
            (model(torch.tensor([[*prompt, *s.completion]])).logits[0, len(prompt) - 1 : -1] / 1.7).log_softmax(-1)
            for model, prompt in ((student, s.prompt), (teacher, s.teacher_prompt))
        )
        expected = {
            "divergence": (p.exp() * (p - q)).sum(-1),
            "student_logprob": p.gather(-1, completion[:, None])[:, 0],
            "teacher_logprob": q.gather(-1, completion[:, None])[:, 0],
        }
        for name, values in expected.items():
            assert record[name][:2] == [None] * min(2, len(completion))
            torch.testing.assert_close(torch.tensor(record[name][2:]), values[2:], rtol=1e-4, atol=2e-6)
        assert "".join(record["tokens"]) == record["completion"]
        for name, logprobs in (("student_top", p), ("teacher_top", q)):
            assert record[name][:2] == [None] * min(2, len(completion))
            for pairs, row in zip(record[name][2:], logprobs[2:], strict=True):
                top = row.topk(3)
                assert [token for token, _ in pairs] == [tokenizer.decode([each]) for each in top.indices]
                torch.testing.assert_close(torch.tensor([n for _, n in pairs]), top.values, rtol=1e-4, atol=1e-4)


def test_a_resumed_run_logs_each_completion_once(tmp_path):
    steps = {"max_steps": 6, "num_train_epochs": 2, "log_completions": 2, "save_strategy": "steps", "save_steps": 3}
    straight = trained(tmp_path / "straight", **steps)
    assert [r["step"] for r in lines(tmp_path / "straight")] == [2, 2, 4, 4, 6, 6]
    whole = (tmp_path / "straight" / "completions.jsonl").read_bytes()
    trained(tmp_path / "broken", **steps)
    path = tmp_path / "broken" / "completions.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # killed while it wrote
    resumed = trainer(tmp_path / "broken", **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert path.read_bytes() == whole
    unlogged = trained(tmp_path / "unlogged", **{**steps, "log_completions": 0})
    assert not (tmp_path / "unlogged" / "completions.jsonl").exists()
    assert_equal_weights(weights(unlogged.model), weights(straight.model))
    assert_equal_weights(weights(resumed.model), weights(straight.model))
    again = {**steps, "max_steps": 2, "overwrite_output_dir": True}
    trained(tmp_path / "straight", **again)  # a new run in the same folder starts anew
    assert [r["step"] for r in lines(tmp_path / "straight")] == [2, 2]


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, teacher="ema")
    save = run.teacher.save

    def full_disk(folder):
        if run.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(folder)

    monkeypatch.setattr(run.teacher, "save", full_disk)
    with pytest.raises(TrainingError, match=r"checkpoint-4 could not be .* No space left .* checkpoint-2 is whole"):
        run.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "run.json"]
    assert "teacher_average.safetensors" in os.listdir(tmp_path / "checkpoint-2")
    again = trainer(tmp_path, teacher="ema")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    run = trained(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    run.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "run.json"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_equal_weights(weights(saved), weights(run.model))


def test_the_best_checkpoint_is_remembered_by_its_final_name(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset=tiny.rows(3),
        max_steps=2,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="accuracy",
    )
    run.train()
    final = str(tmp_path / "checkpoint-1")
    assert run.state.best_model_checkpoint == final
    assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["best_model_checkpoint"] == final
    assert [e["eval_accuracy"] for e in run.state.log_history if "eval_accuracy" in e] == [0.0, 0.0]


def test_the_saved_model_loads_with_from_pretrained(tmp_path):
    run = trained(tmp_path, max_steps=1)
    run.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_weights(weights(saved), weights(run.model))
    assert saved.config.use_cache
    assert ".saving" not in os.listdir(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_take_it_in(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=1)
    run.teacher.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        run.train()
    assert_equal_weights(weights(run.model), weights(tiny.tiny_model()))
    assert os.listdir(tmp_path) == []


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_take_it_in(tmp_path):
    run = trainer(tmp_path)
    run.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"gradient's norm is (nan|inf) at step 1"):
        run.train()
    assert_equal_weights(weights(run.model), weights(tiny.tiny_model()))


def test_dropout_is_off(tmp_path):
    run = trainer(tmp_path, model=tiny.tiny_model(attention_dropout=0.5), max_steps=1)
    for row in run.train_dataset:
        row["teacher_prompt_ids"] = row["prompt_ids"]
    run.train()
    assert abs(run.state.log_history[0]["loss"]) < 1e-6


def test_logs_say_what_the_rollouts_were_like(tmp_path):
    run = trained(tmp_path, max_steps=2, logging_steps=2)
    log = run.state.log_history[0]
    assert 1 <= log["completion_length"] <= 6
    assert 0 <= log["finished"] <= 1
    assert 0 < log["student_entropy"] < 4.7  # log 101
    assert 0 < log["teacher_entropy"] < 4.7
    assert log["rollout_seconds"] > 0


def test_logs_say_what_time_went_to_and_how_much_memory_was_taken(tmp_path):
    started = time.perf_counter()
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    run = trained(tmp_path, max_steps=2, **options, eval_dataset=tiny.rows(2), num_iterations=2)
    run.save_model()
    whole, spent = time.perf_counter() - started, run.step_log.spent()
    first, second = (log for log in run.state.log_history if "loss" in log)
    phases = ["rollout_seconds", "score_seconds", "learn_seconds", "save_seconds", "eval_seconds"]
    assert [name for name in phases if name in first] == phases[:3]
    assert [name for name in phases if name in second] == phases[1:]  # of the rollouts that served both
    for name in phases:
        assert spent[name] >= first.get(name, 0) + second.get(name, 0) > 0
    assert 0 < sum(spent[name] for name in phases) < whole
    tokens = 2 * first["completion_length"]
    assert first["rollout_tokens_per_second"] == pytest.approx(tokens / first["rollout_seconds"], rel=1e-5)
    assert first["tokens_per_second"] == pytest.approx(tokens / sum(first[name] for name in phases[:3]), rel=1e-5)
    assert 100 < first["peak_memory_mib"] <= second["peak_memory_mib"] <= spent["peak_memory_mib"]


@pytest.mark.parametrize(
    ("cut_in", "said"), [({1, 2, 3, 4, 5, 6}, 1), ({5, 6}, 0), ({5, 6, 7}, 1), (set(), 0)], ids=str
)
def test_it_is_said_once_that_most_completions_are_cut(cut_in, said, tmp_path, caplog):
    """Of two in each step; eight are enough to judge by."""
    run = trainer(tmp_path, max_steps=8)
    write = run.with_student

    def cut_or_not(function):
        length, end = (6, "length") if run.state.global_step + 1 in cut_in else (1, "token")
        return [Completion([5] * length, end=end) for _ in write(function)]

    run.with_student = cut_or_not
    with caplog.at_level(logging.WARNING, logger="sdft.trainer"):
        run.train()
    lines = [record.getMessage() for record in caplog.records if "completions were cut" in record.getMessage()]
    count = 8 if 1 in cut_in else 6
    assert lines == said * [
        f"{count} of the last 8 completions were cut at max_completion_length=6: raise it, or name in rollout_stop "
        "what ends an answer"
    ]


def test_a_missing_tokenizer_and_an_empty_dataset_are_refused(tmp_path):
    with pytest.raises(UsageError, match="processing_class is not set"):
        SDFTTrainer(tiny.tiny_model(), SDFTConfig(output_dir=str(tmp_path)), train_dataset=tiny.rows())
    with pytest.raises(UsageError, match="train_dataset is empty"):
        trainer(tmp_path, rows=[])


def test_bfloat16_weights_and_mixed_precision_train(tmp_path):
    run = trained(tmp_path, bf16=True, max_steps=2)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    model = tiny.tiny_model().to(torch.bfloat16)
    run = trained(tmp_path, model=model, max_steps=2, teacher="ema")
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    assert all(average.dtype == torch.float32 for average in run.teacher.average.values())


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_a_function_can_run_as_the_forward_pass_of_what_wraps_the_model():
    module = torch.nn.Linear(2, 2)
    wrapper = Wrapper(module)
    inner = torch.ones(1, 2)
    assert torch.equal(as_forward_of(wrapper, module, lambda: module(inner)), module(inner))
    assert wrapper.calls == 1
    assert "forward" not in module.__dict__
    with pytest.raises(ZeroDivisionError):
        as_forward_of(wrapper, module, lambda: 1 / 0)
    assert torch.equal(wrapper(inner), module(inner))


def full_logits(model, prompt, completion):
    return model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_cross_entropy_on_the_demonstration_mixes_in(tmp_path):
    gradients = Gradients()
    run = trainer(tmp_path, callbacks=[gradients], max_steps=1, max_grad_norm=0, demonstration_weight=0.25)
    seen = []
    make = run.samples
    run.samples = lambda rows: seen.extend(make(rows)) or seen
    run.train()
    student, teacher = tiny.tiny_model(), tiny.tiny_model()
    divergence, entropy = torch.zeros(()), torch.zeros(())
    for s in seen:
        p = full_logits(student, s.prompt, s.completion)
        q = full_logits(teacher, s.teacher_prompt, s.completion).detach()
        divergence = divergence + (p.exp() * (p - q)).sum()
        assert s.demonstration[-1] == 1  # the end-of-sequence token is learned
        shown = full_logits(student, s.prompt, s.demonstration)
        entropy = entropy - shown.gather(1, torch.tensor(s.demonstration)[:, None]).sum()
    loss = 0.75 * divergence / sum(len(s.completion) for s in seen)
    loss = loss + 0.25 * entropy / sum(len(s.demonstration) for s in seen)
    loss.backward()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert (gradients.kept[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-5, name


def test_rollouts_serve_several_steps_with_importance_weights(tmp_path):
    """The second step uses the first one's completions, each token weighed by its ratio; the fourth has new ones."""
    run = trainer(tmp_path, max_steps=4, num_iterations=3, importance_clip=1.5)
    steps, students = [], []
    make, before = run.step_samples, run.get_batch_samples

    def noted(rows):
        samples = make(rows)
        steps.append((rows, samples))
        return samples

    def noted_student(*args):
        students.append(weights(run.student))
        return before(*args)

    run.step_samples, run.get_batch_samples = noted, noted_student
    run.train()
    rows, samples = zip(*steps, strict=True)
    assert samples[0] is samples[1] is samples[2] is not samples[3]
    assert rows[0] == rows[1] == rows[2] != rows[3]
    teacher, old, now = tiny.tiny_model(), tiny.tiny_model(), tiny.tiny_model()
    now.load_state_dict(students[1], strict=False)
    total, tokens = 0.0, 0
    for s in samples[0]:
        labels = torch.tensor(s.completion)[:, None]
        p = full_logits(now, s.prompt, s.completion).detach()
        q = full_logits(teacher, s.teacher_prompt, s.completion).detach()
        at_sampling = full_logits(old, s.prompt, s.completion).detach().gather(1, labels)[:, 0]
        torch.testing.assert_close(torch.tensor(s.old_logprobs), at_sampling, rtol=1e-5, atol=1e-6)
        ratio = (p.gather(1, labels)[:, 0] - at_sampling).exp()
        assert (ratio - 1).abs().max() > 1e-3
        total += (ratio.clamp(max=1.5) * (p.exp() * (p - q)).sum(-1)).sum().item()
        tokens += len(s.completion)
    assert run.state.log_history[1]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_repeated_rows_cover_the_epoch_a_step_at_a_time():
    rows = RepeatedRows(7, group=3, repeats=2, seed=5)
    order = list(rows)
    groups = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(order) == len(rows) == 18
    assert groups[::2] == groups[1::2]
    assert {number for group in groups for number in group} == set(range(7))
    assert list(rows) == order
    rows.set_epoch(1)
    assert list(rows) != order


@pytest.mark.parametrize(("launched_with", "dtype"), [("bf16", torch.bfloat16), ("no", None)])
def test_precision_is_what_accelerate_launch_sets(launched_with, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    run = trainer(tmp_path, max_steps=1)
    assert run.autocast_type == dtype
    seen = []
    run.student.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    run.train()
    assert set(seen) == {dtype or torch.float32}


def test_compilation_that_accelerate_launch_sets_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UsageError, match="dynamo_backend is INDUCTOR; it must be no"):
        trainer(tmp_path)


def test_a_schedule_free_optimizer_saves_and_evaluates_the_averaged_weights(tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_adamw", "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path / "run", eval_dataset=tiny.rows(2), **options)
    run.train()
    run.save_model()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    in_checkpoint = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    averaged = weights(run.student)
    run.optimizer.train()
    trained = weights(run.student)
    run.evaluate()
    for name, tensor in weights(run.student).items():
        torch.testing.assert_close(tensor, averaged[name])
        assert torch.equal(saved[name], averaged[name])
        assert torch.equal(in_checkpoint[name], averaged[name])
    assert max((trained[name] - tensor).abs().max() for name, tensor in averaged.items()) > 1e-4
    resumed = trainer(tmp_path / "resumed", **{**options, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    resumed.save_model()
    assert_equal_weights(weights(resumed.student), averaged)


def lying_sampler(monkeypatch, by):
    """`generate`, which says that it drew each token with a log-probability that is less by so much."""
    honest = BACKENDS["generate"]

    def write(model, requests, sampling, tokenizer):
        written = honest(model, requests, sampling, tokenizer)
        return [
            replace(one, logprobs=None if one.logprobs is None else [x - by for x in one.logprobs]) for one in written
        ]

    monkeypatch.setitem(BACKENDS, "lying", write)


@pytest.mark.parametrize(("by", "weight"), [(0.0, 1.0), (0.3, math.exp(0.3)), (-0.4, math.exp(-0.4)), (2.0, 1.5)])
def test_tokens_weigh_as_much_more_as_they_were_drawn_too_seldom(by, weight, tmp_path, monkeypatch):
    lying_sampler(monkeypatch, by)
    options = {"max_steps": 1, "rollout_backend": "lying", "importance_clip": 1.5}
    plain = trained(tmp_path / "a", rollout_correction="none", **options).state.log_history[0]
    weighted = trained(tmp_path / "b", rollout_correction="truncate", **options).state.log_history[0]
    assert weighted["loss"] == pytest.approx(weight * plain["loss"], rel=1e-5)
    assert weighted["rollout_gap"] == pytest.approx(abs(by), abs=1e-5)
    assert weighted["rollout_gap_max"] == pytest.approx(abs(by), abs=1e-5)
    assert weighted["effective_share"] == pytest.approx(1.0, abs=1e-5)
    assert "rollout_gap" not in plain


@pytest.mark.parametrize(
    ("options", "corrects"),
    [
        ({}, False),  # generate in float32 draws from what the loss sees
        ({"rollout_backend": "lying"}, True),
        ({"rollout_backend": "lying", "rollout_correction": "none"}, False),
        ({"rollout_backend": "lying", "rollout_top_k": 5}, False),
        ({"rollout_backend": "lying", "rollout_temperature": 0.7}, False),
        ({"rollout_backend": "lying", "rollout_from": "teacher"}, False),
        ({"rollout_backend": "lying", "method": "sft"}, False),
        ({"rollout_correction": "truncate", "rollout_top_k": 5}, True),
    ],
    ids=str,
)
def test_auto_corrects_where_only_rounding_parts_the_two(options, corrects, tmp_path, monkeypatch):
    lying_sampler(monkeypatch, 0.1)
    assert trainer(tmp_path, **options).corrects == corrects


def test_auto_corrects_what_is_drawn_in_bfloat16(tmp_path):
    run = trained(tmp_path, model=tiny.tiny_model().bfloat16(), max_steps=1)
    log = run.state.log_history[0]
    assert run.corrects and 0 < log["rollout_gap"] < log["rollout_gap_max"] < 0.2 and 0.9 < log["effective_share"] < 1


def test_a_correction_takes_a_back_end_that_knows_its_probabilities(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "own", lambda model, requests, *_: [Completion([7, 8, 1])] * len(requests))
    run = trainer(tmp_path, rollout_backend="own", rollout_correction="truncate", max_steps=1)
    with pytest.raises(TrainingError, match="rollout_backend 'own' does not say with which probability"):
        run.train()
    assert "rollout_gap" not in trained(tmp_path / "auto", rollout_backend="own", max_steps=1).state.log_history[0]
    with pytest.raises(UsageError, match="rollout_correction is 'truncate' and rollout_from 'teacher'"):
        SDFTConfig(output_dir=str(tmp_path), rollout_correction="truncate", rollout_from="teacher")


def test_rollouts_that_know_their_probabilities_are_not_scored_again(tmp_path, monkeypatch):
    run = trainer(tmp_path, max_steps=4, num_iterations=2, rollout_correction="truncate")
    monkeypatch.setattr(run, "_with_old_logprobs", lambda samples: pytest.fail("scored again"))
    run.train()
    first, second, *_ = run.state.log_history
    assert first["rollout_gap"] < 1e-5 < second["rollout_gap"]


GPU = torch.device("cuda")


@pytest.mark.parametrize("often", [False, True])
def test_shapes_that_are_new_take_no_attention_that_prepares_for_them(tmp_path, monkeypatch, often):
    """Not in a forward pass, its backward pass, or what that computes again; shapes that come often do."""
    choose = ShapesSeen.attention_for
    monkeypatch.setattr(ShapesSeen, "attention_for", lambda self, batches, _: choose(self, batches, GPU))
    monkeypatch.setattr(attention, "TRIED", 0 if often else 99)
    seen = []

    def look(*_):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    model = tiny.tiny_model()
    importance = {"num_iterations": 2, "rollout_backend": "continuous"}  # by probabilities from a pass of their own
    monkeypatch.setattr(SDFTTrainer, "write", staticmethod(lambda *given, **named: quietly(seen, given, named)))
    stepping = trainer(tmp_path, model=model, max_steps=1, activation_checkpointing=True, **importance)
    model.model.layers[0].register_forward_pre_hook(look)
    model.model.layers[0].mlp.down_proj.weight.register_hook(look)
    stepping.train()
    assert len(seen) > 2 and set(seen) == {often}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def quietly(seen, given, named):
    """Rollouts, of which nothing is seen."""
    before = len(seen)
    completions = write(*given, **named)
    del seen[before:]
    return completions


def test_which_shapes_are_worth_preparing_for():
    def prepares(*batches, device=GPU):
        with shapes.attention_for(batches, device):
            return torch.backends.cuda.cudnn_sdp_enabled()

    def batch(length, **others):
        return {"input_ids": torch.empty(2, length), "labels": torch.empty(99_999), "samples": []} | others

    shapes = ShapesSeen()
    assert [prepares(batch(9)) for _ in range(4)] == [False, False, True, True]
    assert [prepares(batch(9), batch(8)) for _ in range(3)] == [False, False, True]
    with_teacher = batch(9, teacher_input_ids=torch.empty(2, 30))
    assert [prepares(with_teacher) for _ in range(3)] == [False, False, True]
    assert not prepares(batch(32_767)) and prepares(batch(32_768))
    assert prepares(batch(5, teacher_input_ids=torch.empty(1, 40_000)))
    assert prepares(batch(7), device=torch.device("cpu"))
    assert not prepares()
