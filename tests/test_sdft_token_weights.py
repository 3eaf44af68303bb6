"""What each token counts: weights by what both models say of it, the clip, cut rollouts, and rollouts that collapse."""

import json
import logging

import pytest
import torch
import yaml
from transformers import TrainerControl, TrainerState

from sdft.batch import Sample, group, lay_out
from sdft.cli import main
from sdft.errors import TrainingError, UsageError
from sdft.loss import distillation_loss
from sdft.progress.collapse import LINES, CollapseWatch
from sdft.settings.config import SDFTConfig
from sdft.teacher import Teacher
from sdft.token_weights import _places
from tests import tiny
from tests.test_sdft_loss import SAMPLES, logprobs
from tests.test_sdft_trainer import trained, trainer

CLIP = 2.3  # above half of the divergences of these models


WEIGHTED = {"token_weighting": "early", "divergence_clip": CLIP}


def unlikely(tokens):
    """Weights of everything that is known of tokens."""
    return (tokens.teacher_logprob - tokens.student_logprob).exp() + tokens.student_entropy + tokens.divergence


def wrong_shape(tokens):
    return torch.ones(3, 2)


def negative(tokens):
    return -tokens.divergence - 1


def negative_integers(tokens):
    return tokens.position - tokens.length


def huge(tokens):
    return torch.full_like(tokens.divergence, 1e300, dtype=torch.float64)


def complex_numbers(tokens):
    return tokens.divergence.to(torch.complex64)


def failing(tokens):
    raise KeyError("position")


