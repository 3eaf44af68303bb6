"""What a run survives: being killed at any moment or told to stop, a disk that is full, steps with nothing to learn."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.trainer_callback import PrinterCallback

from sdft import early_checks
from sdft.checkpoints import files as checkpoint
from sdft.checkpoints.claim import claimed
from sdft.checkpoints.resume import Resuming, checkpoint_to_resume, last_checkpoint
from sdft.checkpoints.signals import FinishOnSignal
from sdft.errors import TrainingError, UsageError
from sdft.evaluation.report import MetricsFile
from sdft.rollouts.row_sampler import RowSampler
from tests import tiny
from tests.test_sdft_trainer import assert_equal_weights, trained, trainer, weights
from tests.waiting import patience

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_from_a_whole_checkpoint_to_the_same_weights(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed_worker.py"), str(tmp_path), "20", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    times = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(times) == 20
    for time in times:
        assert time["torn"] == []
        assert time["as_uninterrupted"], time
        assert not time["left_over"]
    assert len({time["last"] for time in times}) >= 3  # the moments were different ones
    assert any(time["amid_saving"] for time in times)


@contextlib.contextmanager
def files_no_larger_than(size):
    """The nearest to a full disk that a process can make for itself: a write past `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# In turn the optimizer's file (torch.save, 190 KB), the model's (safetensors, 90 KB), a random state's (14 KB).
@pytest.mark.parametrize("size", [150_000, 50_000, 8_000])
def test_a_disk_that_fills_up_is_one_sentence_and_the_last_checkpoint_stays(size, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "teacher": "ema"}
    run = trainer(tmp_path / "full", **options)
    save = run._save_checkpoint

    def on_a_full_disk(*args, **kwargs):
        with files_no_larger_than(size if run.state.global_step == 4 else resource.RLIM_INFINITY):
            save(*args, **kwargs)

    run._save_checkpoint = on_a_full_disk
    with pytest.raises(
        TrainingError, match=r"^checkpoint-4 could not be written to .*; checkpoint-2 is whole$"
    ) as error:
        run.train()
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path / "full")) == ["checkpoint-2", "run.json"]
    again = trainer(tmp_path / "full", **options)
    again.train(resume_from_checkpoint=True)
    assert_equal_weights(weights(again.model), weights(trained(tmp_path / "straight", **options).model))


def test_a_model_that_cannot_be_saved_leaves_the_one_that_is_there(tmp_path):
    trained(tmp_path, max_steps=1).save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    run = trained(tmp_path, max_steps=2, overwrite_output_dir=True)
    with files_no_larger_than(50_000), pytest.raises(TrainingError, match="the model could not be written"):
        run.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert ".saving" not in os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_report_that_cannot_be_written_is_one_sentence(name, tmp_path):
    run = trainer(tmp_path, log_completions=int(name == "completions.jsonl"))
    run.remove_callback(PrinterCallback)  # whose lines would be too large for a file as well
    if name == "metrics.jsonl":
        run.add_callback(MetricsFile(tmp_path))
    with (
        files_no_larger_than(1000),
        pytest.raises(TrainingError, match=rf"^{name} could not be written to .*; there was no checkpoint before it$"),
    ):
        run.train()


def test_what_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output_dir is .* cannot be made"):
        trainer(tmp_path / "file" / "out")
    early_checks.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="cannot be written"):
        early_checks.check_writable(tmp_path / "a" / "b")


def test_checkpoints_that_go_lose_their_name_before_their_files(tmp_path):
    for number in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{number}").mkdir()
        os.utime(tmp_path / f"checkpoint-{number}", (number, number))
    with checkpoint.staging(str(tmp_path)) as staged:
        checkpoint.rotate(str(tmp_path), 2, str(tmp_path / "checkpoint-1"), staged)
        assert sorted(os.listdir(staged)) == ["checkpoint-2.old"]
        checkpoint.rotate(str(tmp_path), None, None, staged)
        assert sorted(os.listdir(staged)) == ["checkpoint-2.old"]
        checkpoint.rotate(str(tmp_path), 1, None, staged)
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_a_run_killed_while_it_replaces_a_checkpoint_has_left_one_of_the_two(tmp_path, monkeypatch):
    def publish(text):
        staged = tmp_path / ".saving" / "checkpoint-2"
        staged.mkdir(parents=True, exist_ok=True)
        for name in ("trainer_state.json", "optimizer.pt", "model.safetensors"):
            (staged / name).write_text(text)
        checkpoint.publish_folder(str(staged), str(tmp_path / "checkpoint-2"))

    def resumed():
        with claimed(tmp_path, overwrite=True):
            assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint-2"]
        (text,) = {path.read_text() for path in (tmp_path / "checkpoint-2").iterdir()}
        return text

    publish("first")
    rename = os.rename
    for survives, killed_at in (("first", 1), ("first", 2), ("third", 3)):
        calls = []

        def killed(source, target, killed_at=killed_at, calls=calls):
            calls.append(source)
            if len(calls) == killed_at:
                raise KeyboardInterrupt
            rename(source, target)

        monkeypatch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish("third")
        monkeypatch.setattr(os, "rename", rename)
        assert resumed() == survives
    publish("fourth")
    assert resumed() == "fourth"


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
WHOLE = ("config.json", "model.safetensors")
SHARDED = ("config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json")


def loads_as(folder):
    """What the files that load_model would read have in them."""
    kinds = (ADAPTER, WHOLE, SHARDED)  # in the order in which they are looked for
    kind = next(kind for kind in kinds if all((folder / name).exists() for name in (kind[0], kind[-1])))
    return kind, {(folder / name).read_text() for name in kind[1:]}


@pytest.mark.parametrize(("old", "new"), [(ADAPTER, WHOLE), (WHOLE, ADAPTER), (WHOLE, SHARDED), (SHARDED, WHOLE)])
def test_a_model_takes_the_place_of_one_of_another_kind_and_a_kill_leaves_either(old, new, tmp_path, monkeypatch):
    def publish(kind, text, folder):
        with checkpoint.staging(str(folder)) as staged:
            for name in kind:
                (Path(staged) / name).write_text(text)
            checkpoint.publish_files(staged, str(folder))

    steps = {"replace": os.replace, "remove": os.remove}
    for killed_at in range(1, 10):
        folder = tmp_path / str(killed_at)
        publish(old, "old", folder)
        (folder / "README.md").write_text("mine")
        done = []

        def until_killed(action, *paths, killed_at=killed_at, done=done):
            if len(done) == killed_at:
                raise KeyboardInterrupt
            done.append(action)
            steps[action](*paths)

        for action in steps:
            monkeypatch.setattr(os, action, functools.partial(until_killed, action))
        with contextlib.suppress(KeyboardInterrupt):
            publish(new, "new", folder)
        monkeypatch.undo()
        assert loads_as(folder) in ((old, {"old"}), (new, {"new"})), done
        if len(done) < killed_at:
            break
    left = old if new == ADAPTER else ()  # which may be what it is an adapter of
    assert sorted(os.listdir(folder)) == sorted({"README.md", *new, *left})


def test_others_may_read_what_a_run_leaves_where_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        trained(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1, teacher="ema").save_model()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} > {"model.safetensors", "optimizer.pt", "run.json"}
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(files, "0o640")


def test_a_file_written_through_a_link_leaves_the_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    checkpoint.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_what_a_rename_makes_visible_has_reached_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(source, target):
        events.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    with checkpoint.staging(str(tmp_path)) as staged:
        inside = Path(staged) / "new" / "part"
        inside.mkdir(parents=True)
        (inside / "a").write_text("a")
        (Path(staged) / "new" / "b").write_text("b")
        checkpoint.publish_folder(os.path.join(staged, "new"), str(tmp_path / "final"))
    at = events.index("renamed")
    assert sorted(events[:at]) == ["a", "b", "new", "part"]
    assert events[at + 1 :] == [tmp_path.name]


def told_to_stop(folder, step, amid, times=1, number=signal.SIGTERM, **options):
    """A trainer that gets a signal in a step: amid its rollouts, after so many tokens, or amid what it learns."""
    run = trainer(folder, **options)
    draw, loss, tokens = RowSampler.draw, run.compute_loss, []

    def signalled():
        for _ in range(times):
            signal.raise_signal(number)

    def drawn(sampler, scores, rows):
        if run.state.global_step + 1 == step and amid == "rollouts":
            tokens.append(len(rows))
            in_turn = run.args.rollout_backend == "generate"
            assert len(tokens) <= 3 or not in_turn, "a token was written after the one that the signal came at"
            if len(tokens) == 3:
                signalled()
        return draw(sampler, scores, rows)

    def computed(*args, **kwargs):
        if run.state.global_step + 1 == step and amid == "learning":
            run.compute_loss = loss
            signalled()
        return loss(*args, **kwargs)

    run.compute_loss = computed
    return run, pytest.MonkeyPatch.context(), drawn


@contextlib.contextmanager
def stopped(folder, step, amid, **options):
    run, patching, drawn = told_to_stop(folder, step, amid, **options)
    with patching as patch, FinishOnSignal() as finish:
        patch.setattr(RowSampler, "draw", drawn)
        run.add_callback(finish)
        yield run, finish


INTERRUPTED = [
    {"gradient_accumulation_steps": 2, "teacher": "ema", "ema_rate": 0.2},
    {"num_iterations": 2, "gradient_accumulation_steps": 2},
    {"rollout_backend": "continuous"},
    {"rollout_batch_size": 1, "data_seed": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", INTERRUPTED, ids=str)
@pytest.mark.parametrize(("step", "amid", "left"), [(3, "rollouts", 2), (5, "rollouts", 4), (2, "learning", 2)])
def test_a_signal_saves_the_last_whole_step_and_the_resumed_run_ends_as_the_uninterrupted_one(
    step, amid, left, options, number, tmp_path, capfd
):
    """With a step in progress at the third token of its rollouts, within an epoch and at the start of one."""
    once = number == signal.SIGINT or options.get("rollout_backend") == "continuous"  # which takes its time
    if once and (amid, step) != ("rollouts", 3):
        pytest.skip("one step is enough")
    options = {"max_steps": 6, "per_device_train_batch_size": 2, **options}
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with stopped(tmp_path / "run", step, amid, number=number, **options) as (run, finish):
        run.train()
    assert capfd.readouterr().err.count("sdft: stopping after this step; again to stop now\n") == 1
    assert finish.stopped == number and run.state.global_step == left
    assert {each: signal.getsignal(each) for each in before} == before
    assert last_checkpoint(tmp_path / "run") == run.newest == str(tmp_path / "run" / f"checkpoint-{left}")
    again = trainer(tmp_path / "run", **options)
    again.train(resume_from_checkpoint=True)
    straight = trained(tmp_path / "straight", **options, save_strategy="steps", save_steps=left)
    assert again.state.global_step == 6
    assert_equal_weights(weights(again.model), weights(straight.model))
    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "model.safetensors"):
        files = [tmp_path / folder / f"checkpoint-{left}" / name for folder in ("run", "straight")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_a_signal_in_the_first_rollouts_leaves_no_checkpoint(tmp_path):
    with stopped(tmp_path, 1, "rollouts") as (run, finish):
        run.train()
    assert finish.stopped and run.newest is None and run.state.global_step == 0
    assert os.listdir(tmp_path) == []


def test_a_trainer_that_a_signal_has_stopped_goes_on(tmp_path):
    """Outside the block, which told it to stop, and within another."""
    with stopped(tmp_path / "run", 3, "rollouts", max_steps=4) as (run, finish):
        run.train()
    assert finish.stopped == signal.SIGTERM and run.state.global_step == 2
    assert run.train("last").training_loss > 0
    assert run.state.global_step == 4
    with stopped(tmp_path / "again", 3, "rollouts", max_steps=4) as (run, first), FinishOnSignal() as second:
        run.add_callback(second)
        run.train()
    assert second.stopped and not first.stopped and run.state.global_step == 2


def test_a_signal_right_after_a_checkpoint_saves_none_again(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    with stopped(tmp_path / "a", 3, "rollouts", **options) as (run, _):
        save = run._save_checkpoint
        saves = []
        run._save_checkpoint = lambda *args: (saves.append(run.state.global_step), save(*args))
        run.train()
    assert saves == [2]
    with stopped(tmp_path / "b", 3, "rollouts") as (again, _):
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.newest == str(tmp_path / "a" / "checkpoint-2")
    assert os.listdir(tmp_path / "b") == []


def test_a_launcher_that_passes_ctrl_c_on_does_not_make_two_of_one(tmp_path):
    with stopped(tmp_path, 3, "rollouts", times=2, number=signal.SIGINT) as (run, finish):
        run.train()
    assert finish.stopped == signal.SIGINT and os.path.basename(run.newest) == "checkpoint-2"


def test_a_second_sigterm_and_one_that_finds_no_step_act_as_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("sdft.checkpoints.signals.ECHO", 0.0)

    class Ended(Exception):
        pass

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended), stopped(tmp_path, 3, "rollouts", times=2) as (run, _):
            run.train()
        with pytest.raises(Ended), FinishOnSignal():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_sigterm_after_the_last_step_leaves_the_model_to_be_saved(tmp_path):
    run = trainer(tmp_path, eval_dataset=tiny.rows(2), eval_strategy="steps", eval_steps=4)
    evaluate = run.evaluate

    def told_to_stop_while_it_evaluates(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    run.evaluate = told_to_stop_while_it_evaluates
    with FinishOnSignal() as finish:
        run.add_callback(finish)
        run.train()
    assert finish.late and not finish.stopped
    assert_equal_weights(weights(run.model), weights(trained(tmp_path / "undisturbed").model))


@pytest.fixture(scope="module")
def a_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained(folder, max_steps=1, save_strategy="steps", teacher="ema", num_iterations=2)
    return folder / "checkpoint-1"


def checkpoint_without(a_checkpoint, folder, *names):
    shutil.copytree(a_checkpoint, folder)
    for name in names:
        (folder / name).unlink()
    return str(folder)


@pytest.mark.parametrize(
    ("lost", "pickled", "message"),
    [
        ("trainer_state.json", None, r"has no trainer_state.json; it must be a checkpoint's folder, or last"),
        ("optimizer.pt", None, r"has no optimizer in it \(save_only_model\)"),
        ("scheduler.pt", None, r"has no scheduler in it"),
        ("rng_state.pth", None, r"has no random state in it"),
        (
            "model.safetensors",
            "pytorch_model.bin",
            r"weights are pickled \(pytorch_model.bin\); loading them takes allow_pickle: true",
        ),
        ("model.safetensors", "adapter_model.bin", r"pickled \(adapter_model.bin\)"),
    ],
)
def test_a_folder_that_a_run_cannot_go_on_from_is_one_sentence(lost, pickled, message, a_checkpoint, tmp_path):
    found = checkpoint_without(a_checkpoint, tmp_path / "checkpoint-3", lost)
    if pickled:
        (tmp_path / "checkpoint-3" / pickled).write_text("")
    with pytest.raises(UsageError, match=rf"^resume_from_checkpoint is '{found}', .*{message}"):
        checkpoint_to_resume(found, tmp_path)


FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
FILES += ["teacher_average.safetensors", "rollouts-0.json", "config.json"]


@pytest.mark.parametrize("kept", [0, 0.5, -1], ids=["none of it", "half of it", "all but a byte"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_checkpoint_that_was_cut_is_named(name, kept, a_checkpoint, tmp_path):
    found = checkpoint_without(a_checkpoint, tmp_path / "checkpoint-1")
    path = tmp_path / "checkpoint-1" / name
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip()[: kept if kept < 0 else int(kept * len(whole))])
    with pytest.raises(UsageError, match=rf"^resume_from_checkpoint is '{found}', whose {name} is damaged \(.+\); it"):
        trainer(tmp_path, max_steps=2, teacher="ema", num_iterations=2).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_found_whatever_its_weights_are_in(a_checkpoint, tmp_path):
    whole = checkpoint_without(a_checkpoint, tmp_path / "checkpoint-3")
    assert checkpoint_to_resume("last", tmp_path) == whole
    pickled = checkpoint_without(a_checkpoint, tmp_path / "checkpoint-4", "model.safetensors")
    (tmp_path / "checkpoint-4" / "pytorch_model.bin").write_text("")
    assert checkpoint_to_resume("last", tmp_path, allow_pickle=True) == pickled


@pytest.mark.parametrize(("kept", "fits"), [(torch.tensor(2e-5), True), (2e-5, True), (2.1e-5, False)])
def test_the_learning_rate_of_a_checkpoint_may_be_kept_in_float32(kept, fits, tmp_path):
    args = trainer(tmp_path, learning_rate=2e-5).args
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = kept
    refusal = contextlib.nullcontext() if fits else pytest.raises(UsageError, match=r"its learning_rate is 2.1e-05")
    with refusal, Resuming("checkpoint-1") as resuming:
        resuming.on_train_begin(args, None, None, optimizer=optimizer)


@pytest.mark.parametrize("options", [{}, {"loss_normalisation": "sequence"}], ids=str)
def test_a_step_with_nothing_to_learn_from_is_one_line_and_leaves_finite_weights(options, tmp_path, caplog):
    """Every answer is one end-of-sequence token, and skipped."""
    run = trainer(tmp_path, skip_tokens=1, weight_decay=0.1, max_steps=2, **options)
    run.samples = with_completions(run, [1])
    with caplog.at_level(logging.WARNING, logger="sdft.samples"):
        run.train()
    lines = [record.getMessage() for record in caplog.records if record.name == "sdft.samples"]
    assert lines == [
        f"step {step} has nothing to learn from: none of its completions is longer than skip_tokens, which is 1"
        for step in (1, 2)
    ]
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == [0, 0]
    assert all(p.isfinite().all() for p in run.model.parameters())


def with_completions(run, completion):
    sample = run.samples

    def samples(rows):
        return [dataclasses.replace(s, completion=list(completion)) for s in sample(rows)]

    return samples


@pytest.mark.parametrize("completion", [[1], [0, 0, 0, 0, 0, 0], [0, 1], []], ids=["end", "padding", "both", "empty"])
@pytest.mark.parametrize("options", [{}, {"loss_normalisation": "sequence", "num_iterations": 2}], ids=str)
def test_rollouts_of_padding_or_nothing_train(completion, options, tmp_path):
    run = trainer(tmp_path, max_steps=2, **options)
    run.samples = with_completions(run, completion)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(loss > 0 for loss in losses) if completion else losses == [0, 0]
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_model_that_only_ends_or_pads_is_sampled_and_trained(tmp_path):
    for token in (0, 1):
        model = tiny.tiny_model()
        norm = model.model.norm
        with (
            torch.no_grad()
        ):  # one direction of the last hidden state that is always there, and one token that reads it
            norm.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.full((101,), -50.0))
            model.lm_head.bias[token] = 50.0
        run = trainer(tmp_path, model=model, max_steps=1)
        completions = [s.completion for s in run.samples(run.train_dataset[:2])]
        assert completions == ([[1], [1]] if token == 1 else [[0] * 6] * 2)
        run.train()
        assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_a_demonstration_longer_than_the_context_is_named_before_training(method, tmp_path):
    rows = tiny.rows(3)
    rows[1]["demonstration"] = "a" * 300
    with pytest.raises(UsageError, match=r"^train_dataset, row 2: .* longer than the model's context of 160$"):
        trainer(tmp_path, rows=rows, method=method)
    assert os.listdir(tmp_path) == []
