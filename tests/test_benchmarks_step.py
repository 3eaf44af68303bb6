"""The benchmark of a whole optimizer step: on a tiny model, that both trainers do the same step and all is reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import step
from benchmarks.bare_products import ATTENTION, ATTENTION_BACKWARD, BareProducts
from benchmarks.trainers import TRAINERS, OurTrainer
from sdft.batch import Batch
from tests import tiny
from tests.test_bare_products import flops


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    tiny.tiny_model(max_position_embeddings=1024).save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.peers
@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_trainers_take_the_same_step(accumulation: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    (case,) = step.prepare(str(folder), 4, [7], tmp_path / "case", accumulation)
    assert [len(completion) for completion in case.completions] == [7, 7, 7, 7]
    trainers = {name: load()(case) for name, load in TRAINERS.items()}
    before = {name: trainer.model.lm_head.weight.clone() for name, trainer in trainers.items()}
    losses = [[trainer.step().loss for _ in range(2)] for trainer in trainers.values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] > 0.01
    assert losses[0][0] == losses[0][1], "every step starts from the same weights"
    for name, trainer in trainers.items():
        assert trainer.model.lm_head.weight.equal(before[name])
        assert all(state["exp_avg"].abs().max() > 0 for state in trainer.optimizer.state.values())
        parameters = sum(p.numel() for p in trainer.model.parameters())
        scalars = len(trainer.optimizer.state)  # AdamW counts its steps for each parameter
        assert trainer.held_bytes() == 4 * (5 * parameters + scalars)  # two weights, gradient, two moments


def test_the_floor_is_of_the_step_without_its_generation(folder: Path, tmp_path: Path) -> None:
    (case,) = step.prepare(str(folder), 4, [8], tmp_path / "case")
    trainer = OurTrainer(case)
    trainer.products = BareProducts()
    inputs: list[Batch] = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, batch, **rest: inputs.append(batch) or compute_loss(model, batch, **rest)
    trainer.step()
    (batch,) = inputs
    layers = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "proj" in name)
    in_layers = 2 * layers * (3 * batch["input_ids"].numel() + batch["teacher_input_ids"].numel())
    of_a_token = 2 * trainer.model.lm_head.weight.numel()
    at_the_head = 4 * 4 * 8 * of_a_token + 2 * 4 * of_a_token  # both models' first tokens once more: sdft/reach.py
    assert flops(trainer.products) == in_layers + at_the_head
    calls, depth = trainer.products.calls.items(), trainer.model.config.num_hidden_layers
    assert (
        sum(times for (func, *_), times in calls if func == ATTENTION) == 2 * depth
    )  # the student's and the teacher's
    assert sum(times for (func, *_), times in calls if func == ATTENTION_BACKWARD) == depth


@pytest.mark.peers
def test_losses_that_differ_are_not_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    (case,) = step.prepare(str(folder), 2, [5], tmp_path / "case")
    original = TRAINERS["sdft-kernels"]

    def other_completions():
        make = original()
        flipped = step.Case(case.folder, case.rows, [completion[::-1] for completion in case.completions])
        return lambda _: make(flipped)

    monkeypatch.setitem(TRAINERS, "sdft-kernels", other_completions)
    with pytest.raises(RuntimeError, match="losses on the same completions"):
        step.compare(case, rounds=1)


@pytest.mark.peers
@pytest.mark.slow
def test_the_command_writes_every_number(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    out = {kind: tmp_path / "new" / f"step.{kind}" for kind in ("json", "csv", "png")}
    options = {"model": folder, "prompts": 2, "rounds": 1, "json": out["json"], "csv": out["csv"], "plot": out["png"]}
    step.main([f"--{name}={value}" for name, value in options.items()] + ["--tokens", "4"])
    rows = json.loads(out["json"].read_text())["rows"]
    assert [(row["tokens"], row["method"]) for row in rows] == [(4, method) for method in TRAINERS]
    assert len(list(csv.DictReader(out["csv"].open()))) == 2
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    mine, theirs = rows
    assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert mine["seconds_to_trl"] == pytest.approx(mine["seconds"] / theirs["seconds"])
    assert mine["generation_to_trl"] == pytest.approx(mine["generation"] / theirs["generation"])
    assert mine["floor"] == theirs["floor"] > 0
    assert mine["seconds_to_floor"] == pytest.approx(mine["seconds"] / mine["floor"])
    assert theirs["working_to_trl"] == 1 and mine["peak_gib"] > 0
    assert "× TRL" in capsys.readouterr().out
