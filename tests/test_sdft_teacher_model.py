"""Another model as the teacher: of another size, padded, in another type; what it may not be; and by every command."""

import json
import logging
import os

import pytest
import torch
import yaml
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TrainerCallback

from sdft import SDFTConfig, SDFTTrainer
from sdft.cli import main
from sdft.data import Limits
from sdft.errors import TrainingError, UsageError
from sdft.rows import training_rows
from sdft.run_files import RESOLVED_FILE
from sdft.settings.config import MethodSettings
from sdft.settings.idle import OF_TRAINING, without_effect
from sdft.teacher import ModelTeacher
from tests import tiny

PROMPTS = [{"prompt": row["prompt"]} for row in tiny.rows()]
PLAIN = {"teacher": "model", "per_device_train_batch_size": 4, "max_steps": 2, "max_completion_length": 6}


def large(seed=7, **options):
    """A teacher of two wider layers, and a vocabulary that is padded otherwise than the student's."""
    return tiny.tiny_model(seed, **{"hidden_size": 48, "vocab_size": 104, **options})


def trainer(folder, taught_by=None, *, student=None, rows=None, callbacks=None, arguments=None, **options):
    settings = {**PLAIN, "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return SDFTTrainer(
        student or tiny.tiny_model(),
        SDFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=PROMPTS if rows is None else rows,
        processing_class=tiny.tiny_tokenizer(),
        callbacks=callbacks,
        teacher_model=taught_by,
        **(arguments or {}),
    )


def encoded():
    """The rows with their token ids."""
    tokenizer, settings = tiny.tiny_tokenizer(), SDFTConfig(method="sft")
    return training_rows(tiny.rows(), settings, tokenizer, frozenset({1}), Limits())


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.kept = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}


def distance(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def full_logits_gradients(student, teacher, samples, divergence, beta=0.5, skipped=0):
    """Gradients of the mean divergence over the samples' tokens, in float64 from whole logits of the shared tokens."""
    student, teacher = student.double(), teacher.double()
    losses, shared = [], min(student.config.vocab_size, teacher.config.vocab_size)
    for sample in samples:
        logps = []
        for model, prompt in ((student, sample.prompt), (teacher, sample.teacher_prompt)):
            logits = model(torch.tensor([[*prompt, *sample.completion]])).logits[
                0, len(prompt) - 1 + skipped : -1, :shared
            ]
            logps.append(logits.log_softmax(-1))
        p, q = logps[0], logps[1].detach()
        m = torch.logaddexp(p + torch.tensor(1 - beta).log(), q + torch.tensor(beta).log())
        losses.append(
            {
                "reverse_kl": lambda p=p, q=q: (p.exp() * (p - q)).sum(-1),
                "forward_kl": lambda p=p, q=q: (q.exp() * (q - p)).sum(-1),
                "jsd": lambda p=p, q=q, m=m: (
                    (1 - beta) * (p.exp() * (p - m)).sum(-1) + beta * (q.exp() * (q - m)).sum(-1)
                ),
            }[divergence]()
        )
    torch.cat(losses).mean().backward()
    return {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("seen", ["prompt", "turn"])
def test_gradients_are_those_of_full_logits(divergence, seen, tmp_path):
    seed = int.from_bytes(os.urandom(4))
    gradients, student, teacher = Gradients(), tiny.tiny_model(seed), large(seed + 1)
    run = trainer(
        tmp_path,
        teacher,
        student=student,
        rows=tiny.rows(),
        callbacks=[gradients],
        max_steps=1,
        max_grad_norm=0,
        divergence=divergence,
        teacher_template=seen,
    )
    kept, sample = [], run.samples
    run.samples = lambda rows: kept.extend(sample(rows)) or kept
    start = tiny.tiny_model(seed)
    run.train()
    assert all((sample.prompt == sample.teacher_prompt) == (seen == "prompt") for sample in kept)
    expected = full_logits_gradients(start, large(seed + 1), kept, divergence)
    assert gradients.kept.keys() == expected.keys()
    got, exact = (torch.cat([of[name].flatten() for name in expected]) for of in (gradients.kept, expected))
    assert distance(got, exact) < 1e-5, seed


@torch.no_grad()
def loss_on_demonstrations(model):
    """Nats a token of the demonstrations after their prompts, in float64."""
    losses = []
    for row in encoded():
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        logits = model.double()(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(row["prompt_ids"]) :], reduction="none"))
    model.float()
    return float(torch.cat(losses).mean())


