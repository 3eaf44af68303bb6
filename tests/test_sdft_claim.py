"""output_dir is one run's: a second one beside it, another's results and another's checkpoints are refused."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from sdft.checkpoints.claim import claimed
from sdft.checkpoints.resume import last_checkpoint, run_of
from sdft.errors import UsageError
from tests import tiny
from tests.test_sdft_trainer import trained, trainer

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def another_process(tmp_path):
    """A process that has claimed tmp_path/out, and lives."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def live():
        with claimed(tmp_path / "out"):
            theirs.send("claimed")
            theirs.recv()

    process = context.Process(target=live)
    process.start()
    assert ours.poll(30) and ours.recv() == "claimed"
    yield process
    process.kill()
    process.join()


def test_a_run_beside_a_live_one_is_refused_and_says_which(another_process, tmp_path):
    folder = tmp_path / "out"
    before = (folder / "run.json").read_text()
    for options in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(UsageError, match=rf"run is under way \(process {another_process.pid} on .+\); it must be"):
            trainer(folder, **options).train()
    assert (folder / "run.json").read_text() == before
    assert os.listdir(folder) == ["run.json"]


def test_a_run_that_was_killed_is_in_nobodys_way(another_process, tmp_path):
    os.kill(another_process.pid, signal.SIGKILL)
    another_process.join()
    assert (tmp_path / "out" / "run.json").exists()
    assert trained(tmp_path / "out", max_steps=1).state.global_step == 1


def test_other_processes_of_a_launch_leave_the_folder_to_the_main_one(another_process, tmp_path):
    with claimed(tmp_path / "out", main=False) as claim:
        claim.begin()


def test_a_folder_in_which_nothing_was_left_is_as_it_was(tmp_path):
    with claimed(tmp_path / "a" / "b") as claim:
        claim.begin()
        with claimed(tmp_path / "a" / "b") as again:
            assert again is claim
        with pytest.raises(UsageError, match="it must be a checkpoint's folder"):
            trainer(tmp_path / "a" / "b").train(resume_from_checkpoint=str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_results_of_another_run_are_kept_unless_they_are_to_go(tmp_path):
    trained(tmp_path, **SAVING)
    with pytest.raises(
        UsageError, match=r"holds another run \(checkpoint-2, checkpoint-4\); it must be another folder"
    ):
        trained(tmp_path, max_steps=3)
    trained(tmp_path, **SAVING, max_steps=3, overwrite_output_dir=True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-3", "run.json"]
    assert {run_of(tmp_path / name) for name in ("checkpoint-2", "checkpoint-3", ".")} == {run_of(tmp_path)}


def test_a_run_whose_optimizer_cannot_be_made_costs_no_other_run(tmp_path):
    trained(tmp_path, **SAVING)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    broken = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"betas": (2.0, 0.9)})}
    with pytest.raises(ValueError, match="Invalid beta"):
        trained(tmp_path, overwrite_output_dir=True, arguments=broken)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {**after, "run.json": None} == {**before, "run.json": None}
    assert run_of(tmp_path) == run_of(tmp_path / "checkpoint-4")


def test_rows_that_make_no_batch_are_refused(tmp_path):
    with pytest.raises(UsageError, match="dataloader_drop_last is True, and the rows do not make one batch"):
        trained(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=100)
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_no_runs_is_kept_too(tmp_path):
    tiny.tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"holds another run \(model.safetensors\)"):
        trained(tmp_path, max_steps=1)


def test_a_trainer_may_train_again_in_its_folder(tmp_path):
    run = trained(tmp_path, max_steps=1, save_strategy="no")
    run.save_model()
    run.train()


def test_last_is_the_newest_checkpoint_of_the_folders_own_run(tmp_path):
    for name in ("one", "two"):
        trained(tmp_path / name, **SAVING)
    os.rename(tmp_path / "two" / "checkpoint-4", tmp_path / "one" / "checkpoint-6")
    assert last_checkpoint(tmp_path / "one") == str(tmp_path / "one" / "checkpoint-4")
    (tmp_path / "one" / "run.json").unlink()
    assert last_checkpoint(tmp_path / "one") == str(tmp_path / "one" / "checkpoint-6")


def test_going_on_from_the_checkpoint_of_another_run_takes_a_folder_of_its_own(tmp_path):
    for name in ("one", "two"):
        trained(tmp_path / name, **SAVING)
    found = str(tmp_path / "two" / "checkpoint-2")
    with pytest.raises(UsageError, match=rf"^resume_from_checkpoint is '{found}', a checkpoint of another run than"):
        trainer(tmp_path / "one", **SAVING).train(resume_from_checkpoint=found)
    trainer(tmp_path / "three", **SAVING).train(resume_from_checkpoint=found)
    assert run_of(tmp_path / "three") == run_of(tmp_path / "three" / "checkpoint-4") == run_of(tmp_path / "two")


def test_a_run_of_before_there_were_records_goes_on(tmp_path):
    trained(tmp_path, **SAVING)
    for record in tmp_path.rglob("run.json"):
        record.unlink()
    trainer(tmp_path, **SAVING, max_steps=5).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-5" / "run.json").read_text())["run"] == run_of(tmp_path)
