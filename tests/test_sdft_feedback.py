"""Feedback on rollouts: what the teacher sees is made after they are written, in training and by what is shipped."""

import json
import logging
import math
import os
import shlex
import sys

import pytest
import torch
import yaml

from sdft import SDFTConfig, SDFTTrainer
from sdft.batch import Sample, count_items, lay_out
from sdft.cli import main
from sdft.errors import TrainingError, UsageError
from sdft.feedback import Feedback, Rollout, by_prompt
from sdft.feedback.find import find_feedback
from sdft.feedback.judge import judge
from sdft.feedback.sdpo import sdpo
from sdft.feedback.successes import successes
from sdft.settings.config import MethodSettings
from sdft.settings.idle import OF_TRAINING, without_effect
from sdft.templates import TEMPLATES
from tests import tiny
from tests.test_sdft_teacher_model import Gradients, distance, weights

ROWS = [{"prompt": row["prompt"], "answer": row["answer"], "note": str(n)} for n, row in enumerate(tiny.rows())]


def trainer(folder, given=None, *, rows=None, callbacks=None, model=None, **options):
    settings = {
        "per_device_train_batch_size": 2,
        "rollouts_per_prompt": 2,
        "max_steps": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SDFTTrainer(
        model or tiny.tiny_model(),
        SDFTConfig(output_dir=str(folder), **{**settings, **options}),
        train_dataset=ROWS if rows is None else rows,
        processing_class=tiny.tiny_tokenizer(),
        callbacks=callbacks,
        feedback=given,
    )


def ids_of(chat):
    return tiny.tiny_tokenizer().apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def lines_of(run):
    return [line for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_gradients_are_those_of_full_logits_with_these_prompts_and_weights(normalisation, share, tmp_path):
    """Over several pieces: the weighted mean of what counts, and the demonstrations of all."""
    seed, seen = int.from_bytes(os.urandom(3)), []

    def feedback(rollouts):
        seen.extend(rollouts)
        chats = [[{"role": "user", "content": f"{each.completion} is {n}"}] for n, each in enumerate(rollouts)]
        return [Feedback(chat if n % 3 else None, weight=1 + n / 2) for n, chat in enumerate(chats)]

    gradients = Gradients()
    run = trainer(
        tmp_path,
        feedback,
        rows=tiny.rows(),
        callbacks=[gradients],
        model=tiny.tiny_model(seed),
        max_steps=1,
        max_grad_norm=0,
        gradient_accumulation_steps=2,
        max_forward_tokens=80,
        loss_normalisation=normalisation,
        demonstration_weight=share,
    )
    kept, sample = [], run.samples
    run.samples = lambda rows: kept.extend(sample(rows)) or kept
    run.train()
    assert [each.group for each in seen] == [0, 0, 1, 1, 2, 2, 3, 3] and {each.step for each in seen} == {1}
    student, teacher = tiny.tiny_model(seed).double(), tiny.tiny_model(seed).double()
    total, count, shown, labels = 0.0, 0.0, 0.0, 0.0

    def logps(model, prompt, completion):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)

    for n, (rollout, each) in enumerate(zip(seen, kept, strict=True)):
        tokens = len(each.demonstration or ())
        if share:
            picked = logps(student, each.prompt, each.demonstration)[range(tokens), each.demonstration]
            shown = shown - picked.sum() / (tokens if normalisation == "sequence" else 1)
            labels += 1 if normalisation == "sequence" else tokens
        assert rollout.completion == tiny.tiny_tokenizer().decode(each.completion, skip_special_tokens=True)
        if n % 3 == 0:
            assert each.weight == 0
            continue
        prompt = ids_of([{"role": "user", "content": f"{rollout.completion} is {n}"}])
        p, q = logps(student, each.prompt, each.completion), logps(teacher, prompt, each.completion).detach()
        weight = (1 + n / 2) / (len(each.completion) if normalisation == "sequence" else 1)
        total, count = total + weight * (p.exp() * (p - q)).sum(), count + weight * len(each.completion)
    loss = (1 - share) * total / count + (share * shown / labels if share else 0)
    loss.backward()
    assert lines_of(run)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    got = torch.cat([gradients.kept[name].flatten() for name, _ in student.named_parameters()])
    assert distance(got, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])) < 1e-5, seed