def of_full_logits(student, teacher, skip, weighting, clip, by_sequence):
    """The summed loss in float64 from whole logits, with constant weights."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in SAMPLES:
        p = logprobs(student, sample.prompt, sample.completion)[skip:]
        q = logprobs(teacher, sample.teacher_prompt, sample.completion)[skip:].detach()
        divergence, labels = (p.exp() * (p - q)).sum(-1), torch.tensor(sample.completion[skip:])[:, None]
        of_student, of_teacher = (-(x.exp() * x).sum(-1) for x in (p.detach(), q))
        place, length = torch.arange(skip, len(sample.completion)), len(sample.completion)
        weight = {
            "uniform": torch.ones(len(p), dtype=torch.float64),
            "teacher_confidence": (-of_teacher).exp(),
            "early": 1 - place / length,
            "unlikely": (q.gather(-1, labels)[:, 0] - p.detach().gather(-1, labels)[:, 0]).exp()
            + of_student
            + divergence.detach(),
        }[weighting.split(":")[-1]]
        if clip is not None:
            divergence = torch.where(divergence > clip, clip, divergence)
        total = total + (weight * divergence).sum() / (length - skip if by_sequence else 1)
    return total


@pytest.mark.parametrize("weighting", ["uniform", "teacher_confidence", "early", f"{__name__}:unlikely"])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize(("skip", "normalisation"), [(0, "token"), (1, "sequence")])
def test_loss_and_gradients_are_those_of_full_logits(weighting, clip, skip, normalisation, tmp_path):
    student, teacher = tiny.tiny_model(0), tiny.tiny_model(1)
    settings = SDFTConfig(
        output_dir=str(tmp_path), use_cpu=True, token_weighting=weighting, divergence_clip=clip, skip_tokens=skip
    )
    total, clipped = 0.0, 0.0
    for members in group(SAMPLES, 2):
        batch = lay_out(members, skip, normalisation) | {"samples": members}
        out = distillation_loss(student, Teacher(teacher), batch, settings, None)
        out.total.backward()
        total += out.total.item()
        clipped += float(out.sums.get("clipped", 0))
    got = torch.cat([parameter.grad.double().flatten() for parameter in student.parameters()])
    exact = tiny.tiny_model(0).double()
    expected = of_full_logits(exact, teacher.double(), skip, weighting, clip, normalisation == "sequence")
    expected.backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in exact.parameters()])
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert (clipped > 0) == (clip is not None)  # otherwise the clip was not tried


@pytest.mark.parametrize("clip", [None, CLIP])
def test_weights_with_importance_weights_and_sampled_tokens(clip, tmp_path):
    """Importance weights multiply what a token counts, and what one counts as that is above the clip."""
    student, teacher = tiny.tiny_model(0), tiny.tiny_model(1)
    old = [Sample(s.prompt, s.completion, s.teacher_prompt, old_logprobs=[-3.0] * len(s.completion)) for s in SAMPLES]
    batch = lay_out(old, 0) | {"samples": old}
    options = {"output_dir": str(tmp_path), "use_cpu": True, "importance_clip": 3.0, "divergence_clip": clip}
    out = distillation_loss(student, Teacher(teacher), batch, SDFTConfig(**options, token_weighting="early"), None)
    expected = 0.0
    for sample in SAMPLES:
        p = logprobs(student, sample.prompt, sample.completion).detach().double()
        q = logprobs(teacher, sample.teacher_prompt, sample.completion).detach().double()
        ratio = (p.gather(-1, torch.tensor(sample.completion)[:, None])[:, 0] + 3.0).exp().clamp(max=3.0)
        early, divergence = 1 - torch.arange(len(p)) / len(p), (p.exp() * (p - q)).sum(-1)
        expected += (early * ratio * divergence.clamp(max=clip or torch.inf)).sum().item()
    assert out.total.item() == pytest.approx(expected, rel=1e-5)


def test_accumulation_changes_nothing_and_the_log_has_the_mean_weight(tmp_path):
    options = {"token_weighting": "early", "divergence_clip": 0.5, "max_steps": 1, "max_grad_norm": 0, "optim": "sgd"}
    runs = [
        trained(
            tmp_path / str(batch), per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch, **options
        )
        for batch in (8, 2)
    ]
    one, other = (dict(run.model.named_parameters()) for run in runs)
    for name, parameter in one.items():
        torch.testing.assert_close(other[name], parameter, rtol=1e-5, atol=1e-6)
    (line,) = [entry for entry in runs[0].state.log_history if "loss" in entry]
    assert 0.4 < line["token_weight"] < 1 and 0 <= line["clipped"] <= 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrong_shape", r"returned a tensor of shape \(3, 2\); it must be a tensor of \d+ numbers"),
        ("negative", "returned a tensor with numbers that are below 0 or not finite"),
        ("negative_integers", "returned a tensor with numbers that are below 0 or not finite"),
        ("huge", "returned a tensor with numbers that are below 0 or not finite in float32"),
        ("complex_numbers", "returned a tensor of complex64"),
    ],
)
def test_functions_that_give_no_weights_are_refused(name, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        trained(tmp_path, token_weighting=f"{__name__}:{name}", max_steps=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing", "which cannot be imported"), ("CLIP", "it must be a function, and CLIP is a float")],
)
def test_a_name_that_is_no_function_is_refused_before_anything_is_loaded(name, words, tmp_path, capsys):
    given = {"token_weighting": f"{__name__}:{name}"}
    with pytest.raises(UsageError, match=words):
        trainer(tmp_path, **given)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(tmp_path), "train_file": str(tmp_path / "rows.jsonl"), **given}))
    (tmp_path / "rows.jsonl").write_text(json.dumps(tiny.rows(1)[0]))
    tiny.tiny_model().config.save_pretrained(tmp_path)
    assert main(["train", str(recipe)]) == 2
    assert words in capsys.readouterr().err


def test_a_function_that_fails_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"token_weighting tests.*:failing failed: KeyError: 'position'"):
        trained(tmp_path, token_weighting=f"{__name__}:failing", max_steps=1)


def test_a_function_is_given_whole_numbers_where_no_token_is_left():
    left_out = [Sample([5, 6], [7, 8], [5, 6], weight=0.0)]
    kinds = [each.dtype for each in _places(left_out, 0, torch.device("cpu"))]
    assert kinds == [torch.int64] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_weighting": "late"}, "token_weighting is 'late'; it may be uniform, teacher_confidence, early or"),
        ({"token_weighting": 3}, "token_weighting is 3"),
        ({"divergence_clip": 0}, "divergence_clip is 0; it must be a number above 0"),
        ({"stop_on_collapse": 1.0}, "stop_on_collapse is 1.0; it must be a number above 1"),
        ({"mask_truncated_completions": "maybe"}, "mask_truncated_completions is 'maybe'"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(options, words):
    with pytest.raises(UsageError, match=words):
        SDFTConfig(**options)


def test_rollouts_that_were_cut_are_left_out(tmp_path, caplog):
    model = tiny.tiny_model()
    with torch.no_grad():
        model.lm_head.weight[1] *= 3  # an end that is likely
    run = trainer(tmp_path, model=model, mask_truncated_completions=True, max_completion_length=4)
    rows = [run.train_dataset[n] for n in range(8)]
    samples = run.samples(rows)
    cut = [s for s in samples if s.weight == 0]
    assert 0 < len(cut) < len(samples)
    assert all(len(s.completion) == 4 for s in cut) and all(s.completion[-1] == 1 for s in samples if s.weight)
    with torch.no_grad():
        model.lm_head.weight[1] = 0
    with caplog.at_level(logging.WARNING):
        run = trained(
            tmp_path / "all", model=model, mask_truncated_completions=True, max_steps=1, log_completions=1, **WEIGHTED
        )
    assert "mask_truncated_completions has left out all that were cut" in caplog.text
    (line,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert line["loss"] == 0 and line["left_out"] == 1
    assert not {"student_entropy", "teacher_entropy", "token_weight", "clipped"} & line.keys()  # of no token
    records = [json.loads(text) for text in (tmp_path / "all" / "completions.jsonl").read_text().splitlines()]
    assert records and all(record["weight"] == 0 and set(record["divergence"]) == {None} for record in records)


def watched(values, factor, name="student_entropy", before=()):
    watch, control = CollapseWatch(factor), TrainerControl()
    state = TrainerState(log_history=[{"loss": 1.0, name: value} for value in before])
    watch.on_train_begin(None, state, control)
    for step, value in enumerate(values, start=1):
        state.global_step = step
        watch.on_log(None, state, control, {"loss": 1.0, name: value})
        watch.on_log(None, state, control, {"eval_accuracy": 0.0})
        if control.should_training_stop:
            return step
    return None


def test_rollouts_that_collapse_are_said_once_and_end_training_where_that_is_asked(caplog):
    falling = [2.0] * LINES + [0.1] * 30
    assert watched(falling, None) is None and len(caplog.records) == 1
    assert "student_entropy was 2 in the first 10 lines of the log" in caplog.text
    assert watched(falling, 3.0) == 2 * LINES and "stop_on_collapse is 3, and training ends" in caplog.text
    assert watched([2.0] * 40, 3.0) is None and watched([2.0] * LINES + [5.9] * 30, 3.0) is None
    assert watched([1.0] * LINES + [9.0] * 30, 3.0, "completion_length") == 2 * LINES
    assert watched([0.1] * LINES + [1.0] * 30, 3.0, "finished") is None  # more of which is better
    assert watched([0.1] * LINES, 3.0, before=[2.0] * LINES) == LINES  # a run that goes on


def test_a_run_that_collapses_ends(tmp_path):
    class Falling(CollapseWatch):
        pass

    run = trainer(tmp_path, stop_on_collapse=1.0001, max_steps=60, logging_steps=1, learning_rate=1e-2)
    run.train()
    assert 2 * LINES <= run.state.global_step < 60
