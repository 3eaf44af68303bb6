"""The GPU report's training steps and rollouts, with toys on the CPU: rows, tables, what is skipped and what breaks."""

from __future__ import annotations

import json
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.gpu_report import rollouts, training
from benchmarks.gpu_report.models import SIZES, random_model
from benchmarks.gpu_report.stage import Row, Settings
from benchmarks.ledger import OURS
from sdft.rollouts.generate import BACKENDS
from sdft.rollouts.interface import Completion

GPU = Settings("cuda", False, 0)


def toy(seconds: float = 60) -> Settings:
    return Settings("cpu", True, time.monotonic() + seconds)


def given_left(*seconds: float) -> Any:
    """Settings of real sizes, of which nothing is measured here, with so much time left at each look."""
    left = iter(seconds)
    return SimpleNamespace(device="cpu", toy=False, left=lambda: next(left))


def toy_case(method: str = OURS, trains: str = "all weights") -> training.Case:
    return training.case(method, "toy", trains, 8, 32)


def measured(case: training.Case, seconds: float = 1.0) -> Row:
    return {"case": case.name, "seconds": seconds, "tokens_per_second": 1.0}


@pytest.mark.slow
def test_steps_of_toys(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = list(training.run(toy(200)))
    assert [(row["method"], row["trains"]) for row in rows] == [
        (method, trains) for method in (OURS, "TRL") for trains in ("all weights", "LoRA")
    ]
    for row in rows:
        json.dumps(row, allow_nan=False)
        phases = [row[f"{phase}_seconds"] for phase in training.PHASES]
        assert sum(seconds or 0 for seconds in phases) == pytest.approx(row["seconds"])
        assert all(seconds > 0 for seconds in phases[0 if row["method"] == OURS else 2 :])
        assert row["peak_gib"] is None and row["loss"] > 0
    assert len([line for line in training.table(rows).splitlines() if line.startswith("|")]) == 2 + len(rows)
    training.draw(rows, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 0


@pytest.mark.parametrize("trains", ["all weights", "LoRA"])
def test_both_trainers_do_the_same_step(trains: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: in bfloat16 TRL's logits are rounded by more than teacher and student differ with random weights."""
    pytest.importorskip("trl")
    monkeypatch.setattr(training, "random_model", lambda name, device: random_model(name, device, torch.float32))
    ours, theirs = (training.measure(toy_case(method, trains), "cpu")["loss"] for method in training.TRAINERS)
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("trains", ["all weights", "LoRA"])
@pytest.mark.parametrize("method", training.TRAINERS)
def test_both_trainers_read_as_much_in_the_same_types(method: str, trains: str, tmp_path: Path) -> None:
    if method != OURS:
        pytest.importorskip("trl")
    case = toy_case(method, trains)
    trainer = training.TRAINERS[method](case, "cpu", str(tmp_path))
    types = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert types == {torch.float32 if trains == "LoRA" else torch.bfloat16}
    model, lengths = trainer.model if trains == "all weights" else trainer.model.get_base_model(), []
    teacher = model if trains == "LoRA" else trainer.teacher_model if method != OURS else trainer.teacher.model
    for one in {id(model): model, id(teacher): teacher}.values():
        one.model.register_forward_pre_hook(
            lambda _, args, given: lengths.append((given["input_ids"] if not args else args[0]).shape), with_kwargs=True
        )
    trainer.train()
    prompts = {"student": 64 + 3, "teacher": 64 + 2 + 128 + 3}  # 3: the chat template's own tokens
    # Checkpointing repeats layers, and not the whole of the model.
    assert sorted(lengths) == sorted(2 * [(case.rows, prompt + case.tokens) for prompt in prompts.values()])


@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_of_a_case_outlives_it(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    def made(*arguments: Any) -> Qwen2ForCausalLM:
        model = random_model(*arguments)
        kept.append(weakref.ref(next(model.parameters())))
        return model

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(training, "random_model", made)
    monkeypatch.setattr(training, "cases", lambda settings: [toy_case(), toy_case(trains="LoRA")])
    if breaks:
        monkeypatch.setattr(training.OurTrainer, "_get_grad_norm", out_of_memory)
    for row in training.run(toy()):
        assert str(row.get("error")).startswith(
            "MemoryRanOut: memory ran out in learn (CUDA out of" if breaks else "None"
        )
        assert kept[-1]() is None, "before the next case begins"
    assert len(kept) == 2


def test_after_the_deadline_all_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "make_model", None)  # is not called: on a device it takes seconds
    for stage, count in ((training, 4), (rollouts, 9)):
        rows = list(stage.run(toy(-1)))
        assert [row["skipped"] for row in rows] == ["no time left"] * count
        assert stage.table(rows).count("no time left") == count


def test_what_a_case_needs_is_learned_from_those_before() -> None:
    expected = training.Expected()
    first, theirs, large, longer = (
        training.case(OURS, "Qwen2.5-1.5B", "all weights", 1024),
        training.case("TRL", "Qwen2.5-1.5B", "all weights", 1024),
        training.case(OURS, "Qwen2.5-7B", "LoRA", 1024),
        training.case(OURS, "Qwen2.5-1.5B", "all weights", 65_536),
    )
    before = expected.seconds(theirs)
    expected.learn(first, 0.5, 9.0)
    assert expected.overhead == 8.0
    assert expected.seconds(first) == pytest.approx(8 + 1.2 * 2 * 0.5)
    assert expected.seconds(theirs) < before, "less overhead, at the rate that was assumed"
    assert expected.seconds(large) == pytest.approx(8 + 1.2 * large.operations / first.operations)
    step = (expected.seconds(longer) - 8) / 2.4
    assert step > 1.5 * 0.5 * longer.tokens / (first.rows * first.tokens), "attention grows with the square"
    expected.learn(large, 2.0, 6.0)
    assert expected.seconds(large) == pytest.approx(2 + 1.2 * 2 * 2.0)
    assert expected.seconds(first) == pytest.approx(2 + 1.2 * 2 * 0.5), "a model's own rate is kept"


def test_a_case_begins_only_where_there_is_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def measure(case: training.Case, device: str) -> Row:
        begun.append(case.name)
        return measured(case, 0.001)

    monkeypatch.setattr(training, "measure", measure)
    all_cases = training.cases(GPU)
    monkeypatch.setattr(training, "cases", lambda settings: all_cases[:3])
    rows = list(training.run(given_left(100, 0.5, 0.5, 100)))
    assert begun == [all_cases[0].name, all_cases[2].name]
    assert rows[1]["skipped"].startswith("no time left: 0 s, and it takes about ")


def test_longer_is_not_tried_after_memory_was_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(OURS, 1024), (OURS, 16_384), ("TRL", 16_384), (OURS, 32_768)]
    cases = [training.case(method, "Qwen2.5-7B", "LoRA", tokens) for method, tokens in lengths]

    def measure(case: training.Case, device: str) -> Row:
        if case.method == OURS:
            raise torch.cuda.OutOfMemoryError("no room")
        return measured(case)

    monkeypatch.setattr(training, "cases", lambda settings: cases)
    monkeypatch.setattr(training, "measure", measure)
    rows = list(training.run(given_left(*[1000] * 10)))
    assert [row.get("error") for row in rows] == ["OutOfMemoryError: no room"] * 2 + [None] * 2
    assert rows[2]["seconds"] == 1.0
    assert rows[3]["skipped"] == "memory was too small for 16384 tokens"
    written = training.table(rows)
    assert "OutOfMemoryError: no room" in written and "too small for 16384" in written


def test_memory_may_be_too_small_for_a_peer_and_for_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are skipped and name why; what is sure to fit is an error of ours."""
    lengths = [("TRL", 1024), (OURS, training.SURE_TOKENS), (OURS, 32_768), (OURS, 65_536)]
    cases = [training.case(method, "Qwen2.5-7B", "LoRA", tokens) for method, tokens in lengths]

    def measure(case: training.Case, device: str) -> Row:
        if case.tokens == training.SURE_TOKENS:
            raise ValueError("something else")
        raise torch.OutOfMemoryError("no room\nand why")

    monkeypatch.setattr(training.peers, "absent", lambda needed: {})
    monkeypatch.setattr(training, "cases", lambda settings: cases)
    monkeypatch.setattr(training, "measure", measure)
    rows = list(training.run(given_left(*[1000] * 10)))
    assert [row.get("skipped") for row in rows] == [
        "OutOfMemoryError: no room",
        None,
        "OutOfMemoryError: no room",
        "memory was too small for 32768 tokens",
    ]
    assert rows[1]["error"] == "ValueError: something else"
    assert "TRL, Qwen2.5-7B, LoRA, 8 × 1024 tokens: OutOfMemoryError: no room" in training.table(rows)


def test_each_phase_has_its_colour_and_a_name_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    phases = {f"{phase}_seconds": 0.1 for phase in training.PHASES}
    training.draw([{**measured(toy_case(method)), **phases} for method in (OURS, "TRL")], tmp_path / "a.png")
    colours = {bar.get_label(): bar.patches[0].get_facecolor() for bar in saved[0].axes[0].containers}
    assert list(colours) == list(training.PHASES) and len(set(colours.values())) == len(training.PHASES)
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == list(training.PHASES)


def test_a_trainer_that_is_not_here_is_skipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(training, "measure", lambda case, device: measured(case))
    rows = list(training.run(toy()))
    assert [(row["case"], row["skipped"][:19]) for row in rows if "skipped" in row] == [("TRL", "ModuleNotFoundError")]
    assert [row["case"] for row in rows if "seconds" in row] == [toy_case().name, training.cases(toy())[1].name]


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen2.5-1.5B", 1.544), ("Qwen2.5-7B", 7.616)]
)  # as their model cards have it
def test_sizes_are_those_of_the_models(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)


def test_a_random_model_is_made_where_and_as_it_is_to_be() -> None:
    model, again = random_model("toy", "cpu"), random_model("toy", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_rollouts_of_a_toy() -> None:
    rows = list(rollouts.run(toy()))
    assert [(row["backend"], row["seeded"], row["prompts"]) for row in rows] == [
        *(("generate", seeded, prompts) for seeded in (True, False) for prompts in (4, 8)),
        ("generate, compiled", True, 8),
        *(("continuous", seeded, prompts) for seeded in (True, False) for prompts in (4, 8)),
    ]
    for row in rows:
        json.dumps(row, allow_nan=False)
        assert row["tokens_per_second"] == pytest.approx(row["prompts"] * 8 / row["seconds"])
    assert rollouts.table(rows).count("seeded |") == len(rows)


@pytest.mark.slow
def test_what_is_measured_is_as_long_as_what_went_before(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Any, ...]] = []

    def take(model: Any, *told: Any) -> float:
        taken.append(told)
        return 1.0

    monkeypatch.setattr(rollouts, "take", take)
    rows = list(rollouts.run(toy()))
    assert taken[::2] == taken[1::2] and len(taken) == 2 * len(rows), "a turn before each measured one, like it in all"


@pytest.mark.slow
def test_a_back_end_that_breaks_does_not_stop_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> list[Completion]:
        raise RuntimeError("refused\nand why")

    def too_short(model: Any, requests: Any, *_: Any) -> list[Completion]:
        return [Completion([5])] * len(requests)

    monkeypatch.setitem(BACKENDS, "generate", breaks)
    monkeypatch.setitem(BACKENDS, "continuous", too_short)
    rows = list(rollouts.run(toy()))
    errors = {name: [row["error"] for row in rows if row["backend"] == name] for name in BACKENDS}
    assert errors["generate"] == ["RuntimeError: refused"] * 4
    assert len(errors["continuous"]) == 4 and all("completions of [1] tokens" in said for said in errors["continuous"])
    assert rollouts.table(rows).count("RuntimeError: refused") == 4