def test_a_sample_that_is_left_out_takes_no_place():
    full = [Sample([1, 2, 3], [4, 5], [6, 7], old_logprobs=[-1.0, -2.0], weight=2.0)]
    left = Sample([8] * 50, [9] * 50, [9] * 60, old_logprobs=[0.0] * 50, weight=0.0)
    batch = lay_out([*full, left], 0)
    assert len(left) == 1 and batch["input_ids"].shape == (2, 5) and batch["labels"].tolist() == [4, 5]
    assert batch["token_weight"].tolist() == [2, 2] and batch["old_logprobs"].tolist() == [-1, -2]
    assert count_items(batch) == 4
    assert "token_weight" not in lay_out([left], 0) and count_items(lay_out([left], 0)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_iterations": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1},
        {"teacher": "ema", "demonstration_weight": 0.5},
        {"teacher_cache_gib": 0.1, "rollout_correction": "truncate", "loss_normalisation": "sequence"},
    ],
    ids=str,
)
def test_steps_of_which_all_is_left_out_are_logged_and_change_nothing(options, tmp_path, caplog):
    rows = tiny.rows() if options.get("demonstration_weight") else ROWS
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, lambda rollouts: [Feedback(None, log="no")] * len(rollouts), rows=rows, **options)
        before = weights(run.model)
        run.train()
    for line in lines_of(run):
        assert line.get("left_out", 1) == 1 and math.isfinite(line["grad_norm"])
    assert "step 1 has nothing to learn from: feedback has left out all of its rollouts" in caplog.text
    moved = any(not torch.equal(value, before[name]) for name, value in weights(run.model).items())
    assert moved == bool(options.get("demonstration_weight"))


def test_its_seconds_and_its_words_are_in_the_logs(tmp_path):
    import time

    def slow(rollouts):
        time.sleep(0.2)
        return [Feedback("hi" if n else None, 0.5, f"number {n}") for n, _ in enumerate(rollouts)]

    run = trainer(tmp_path, slow, log_completions=1, max_steps=1)
    run.train()
    (line,) = lines_of(run)
    assert 0.2 <= line["feedback_seconds"] < 5 and line["left_out"] == 0.25
    records = [json.loads(text) for text in (tmp_path / "completions.jsonl").read_text().splitlines()]
    found = {record["feedback"]: record for record in records}
    assert sorted(found) == [f"number {n}" for n in range(4)]
    for name, record in found.items():
        left_out = name == "number 0"
        assert record["weight"] == (0 if left_out else 0.5) and record["completion"]
        assert all((value is None) == left_out for value in record["divergence"])
        assert len(record["divergence"]) == len(record["completion_ids"])
        assert left_out or "hi" in record["teacher_prompt"]


def failing(rollouts):
    raise KeyError("score")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda n: [], r"returned 0 for 4 rollouts; it must be one for each"),
        (lambda n: None, r"returned a NoneType for 4 rollouts; it must be one for each"),
        (lambda n: ["text"] * n, r"rollout 1 \(train_dataset, row \d\): it is a str; it must be a Feedback"),
        (
            lambda n: [Feedback("a")] * (n - 1) + [Feedback("a", math.nan)],
            r"rollout 4 \(.*\): weight is nan; it must be",
        ),
        (lambda n: [Feedback("a", -1)] * n, r"rollout 1 \(.*\): weight is -1; it must be a number of at least 0"),
        (lambda n: [Feedback("a", 1e300)] * n, r"rollout 1 \(.*\): weight is 1e\+300; it must be .* finite in float32"),
        (lambda n: [Feedback("a", log=None)] * n, r"rollout 1 \(.*\): log is null; it must be text"),
        (lambda n: [Feedback([{"role": "user"}])] * n, r"rollout 1 \(.*\): messages is .* it must be None, a text, or"),
        (lambda n: [Feedback(" ")] * n, r"rollout 1 \(.*\): messages is ' '; it must be None, a text, or a list"),
        (lambda n: [Feedback("a" * 200)] * n, r"rollout 1 \(.*\): the teacher prompt has .* longer than the model's"),
    ],
)
def test_what_a_function_returns_is_checked(returned, said, tmp_path):
    with pytest.raises(UsageError, match=said) as refused:
        trainer(tmp_path, lambda rollouts: returned(len(rollouts))).train()
    assert str(refused.value).startswith("feedback tests.test_sdft_feedback:test_what") and "\n" not in str(
        refused.value
    )


