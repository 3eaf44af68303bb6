"""How much of what the teacher would begin with is out of the student's reach: the number, and the warning."""

import dataclasses
import json
import logging

import pytest
import torch
from peft import LoraConfig

from sdft import loss as losses
from sdft.batch import lay_out
from sdft.evaluation.report import MetricsFile
from sdft.head import Head
from sdft.loss import distillation_loss
from sdft.reach import hardly_reaches, out_of_reach
from sdft.teacher import Teacher
from tests import tiny
from tests.test_sdft_loss import SAMPLES, config, logprobs
from tests.test_sdft_teacher_model import large, trainer
from tests.test_sdft_trainer import assert_equal_weights, weights

SAID = "(divergence: forward_kl does)"


@pytest.mark.parametrize(
    ("divergence", "beta", "expected"),
    [
        ("reverse_kl", 0.5, True),
        ("forward_kl", 0.5, False),
        ("jsd", 0.9, True),
        ("jsd", 0.5, True),
        ("jsd", 0.01, True),
        ("jsd", 0.001, False),
        ("skew_reverse_kl", 0.5, True),
        ("skew_reverse_kl", 0.01, True),
        ("skew_forward_kl", 0.5, True),
        ("skew_forward_kl", 0.01, True),
        ("skew_forward_kl", 0.001, False),
    ],
)
def test_divergences_that_hardly_reach_have_a_gradient_of_at_most_a_fifteenth(divergence, beta, expected, tmp_path):
    """Of forward KL's, at a token to which the teacher gives 0.9 and the student a ten-thousandth of that."""
    q = torch.tensor([0.9, 0.06, 0.04], dtype=torch.float64)
    z = torch.tensor([0.00009, 0.5, 0.49991], dtype=torch.float64).log().requires_grad_()
    p = z.softmax(-1)
    m = (1 - beta) * p + beta * q
    forward, of_student, of_teacher = (
        (q * (q / p).log()).sum(),
        (p * (p / m).log()).sum(),
        (q * (q / m).log()).sum(),
    )
    value = {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": forward,
        "jsd": ((1 - beta) * of_student + beta * of_teacher) / beta,  # which is forward KL for the smallest beta
        "skew_reverse_kl": of_student,
        "skew_forward_kl": of_teacher,
    }[divergence]
    of_forward, of_this = (torch.autograd.grad(x, z, retain_graph=True)[0][0].abs() for x in (forward, value))
    assert of_forward == pytest.approx(0.89991)
    assert (of_this < of_forward / 15) == expected
    assert hardly_reaches(config(tmp_path, divergence=divergence, beta=beta)) == expected