def test_a_student_of_four_layers_reaches_the_loss_of_its_teacher_of_two(tmp_path):
    """The teacher has learned the demonstrations; the student, who begins at random, sees only the prompts."""
    options = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "max_completion_length": 8}
    learned = trainer(tmp_path / "teacher", rows=tiny.rows(), method="sft", **{**options, "max_steps": 60})
    learned.train()
    student = tiny.tiny_model(4, num_hidden_layers=4)
    before = loss_on_demonstrations(student)
    run = trainer(
        tmp_path / "student", learned.model, student=student, divergence="forward_kl", **{**options, "max_steps": 90}
    )
    run.train()
    teachers, students = loss_on_demonstrations(learned.model), loss_on_demonstrations(student)
    assert teachers < 0.2 and before > 2
    assert students < teachers + 0.05


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"rollouts_per_prompt": 2, "teacher_cache_gib": 0.1, "log_completions": 1},
        {"teacher_offload": True},
        {"rollout_from": "teacher", "num_iterations": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("lora", [False, True])
def test_settings_of_teachers_are_for_this_one_too(options, lora, tmp_path):
    vocabulary = 101 if "rollout_from" in options else 104  # of tokens that it may write
    teacher = large(vocab_size=vocabulary)
    before = weights(teacher)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    run = trainer(tmp_path / "run", teacher, arguments={"peft_config": adapter}, **options)
    start = weights(run.model)
    run.train()
    assert any(not torch.equal(p, start[name]) for name, p in run.model.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad, name
    plain = {name: value for name, value in options.items() if name not in ("teacher_offload", "teacher_cache_gib")}
    again = trainer(tmp_path / "plain", large(vocab_size=vocabulary), arguments={"peft_config": adapter}, **plain)
    again.train()
    for name, value in weights(run.model).items():
        assert distance(value, weights(again.model)[name]) < 1e-4, name


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_teacher_may_be_of_another_type(types, mixed, tmp_path):
    """Its head is brought to the student's type, or to that of mixed precision."""
    narrow = {"initializer_range": 0.1}  # so that rounding stays small beside the gradient
    gradients, student, teacher = Gradients(), tiny.tiny_model(**narrow).to(types[0]), large(**narrow).to(types[1])
    run = trainer(tmp_path, teacher, student=student, callbacks=[gradients], max_steps=1, max_grad_norm=0, bf16=mixed)
    kept, sample = [], run.samples
    run.samples = lambda rows: kept.extend(sample(rows)) or kept
    run.train()
    start, rounded = tiny.tiny_model(**narrow).to(types[0]), large(**narrow).to(types[1])
    expected = full_logits_gradients(start, rounded, kept, "reverse_kl")
    for name, gradient in gradients.kept.items():
        assert distance(gradient, expected[name]) < 0.05, name


def test_it_is_named_in_the_settings_and_may_be_an_adapter(tmp_path, caplog):
    base = tiny.saved(tmp_path / "base", large())
    adapted = SDFTTrainer(
        base,
        SDFTConfig(output_dir=str(tmp_path / "adapter"), method="sft", max_steps=8, learning_rate=0.01, use_cpu=True),
        train_dataset=tiny.rows(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.train()
    adapted.save_model()
    config = SDFTConfig(
        output_dir=str(tmp_path / "run"),
        teacher_model=str(tmp_path / "adapter"),
        teacher_dtype="bfloat16",
        max_steps=1,
        max_completion_length=4,
        use_cpu=True,
        save_strategy="no",
    )
    assert (config.teacher, config.teacher_template) == ("model", "prompt")
    with caplog.at_level(logging.WARNING):
        run = SDFTTrainer(tiny.tiny_model(), config, PROMPTS, processing_class=tiny.tiny_tokenizer())
    run.train()
    assert isinstance(run.teacher, ModelTeacher) and run.teacher.model.dtype == torch.bfloat16
    assert "a vocabulary of 104 tokens and the model one of 101: the 101 that both have" in caplog.text
    merged = adapted.model.merge_and_unload().model.layers[0].mlp.up_proj.weight
    assert distance(run.teacher.model.model.layers[0].mlp.up_proj.weight, merged) < 0.005
    assert distance(large().model.layers[0].mlp.up_proj.weight, merged) > 0.02
    named = trainer(tmp_path / "named", base)
    assert named.args.teacher_model == base and named.teacher.model.dtype == torch.float32


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer(tmp_path / "straight", large(), **saving)
    straight.train()
    resumed = trainer(tmp_path / "resumed", large(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for name, value in weights(straight.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name


def other_tokenizer(**special):
    """One that has two letters the other way round."""
    tokenizer = tiny.tiny_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    words = rules["model"]["vocab"]
    words["s"], words["t"] = words["t"], words["s"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)), eos_token=tokenizer.eos_token, pad_token="<pad>"
    )
    made.chat_template = tokenizer.chat_template
    return made


def test_the_first_token_that_is_another_is_named(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "say a"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    own, other = tokenizer.convert_tokens_to_ids(["s", "t"])
    with pytest.raises(UsageError) as refused:
        trainer(tmp_path, (large(), other_tokenizer()))
    assert str(refused.value) == (
        f"train_dataset, row 1: token {ids.index(own) + 1} is 's' ({own}) for the model and 's' ({other}) for "
        "teacher_model; they must have the same tokenizer"
    )
    trainer(tmp_path, (large(), tiny.tiny_tokenizer()))


def test_an_answer_must_end_alike_and_other_chat_templates_are_said(tmp_path, caplog):
    its = tiny.tiny_tokenizer()
    its.chat_template = "{{ messages }}"
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, (large(), its))
    assert "teacher_model has another chat template than the model" in caplog.text
    ends = other_tokenizer()
    ends.convert_ids_to_tokens = lambda token: "<end>"
    with pytest.raises(UsageError, match=r"^teacher_model has '<end>' for token 1, which ends an answer, and the mode"):
        trainer(tmp_path, (large(), ends))


def test_a_token_of_the_padding_ends_the_run(tmp_path):
    run = trainer(tmp_path, large(vocab_size=101), student=tiny.tiny_model(vocab_size=120), max_steps=20)
    with pytest.raises(
        TrainingError, match=r"^a rollout has token 1[01]\d, which is in the padding .* 101 tokens in com"
    ):
        run.train()


@pytest.mark.parametrize(
    ("teacher", "options", "said"),
    [
        ("model", {"teacher": "base"}, "teacher_model is given, and teacher is 'base' in args; it must be 'model'"),
        ("model", {"teacher_model": "other"}, "teacher_model is given, and is 'other' in args too; it must be set in"),
        (None, {}, "teacher is 'model' and teacher_model is not set; it must name the model that teaches"),
        ("itself", {}, "teacher_model is the model that learns, or has weights of it; it must be another one"),
        ("wide", {}, "teacher_model has a vocabulary of 5000 tokens and the model one of 101, which is more than padd"),
        ("/no/such", {}, "teacher_model is '/no/such': no such folder"),
        (5, {}, "teacher_model is a number; it must be a model, or the name of one"),
    ],
    ids=str,
)
def test_what_cannot_teach_is_refused_in_a_sentence(teacher, options, said, tmp_path):
    student = tiny.tiny_model()
    given = {"model": large, "itself": lambda: student, "wide": lambda: large(vocab_size=5000)}
    with pytest.raises(UsageError) as refused:
        trainer(tmp_path, given[teacher]() if teacher in given else teacher, student=student, **options)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"teacher": "ema", "teacher_model": "x"},
            "teacher is 'ema' and teacher_model 'x'; with teacher_model it must",
        ),
        (
            {"teacher": "base", "teacher_model": "x"},
            "teacher is 'base' and teacher_model 'x'; with teacher_model it mu",
        ),
        ({"teacher_model": ""}, "teacher_model is ''; it may be a hub name, a folder or a GGUF file"),
        ({"teacher_model": "x", "teacher_dtype": "int8"}, "teacher_dtype is 'int8'; it may be float32, bfloat16 or"),
        ({"teacher_template": "prompt"}, "teacher_template is 'prompt', by which the teacher sees what the student s"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(UsageError) as refused:
        MethodSettings(**options)
    assert str(refused.value).startswith(said)


def test_what_has_no_effect_is_said():
    assert without_effect(OF_TRAINING, MethodSettings(teacher_dtype="float32")) == [
        "teacher_dtype is 'float32' and does nothing: teacher_model is not set"
    ]
    (said,) = without_effect(OF_TRAINING, MethodSettings(method="sft", teacher_model="x"))
    assert said == "teacher and teacher_model do nothing: method is 'sft'"
    assert without_effect(OF_TRAINING, SDFTConfig(method="sft")) == []


def test_rows_without_demonstrations_take_a_teacher_that_needs_none(tmp_path):
    with pytest.raises(UsageError, match="row 1 has no demonstration"):
        trainer(tmp_path, large(), teacher_template="turn")
    with pytest.raises(UsageError, match="row 1 has no demonstration"):
        trainer(tmp_path, large(), demonstration_weight=0.5)
    notes = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{prompt}"}]
    run = trainer(tmp_path, teacher="live", teacher_template=notes)  # context distillation: of no other model
    row, tokenizer = run.train_dataset[0], tiny.tiny_tokenizer()
    chat = [notes[0], {"role": "user", "content": PROMPTS[0]["prompt"]}]
    assert tokenizer.decode(row["teacher_prompt_ids"]) == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    run.train()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of two tiny models, and rows of prompts and answers alone."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in tiny.rows()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": tiny.saved(tmp_path / "student", tiny.tiny_model()),
        "teacher_model": tiny.saved(tmp_path / "teacher", large(vocab_size=101)),
        "train_file": "rows.jsonl",
        "eval_file": "rows.jsonl",
        "output_dir": "run",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_completion_length": 4,
        "eval_completion_length": 4,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_one_line_of_a_recipe_is_on_policy_distillation(recipe, capsys):
    assert main(["train", "recipe.yaml"]) == 0
    printed = capsys.readouterr().out
    assert f"distillation (reverse KL, from {recipe / 'teacher'})" in printed
    summary = json.loads((recipe / "run" / "summary.json").read_text())
    assert (summary["teacher"], summary["teacher_model"]) == ("model", str(recipe / "teacher"))
    assert main(["eval", "recipe.yaml", "--model", "run", "--teacher", "--summary_file", "scores.json"]) == 0
    scores = json.loads((recipe / "scores.json").read_text())
    assert scores["accuracy_by_template"] == {"prompt": summary["accuracy_teacher"]}
    assert f"by {recipe / 'teacher'} under teacher_template\n  prompt" in capsys.readouterr().out
    assert main(["data", "recipe.yaml", "--rows", "1"]) == 0
    assert capsys.readouterr().out.count("say a") == 2
    assert main(["train", str(recipe / "run" / RESOLVED_FILE), "--overwrite_output_dir"]) == 0


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train recipe.yaml --teacher ema", "--teacher is 'ema' and teacher_model '"),
        ("train recipe.yaml --teacher_model null --teacher model", "--teacher is 'model' and teacher_model is not set"),
        ("train recipe.yaml --teacher_model ./nowhere", "--teacher_model is './nowhere': no such folder"),
        ("eval recipe.yaml --teacher --teacher_model ./nowhere", "--teacher_model is './nowhere': no such folder"),
        ("eval recipe.yaml --teacher --teacher_template turn", "teacher is True, and rows.jsonl, row 1 has no demonst"),
        ("plan recipe.yaml --teacher_model ./nowhere", "--teacher_model is './nowhere', whose config.json is not on"),
    ],
    ids=str,
)
def test_commands_refuse_what_cannot_teach_before_anything_is_loaded(command, said, recipe, capsys):
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err


def test_the_teachers_weights_are_planned(recipe, capsys):
    peaks = {}
    for name, more in {"float32": [], "bfloat16": ["--teacher_dtype", "bfloat16"]}.items():
        assert main(["plan", "recipe.yaml", "--output_file", "plan.json", *more]) == 0
        peaks[name] = json.loads((recipe / "plan.json").read_text())["phases"]["scoring"]["parts"]["teacher"]
    numbers = sum(p.numel() for p in large(vocab_size=101).parameters())
    assert peaks["float32"] == pytest.approx(4 * numbers, rel=0.1)
    assert peaks["bfloat16"] == pytest.approx(2 * numbers, rel=0.1)
    assert main(["plan", "recipe.yaml", "--output_file", "plan.json", "--teacher_offload", "--compare"]) == 0
    assert json.loads((recipe / "plan.json").read_text())["host"]["parts"]["teacher"] > 0