def test_a_function_that_fails_is_named_and_a_prompt_that_is_too_long_may_be_left_out(tmp_path):
    with pytest.raises(TrainingError, match=r"^feedback tests.test_sdft_feedback:failing failed at step 1: KeyError: "):
        trainer(tmp_path, failing).train()
    run = trainer(tmp_path, lambda rollouts: [Feedback("a" * 200)] * len(rollouts), overlong="skip")
    run.train()
    assert all(line["left_out"] == 1 for line in lines_of(run))


def rollouts_of(*completions, group=0, **row):
    row = {"prompt": "say a", "answer": "a", **row}
    return [Rollout(row, text, True, group, 1, TEMPLATES["turn"]) for text in completions]


def test_sdpo_shows_a_sibling_that_succeeded():
    """The prompt of the authors' code: the question, a right attempt by a sibling, the request."""
    given = [*rollouts_of("a", "b", " a "), *rollouts_of("c", "d", group=1, prompt="say e", answer="e")]
    assert [len(siblings) for siblings in by_prompt(given)] == [3, 3, 3, 2, 2]
    first, second, third, *others = sdpo(given)
    request = "\n\nCorrectly solve the original question."
    assert first.messages == [{"role": "user", "content": f"say a\n\nCorrect solution:\n\n a {request}"}]
    assert second.messages == third.messages
    assert second.messages == [{"role": "user", "content": f"say a\n\nCorrect solution:\n\na{request}"}]
    assert [each.messages for each in others] == [None, None]
    assert [first.log, second.log, others[0].log] == [
        "right, a sibling is right",
        "wrong, a sibling is right",
        "wrong, no sibling is right",
    ]
    told = sdpo(given, verdict=True)[3].messages
    attempt = "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\nc\n\nThis is wrong."
    assert told == [{"role": "user", "content": f"say e{attempt}{request}"}]
    alone = sdpo(rollouts_of("a"), verdict=True)
    assert alone[0].messages is None  # it is right, and nothing else is


def test_successes_are_shown_by_the_runs_template():
    first, second, third = successes(rollouts_of("x a", "b", "a"), scorer="contains")
    assert [m["content"] for m in second.messages] == ["say a", "a", "say a"]
    assert first.messages == second.messages and [m["content"] for m in third.messages] == ["say a", "x a", "say a"]
    assert successes(rollouts_of("a"))[0].messages is None
    assert successes(rollouts_of("a"), itself=True)[0].messages is not None
    with pytest.raises(UsageError, match=r"^row 1 of the step has no answer, which rollouts are compared with$"):
        successes(rollouts_of("a", answer=None))
    with pytest.raises(UsageError, match=r"^scorer of feedback_args is 'best'; it may be exact"):
        sdpo(rollouts_of("a"), scorer="best")


JUDGE = """
import json, sys
found = json.load(sys.stdin)
keys = {"row", "completion", "finished", "group", "step"}
assert all(each.keys() == keys and each["row"]["note"] for each in found)
print(json.dumps([{"messages": each["completion"] + "!", "weight": 2, "log": "ok"} if n else None
    for n, each in enumerate(found)]))
"""


def python(code):
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def test_a_judge_reads_and_writes_json():
    first, second = judge(rollouts_of("a", "b", note="n"), command=python(JUDGE))
    assert (first, second) == (Feedback(None), Feedback("b!", 2, "ok"))