def test_cross_entropy_on_the_demonstration_reaches(tmp_path):
    assert not hardly_reaches(config(tmp_path, demonstration_weight=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_is_that_of_full_logits_whatever_the_chunk(dtype):
    """Of heads that have 50 tokens in common."""
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 8, dtype=dtype), torch.randn(7, 6, dtype=dtype)
    heads = [
        Head(3 * torch.randn(50, 8, dtype=dtype), torch.randn(50, dtype=dtype), scale=0.5),
        Head(3 * torch.randn(53, 6, dtype=dtype), softcap=9.0),
    ]
    logits = [
        0.5 * (student.double() @ heads[0].weight.double().T + heads[0].bias.double()),
        9 * torch.tanh(teacher.double() @ heads[1].weight[:50].double().T / 9),
    ]
    p, q = ((z / 1.3).softmax(-1) for z in logits)
    expected = (q * (q > 10_000 * p)).sum(-1).float()
    assert 0.05 < expected.mean() < 0.95
    for most in (None, 32 * 50 * 3, 1):
        found = out_of_reach(student, heads[0], teacher, heads[1], temperature=1.3, max_chunk_bytes=most)
        torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    assert out_of_reach(student[:0], heads[0], teacher[:0], heads[1]).shape == (0,)


def test_a_teacher_that_is_the_student_and_uncertain_ones_have_none():
    hidden, weight = torch.randn(3, 8), 9 * torch.randn(50, 8)
    assert not out_of_reach(hidden, Head(weight), hidden, Head(weight)).any()
    assert not out_of_reach(hidden, Head(weight / 99), hidden, Head(weight / 50)).any()


@pytest.mark.parametrize("skip", [0, 2])
def test_a_micro_batch_has_the_sum_over_first_tokens(skip, tmp_path):
    student, teacher = tiny.tiny_model(0, initializer_range=0.8), tiny.tiny_model(1, initializer_range=0.8)
    settings = config(tmp_path, skip_tokens=skip, loss_temperature=0.7)
    samples = [*SAMPLES, dataclasses.replace(SAMPLES[0], weight=0.0)]
    expected = []
    for s in SAMPLES:
        if len(s.completion) > skip:
            p = logprobs(student, s.prompt, s.completion, 0.7)[skip].exp()
            q = logprobs(teacher, s.teacher_prompt, s.completion, 0.7)[skip].exp()
            expected.append((q * (q > 10_000 * p)).sum())
    sums = distillation_loss(student, Teacher(teacher), lay_out(samples, skip), settings, None).sums
    assert sums["begun"] == len(expected) == (2 if skip else 3)
    assert sum(expected) > 0.1
    torch.testing.assert_close(sums["out_of_reach"], sum(expected).detach(), atol=1e-5, rtol=0)
    mixed = distillation_loss(student, Teacher(teacher), lay_out(samples, skip), settings, torch.bfloat16).sums
    torch.testing.assert_close(mixed["out_of_reach"], sums["out_of_reach"], atol=0.3, rtol=0)
    for other in ({"divergence": "forward_kl"}, {"demonstration_weight": 0.5}):
        settings = config(tmp_path, skip_tokens=skip, **other)
        sums = distillation_loss(student, Teacher(teacher), lay_out(samples, skip), settings, None).sums
        assert not {"begun", "out_of_reach"} & sums.keys()


def run(folder, taught_by, **options):
    """A run with the student's samples in the first step, and what metrics.jsonl has of each step."""
    student = tiny.tiny_model(initializer_range=0.8)
    run = trainer(folder, taught_by, student=student, callbacks=[MetricsFile(folder)], **options)
    seen, make = [], run.samples

    def samples(rows):
        made = make(rows)
        seen.append(made)
        return made

    run.samples = samples
    run.train()
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return run, seen[0], [line for line in lines if "loss" in line]


def test_it_is_said_once_where_the_teacher_begins_out_of_reach(tmp_path, caplog):
    """After two steps of four completions, by the mean over these."""
    teacher = large(initializer_range=0.8)
    with caplog.at_level(logging.WARNING):
        _, samples, (first, second, *_) = run(tmp_path, teacher, max_steps=4, per_device_train_batch_size=4)
    student, shares = tiny.tiny_model(initializer_range=0.8), []
    for s in samples:
        p, q = (model(torch.tensor([s.prompt])).logits[0, -1, :101].softmax(-1) for model in (student, teacher))
        shares.append((q * (q > 10_000 * p)).sum().item())
    assert len(shares) == 4
    assert first["out_of_reach"] == pytest.approx(sum(shares) / 4, abs=1e-5)
    share = (first["out_of_reach"] + second["out_of_reach"]) / 2
    assert share > 0.25
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(said) == 1 and "the first 8 completions begin" in said[0]
    assert f": {100 * share:.0f} % of its probability" in said[0]


def test_it_is_not_said_where_the_teacher_begins_as_the_student_does(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, lines = run(tmp_path, tiny.tiny_model(initializer_range=0.8), per_device_train_batch_size=8)
    assert lines[0]["out_of_reach"] == 0
    assert SAID not in caplog.text


@pytest.mark.parametrize("options", [{"divergence": "forward_kl"}, {"method": "sft", "teacher": None}], ids=str)
def test_it_is_not_measured_where_that_has_no_bearing(options, tmp_path, caplog):
    rows, taught_by = tiny.rows(), large(initializer_range=0.8)
    if "method" in options:
        taught_by = None
    with caplog.at_level(logging.WARNING):
        _, _, lines = run(tmp_path, taught_by, rows=rows, per_device_train_batch_size=8, **options)
    assert lines and not any("out_of_reach" in line for line in lines)
    assert SAID not in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher": "base", "teacher_template": "turn", "rollouts_per_prompt": 2, "teacher_cache_gib": 0.1},
        {"teacher": "live", "teacher_template": "turn", "lora": True},
        {"bf16": True, "token_weighting": "early", "max_forward_tokens": 60},
    ],
    ids=str,
)
def test_training_is_the_same_bit_for_bit_as_without(options, tmp_path, monkeypatch):
    ends = []
    options = {"log_completions": 1, "rows": tiny.rows(), "teacher_template": "prompt", **options}
    adapter = LoraConfig(r=2, target_modules=["q_proj"]) if options.pop("lora", False) else None
    for measured in (True, False):
        monkeypatch.setattr(losses, "hardly_reaches", lambda config, measured=measured: measured)
        folder, taught_by = tmp_path / str(measured), None if "teacher" in options else large(initializer_range=0.8)
        trained, _, lines = run(folder, taught_by, arguments={"peft_config": adapter}, **options)
        assert all(("out_of_reach" in line) == measured for line in lines)
        kept = [(line["loss"], line["grad_norm"], line["student_entropy"]) for line in lines]
        texts = (folder / "completions.jsonl").read_text()
        ends.append((weights(trained.model), kept, texts, torch.random.get_rng_state()))
    assert_equal_weights(ends[0][0], ends[1][0])
    assert ends[0][1:3] == ends[1][1:3]
    assert ends[0][3].equal(ends[1][3])
