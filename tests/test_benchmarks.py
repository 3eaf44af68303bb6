"""The benchmarks that measure here: on shapes of no interest, that every number, table, file and plot comes out."""

from __future__ import annotations

import argparse
import copy
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import attention_lengths, continual, linearity, long_rollouts, memory, plans, rollout_speed, rows, speed
from benchmarks.methods import METHODS, Shape
from sdft.rollouts.interface import Request
from sdft.settings.continual import fields_of_continual, plan_of
from sdft.settings.recipe import read
from sdft_kernels.divergences import DIVERGENCES
from tests import tiny

TINY = Shape("tiny", 8, 16, 64)


def given(tmp_path: Path, name: str) -> argparse.Namespace:
    """The arguments of a benchmark whose files go to a folder that is not there yet."""
    parser = argparse.ArgumentParser()
    rows.add_arguments(parser, name)
    defaults = parser.parse_args([])
    assert defaults.csv == Path(f"runs/benchmarks/{name}.csv") and defaults.plot == Path(f"runs/benchmarks/{name}.png")
    return parser.parse_args([f"--{kind}={tmp_path / 'new' / f'{name}.{kind}'}" for kind in ("json", "csv", "plot")])


def check_files(found: list[Any], files: argparse.Namespace, draw: Any) -> None:
    rows.write(found, files)
    report = json.loads(files.json.read_text())
    assert report["machine"] and report["versions"] and report["date"]
    assert len(report["rows"]) == len(list(csv.DictReader(files.csv.open()))) == len(found)
    plot = files.plot.with_suffix(".png")
    draw(found, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_speed_compares_every_method_in_turns(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    methods = [name for name in METHODS if name != "Liger compiled"]
    found = [
        row
        for trainable in (True, False)
        for row in speed.compare(TINY, trainable_head=trainable, divergence="jsd", methods=methods, rounds=1)
    ]
    assert [row.method for row in found] == [speed.FLOOR, *methods] * 2
    for row in found:
        floor, ours = (
            next(r.seconds for r in found if (r.head, r.method) == (row.head, name))
            for name in (speed.FLOOR, "sdft-kernels")
        )
        assert row.to_floor == row.seconds / floor and row.to_ours == row.seconds / ours
    assert speed.table(found).count("\n") == len(found)
    check_files(found, given(tmp_path, "speed"), speed.draw)


@pytest.mark.slow
def test_speed_prints_each_other_divergence_on_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, but for the processes that measure memory."""
    apart: list[tuple[str, str]] = []

    def measure_apart(shape: Shape, method: str, divergence: str, **_: Any) -> float:
        apart.append((method, divergence))
        return 5.0

    monkeypatch.setattr(speed, "SHAPES", (TINY,))
    monkeypatch.setattr(speed, "measure_apart", measure_apart)
    files = [f"--{kind}={tmp_path / f'speed.{kind}'}" for kind in ("json", "csv", "plot")]
    files[-1] += ".svg"
    speed.main(["--rounds", "1", "--methods", "plain torch", "--heads", "trainable", *files])
    others = [divergence for divergence in DIVERGENCES if divergence != "reverse_kl"]
    expected = [(name, "reverse_kl") for name in ("sdft-kernels", "plain torch")]
    expected += [("sdft-kernels", divergence) for divergence in others]
    assert apart == expected
    written = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert [(r["method"], r["divergence"]) for r in written if r["method"] != speed.FLOOR] == expected
    assert {r["mebibytes"] for r in written if r["method"] == speed.FLOOR} == {""}
    assert {r["mebibytes"] for r in written if r["method"] != speed.FLOOR} == {"5.0"}
    printed = capsys.readouterr().out
    for divergence in others:
        assert printed.count(f"{divergence:16} sdft-kernels") == 1


@pytest.mark.slow
def test_memory_counts_what_is_held_at_once(tmp_path: Path) -> None:
    """Plain torch holds several arrays of the logits' size at once; ours a part of one."""
    shape = Shape("small", 256, 64, 32_768)
    found = [
        memory.Peak(shape.name, 256, "frozen", name, memory.measure_apart(shape, name, trainable_head=False, threads=2))
        for name in ("sdft-kernels", "plain torch")
    ]
    logits = 256 * 32_768 * 4 / 2**20
    assert 3 * logits < found[1].mebibytes < 10 * logits
    assert found[0].mebibytes < found[1].mebibytes / 2
    check_files(found, given(tmp_path, "memory"), memory.draw)


@pytest.mark.slow
def test_linearity_measures_each_point(tmp_path: Path) -> None:
    shapes = [Shape("tokens", tokens, 16, 512) for tokens in (8, 16)] + [Shape("vocabulary", 8, 16, 256)]
    found = [linearity.measure(shape, trainable_head=True, rounds=1) for shape in shapes]
    assert [(p.growing, p.tokens, p.vocabulary) for p in found] == [(s.name, s.tokens, s.vocab) for s in shapes]
    for point in found:
        assert point.nanoseconds_per_logit == pytest.approx(point.seconds * 1e9 / (point.tokens * point.vocabulary))
    check_files(found, given(tmp_path, "linearity"), linearity.draw)


def test_long_rollouts_take_the_median_of_rounds_and_compute_a_length_beyond(tmp_path: Path) -> None:
    tiles, whole = "checkpointed, tiles of 1,024", "as it is"
    rounds = [
        long_rollouts.LongRollout(1000, tiles, mebibytes, seconds) for mebibytes, seconds in ((7, 9), (8, 1), (6, 2))
    ]
    found = [long_rollouts.together(rounds), long_rollouts.LongRollout(3000, tiles, 18.0, 5.0)]
    found.insert(0, long_rollouts.LongRollout(10, tiles, 7.0, 0.1))
    assert (found[1].mebibytes, found[1].seconds, found[1].rounds) == (8, 2, 3)
    assert long_rollouts.along_the_line(found, tiles) == pytest.approx(3 + 5 * 32.768)
    assert long_rollouts.along_the_line(found, whole) is None
    assert long_rollouts.along_the_line(found, tiles, 3000) is None  # which has been measured
    found.append(long_rollouts.LongRollout(1000, whole, 40.0, 1.5))
    assert long_rollouts.table(found).count("computed") == 1
    check_files(found, given(tmp_path, "long_rollouts"), long_rollouts.draw)


def test_plans_are_longest_rollouts_by_way_of_training_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.tiny_model(hidden_size=256, intermediate_size=512, vocab_size=2003).config
    monkeypatch.setattr(plans, "config_of", lambda _: copy.deepcopy(config))
    found = [row for way in plans.WAYS for row in plans.plan("tiny", way, ["1.10GiB", "1.05GiB"])]
    assert [row.training for row in found] == ["full", "full", "LoRA", "LoRA", "QLoRA", "QLoRA"]
    for row in found:
        assert 0 < row.with_full_logits < row.longest_rollout
        assert row.positions_allow == 1  # the prompt takes all that the model has
    for less, more in zip(found[::2], found[1::2], strict=True):
        assert (less.gpu, more.gpu) == ("1.05GiB", "1.10GiB") and less.longest_rollout < more.longest_rollout
    assert plans.table(found).count("\n") == len(found)
    rows.write(found, argparse.Namespace(json=None, csv=tmp_path / "plans.csv"))
    assert len(list(csv.DictReader((tmp_path / "plans.csv").open()))) == len(found)


def test_rollout_speed_has_a_row_for_each_back_end() -> None:
    requests, model = [Request([5, 6], 1), Request([7], 2)], tiny.tiny_model()
    backends = {name: way for name, way in rollout_speed.backends_of(model, 8).items() if name != "vllm"}
    with torch.no_grad():
        found = rollout_speed.compare(model, backends, requests, 4, rounds=2)
    assert [row.backend for row in found] == ["generate", "continuous", "as TRL"]
    assert all(row.tokens_per_second == 8 / row.seconds for row in found)
    assert rollout_speed.table(found).count("\n") == 2
    assert rollout_speed.case_of("8x512") == (8, 512)
    for wrong in ("8", "x8", "0x8", "8x8x8"):
        with pytest.raises(argparse.ArgumentTypeError, match="8x512"):
            rollout_speed.case_of(wrong)


def test_continual_has_a_point_for_each_stage_and_a_recipe_that_can_be_read(tmp_path: Path) -> None:
    trials = continual.trials_of(dict(map(continual.method_of, ["sdft:1e-5,5e-5", "sft-kl:5e-5"])), [2])
    told = continual.recipe(["tools", "triage"], trials, [0, 3], tmp_path / "out")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    fields = fields_of_continual()
    plan = plan_of(read([str(tmp_path / "recipe.yaml")], fields, command="sdft continual"), fields)
    assert [method.name for method in plan.methods] == ["sdft-1e-05-2", "sdft-5e-05-2", "sft-kl-5e-05-2"]
    assert [skill.name for skill in plan.skills] == ["tools", "triage"] and plan.seeds == [0, 3]
    numbers = {"general_accuracy": 0.9, "forgetting": 0.25, "weights_moved": 1.5, "seconds": 3.0}
    stages = [
        {"learned": ["tools"], "accuracy": {"tools": 0.8, "triage": 0.0}, **numbers},
        {"learned": ["triage"], "accuracy": {"tools": 0.6, "triage": 0.7}, **numbers},
    ]
    runs = [{"method": method.name, "seed": seed, "stages": stages} for method in plan.methods for seed in plan.seeds]
    base = {"accuracy": {"tools": 0.0}, "teacher_accuracy": {"triage": 1.0}, "general_accuracy": 1.0}
    assert [len(skill.choosing) for skill in plan.skills] == [40, 40]
    found = continual.points({"skills": ["tools", "triage"], "runs": runs}, trials)
    assert len(found) == 12
    assert continual.verdict(found, base).startswith("nothing is chosen")
    last = found[-1]
    assert (last.method, last.learning_rate, last.seed, last.steps, last.stage) == ("sft-kl", 5e-5, 3, 2, 2)
    assert (last.skill, last.accuracy, last.earlier_accuracy, last.forgetting) == ("triage", 0.7, 0.6, 0.25)
    assert continual.table(found).count("\n") == 1 + len(found)
    assert continual.method_of("sft") == ("sft", continual.LEARNING_RATES)
    for wrong in ("ppo", "sft:fast", "sft:1e-5,", "sft:1e-5,0.00001", "sft:nan", "sft:-1e-5", "sft:0"):
        with pytest.raises(argparse.ArgumentTypeError, match="it may be one of sdft, sft, sft-kl"):
            continual.method_of(wrong)
    continual.draw(found, base, tmp_path / "plot.png")
    written = tmp_path / "rows.csv"
    rows.write(found, argparse.Namespace(json=None, csv=written))
    assert continual.read_points([written, written], ["tools", "triage"], [2]) == [*found, *found]
    assert continual.read_points([written], ["science"], [2]) == continual.read_points([written], ["tools"], [3]) == []
    again = {name: tmp_path / f"again.{name}" for name in ("csv", "png")}
    continual.main(["--from", str(written), "--steps", "2", "--csv", str(again["csv"]), "--plot", str(again["png"])])
    assert again["png"].stat().st_size > 1000 and again["csv"].read_text() == written.read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_continual_chooses_by_the_rows_for_choosing_alone() -> None:
    """The best of each method, and of each the trial that is nearest to the least of these."""
    trials = continual.trials_of({"sdft": [1e-5, 5e-5], "sft": [1e-5, 5e-5]}, [40, 80])
    # shares on the rows to choose by, held out, and of general prompts
    scores = {
        ("sdft", 1e-5, 40): (0.2, 0.9, 0.9),
        ("sdft", 1e-5, 80): (0.3, 0.9, 0.8),
        ("sdft", 5e-5, 40): (0.5, 0.4, 0.7),
        ("sdft", 5e-5, 80): (0.5, 0.9, 0.1),
        ("sft", 1e-5, 40): (0.4, 0.1, 0.6),
        ("sft", 1e-5, 80): (0.6, 0.4, 0.4),
        ("sft", 5e-5, 40): (0.8, 0.2, 0.2),
        ("sft", 5e-5, 80): (0.7, 0.9, 0.1),
    }
    runs = []
    for trial in trials:
        choosing, accuracy, general = scores[trial.method, trial.learning_rate, trial.steps]
        for seed in (0, 1):
            change = 0.125 - 0.25 * seed  # the mean over seeds is what counts
            stage = {"learned": ["a"], "accuracy": {"a": accuracy}, "choose_accuracy": {"a": choosing + change}}
            stage |= {"general_accuracy": general, "forgetting": 1 - general, "weights_moved": 1.0, "seconds": 1.0}
            runs.append({"method": trial.name, "seed": seed, "stages": [stage]})
    found = continual.points({"skills": ["a"], "runs": runs}, trials)
    of = {(trial.method, trial.learning_rate, trial.steps): trial for trial in trials}
    assert continual.chosen(found) == {
        "sdft": (of["sdft", 5e-5, 40], of["sdft", 5e-5, 40]),
        "sft": (of["sft", 5e-5, 40], of["sft", 1e-5, 40]),  # 0.4 and 0.6 are as near to 0.5
    }
    said = continual.verdict(found, {"general_accuracy": 1.0})
    assert "best     sft     5e-05 in 40 steps: 80.0% on rows to choose by, 20.0% held out, 80.0 points" in said
    assert said.endswith("matched, sdft has forgotten 0.75 of sft's points and 0.75 of its nats")
    said = continual.verdict(found, {"general_accuracy": 0.6})  # of which the matched sft has lost nothing
    assert said.endswith("matched, sdft has forgotten - of sft's points and 0.75 of its nats")


def test_continual_takes_the_lower_rate_of_two_that_are_as_near() -> None:
    """Where their shares are, but for the digits that floats cannot have."""
    trials = continual.trials_of({"sdft": [1e-5, 2e-5, 5e-5], "sft": [1e-5]}, [40])
    numbers = {"accuracy": {"a": 0.5}, "general_accuracy": 1.0, "forgetting": 0.0, "weights_moved": 1.0, "seconds": 1.0}
    thirds = (1 / 3, 0.35, 0.5, 0.35 / 2 + 1 / 6)  # as of 40 rows of each of three skills
    for shares in ((0.1, 0.05, 0.5, 0.075), thirds):
        runs = []
        for trial, share in zip(trials, shares, strict=True):
            stage = {"learned": ["a"], "choose_accuracy": {"a": share}, **numbers}
            runs.append({"method": trial.name, "seed": 0, "stages": [stage]})
        found = continual.points({"skills": ["a"], "runs": runs}, trials)
        assert continual.chosen(found)["sdft"] == (trials[2], trials[0])
    with pytest.raises(SystemExit):
        continual.main(["--methods", "sft:1e-5", "sft:2e-5"])


def test_continual_chooses_by_all_skills_that_were_learned() -> None:
    trials = continual.trials_of({"sdft": [1e-5, 5e-5]}, [40])
    numbers = {"general_accuracy": 1.0, "forgetting": 0.0, "weights_moved": 1.0, "seconds": 1.0}
    runs = []
    for trial, shares in zip(trials, ((0.2, 0.6), (0.5, 0.4)), strict=True):
        of_skill = dict(zip(("a", "b"), shares, strict=True))
        stage = {"accuracy": of_skill, "choose_accuracy": of_skill, **numbers}
        runs.append({"method": trial.name, "seed": 0, "stages": [{"learned": [each], **stage} for each in "ab"]})
    found = continual.points({"skills": ["a", "b"], "runs": runs}, trials)
    assert continual.chosen(found)["sdft"][0] == trials[1]
    assert "45.0% on rows to choose by, 45.0% held out" in continual.verdict(found, {"general_accuracy": 1.0})


def test_attention_by_length(capsys: pytest.CaptureFixture[str]) -> None:
    """Its code, and that padding leaves every token something to attend to."""
    assert attention_lengths.main(["--device", "cpu"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(attention_lengths.CASES) and {line.count("|") for line in table} == {6}
    for case in attention_lengths.CASES:
        tensors, settings = attention_lengths.inputs(attention_lengths.toy(case), 20, "cpu")
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, **settings)
        assert out.isfinite().all() and out.shape[2] == (1 if case.of_a_token else 20)
    if not torch.cuda.is_available():
        assert attention_lengths.main([]) == 2
        assert "needs a CUDA GPU" in capsys.readouterr().err