@pytest.mark.parametrize(
    ("command", "timeout", "said"),
    [
        ("cat >/dev/null; echo oh no >&2; exit 3", 60, "ended with exit code 3: oh no"),
        ("exit 4", 60, "ended with exit code 4: without a word"),
        ("sleep 60", 0.2, "has not ended after 0.2 seconds"),
        (r"printf '\377\377'", 60, "wrote what is no JSON: 'utf-8' codec can't decode byte 0xff"),
        (r"printf '\377' >&2; exit 3", 60, "ended with exit code 3: \N{REPLACEMENT CHARACTER}"),
        ("echo no json", 60, "wrote what is no JSON: Expecting value"),
        ("echo '[null]'", 60, "must write a list of 2 judgements, one for each rollout"),
        ("echo '[null, {}]'", 60, "must write of row 1 of the step an object of messages, weight and log, or null"),
    ],
)
def test_a_judge_that_fails_is_one_sentence(command, timeout, said):
    with pytest.raises(TrainingError) as failed:
        judge(rollouts_of("a", "b"), command=command, timeout=timeout)
    assert str(failed.value).startswith(f"feedback's command {command!r} {said}") and "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"feedback": "spdo"}, "feedback is 'spdo'; it may be sdpo, successes, judge or module:function"),
        ({"feedback": "sdpo", "feedback_args": [1]}, "feedback_args is [1]; it must be a mapping of names to values"),
        ({"feedback": "sdpo", "rollout_from": "teacher"}, "feedback is 'sdpo' and rollout_from 'teacher'; it must be"),
        ({"feedback": "nowhere.at:all"}, "feedback is 'nowhere.at:all', which cannot be imported: No module named"),
        ({"feedback": "math:pi"}, "feedback is 'math:pi'; it must be a function, and pi is a float"),
        ({"feedback": "sdpo"}, "feedback is 'sdpo' and rollouts_per_prompt 1; it must be at least 2, or feedback_args"),
        ({"feedback": "successes", "feedback_args": {"itself": False}}, "feedback is 'successes' and rollouts_per_pro"),
        ({"feedback": "sdpo", "feedback_args": {"a": 1}}, "feedback is 'sdpo' and feedback_args {'a': 1}, with which"),
        (
            {"feedback": "sdpo", "feedback_args": {"scorer": "exactly"}},
            "scorer of feedback_args is 'exactly'; it may be exact, contains,",
        ),
        (
            {"feedback": "sdpo", "feedback_args": {"verdict": "false"}},
            "verdict of feedback_args is 'false'; it must be True or False",
        ),
        (
            {"feedback": "successes", "feedback_args": {"itself": 1}},
            "itself of feedback_args is 1; it must be True or False",
        ),
        (
            {"feedback": "judge", "feedback_args": {"command": ["a"]}},
            "command of feedback_args is ['a']; it must be a shell command",
        ),
        (
            {"feedback": "judge", "feedback_args": {"command": "exit 1", "timeout": "60"}},
            "timeout of feedback_args is '60'; it must be a number above 0 and at most 1000000.0",
        ),
        (
            {"feedback": "judge"},
            "feedback is 'judge' and feedback_args {}, with which it cannot be called: missing a re",
        ),
    ],
    ids=str,
)
def test_a_name_that_is_no_function_is_refused(settings, said):
    with pytest.raises(UsageError) as refused:
        find_feedback(MethodSettings(**settings))
    assert str(refused.value).startswith(said)


def test_what_has_no_effect_is_said(tmp_path):
    assert without_effect(OF_TRAINING, MethodSettings(method="sft", feedback="sdpo")) == [
        "feedback is 'sdpo' and does nothing: method is 'sft'"
    ]
    (said,) = without_effect(OF_TRAINING, MethodSettings(feedback_args={"scorer": "json"}))
    assert said == "feedback_args is {'scorer': 'json'} and does nothing: feedback is not set"
    with pytest.raises(
        UsageError, match=r"^feedback is given, and is 'sdpo' in args too; it must be set in one of the"
    ):
        trainer(tmp_path, failing, feedback="sdpo")
    with pytest.raises(UsageError, match=r"^train_dataset, row 1 has no answer"):
        trainer(tmp_path, rows=[{"prompt": "say a", "note": "x"}], feedback="sdpo")


@pytest.mark.parametrize(
    "given",
    [
        {"feedback": "sdpo", "feedback_args": {"scorer": "contains", "verdict": True}},
        {"feedback": "successes", "feedback_args": {"scorer": "contains", "itself": True}},
        {"feedback": "judge", "feedback_args": {"command": python(JUDGE), "timeout": 60}},
        {"feedback": "mine:feedback"},
    ],
    ids=lambda given: given["feedback"],
)
def test_a_recipe_names_a_function(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "from sdft.feedback import Feedback\ndef feedback(rollouts): return [Feedback('x')] * len(rollouts)\n"
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = {
        "model": tiny.saved(tmp_path / "model", tiny.tiny_model()),
        "train_file": "rows.jsonl",
        "output_dir": "run",
        "per_device_train_batch_size": 2,
        "rollouts_per_prompt": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "log_completions": 1,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **given}))
    for more in ([], ["--model", recipe["model"]]):
        assert main(["data", "recipe.yaml", "--rows", "1", *more]) == 0
        told = capsys.readouterr().out
        assert f"(made by feedback {given['feedback']}, once the student has answered)" in told
        assert "\nteacher prompt " not in told
    assert main(["train", "recipe.yaml"]) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert len(records) == 16 and any(record["weight"] for record in records)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["feedback_seconds"] > 0
    assert "feedback" in (tmp_path / "run" / "report.html").read_text()
