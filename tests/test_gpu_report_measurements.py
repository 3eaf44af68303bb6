"""The stages of the GPU report that measure, with toys on the CPU: every row, table and plot, and what stops none."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, plots
from benchmarks.gpu_report import card, loss, loss_cases, loss_errors, parts, report, scoring
from benchmarks.gpu_report.cases import TOYS, guarded, notes
from benchmarks.gpu_report.plan import STAGES, Stage
from benchmarks.gpu_report.process import Outcome
from benchmarks.gpu_report.stage import Row, Settings
from benchmarks.ledger import EVERY_OPTION, OURS, chunk_size, meta_inputs
from benchmarks.methods import DEVICE_METHODS, WITH_HARD, OurFloor, every_option, make_inputs
from benchmarks.recorder import Op, Touch, record
from benchmarks.roofline import GPUS, MODELS, PRODUCT_EFFICIENCY
from sdft_kernels.divergences import CROSS_ENTROPY, DIVERGENCES
from sdft_kernels.reference import reference_divergence
from tests.cases import relative_error

H100 = next(entry for entry in GPUS if entry.name == "H100")


def toy(seconds: float = 60) -> Settings:
    return Settings("cpu", True, time.monotonic() + seconds)


def first_case(monkeypatch: pytest.MonkeyPatch, *methods: str, **fields: Any) -> loss.Case:
    """The only case of the loss's stage: these methods in turns."""
    given: dict[str, Any] = {"tokens": 16, "trainable_head": True, "divergence": "reverse_kl", "blocks": (methods,)}
    case = loss.Case(TOYS[0], **{**given, **fields})
    monkeypatch.setattr(loss, "cases", lambda settings: iter([case]))
    return case


def check(rows: list[Row], stage: ModuleType) -> None:
    """All is flat, can be written as JSON and is finite, and the table has a line for each row or reason."""
    assert rows
    written = stage.table(rows)
    for row in rows:
        json.dumps(row, allow_nan=False)
        for key, value in row.items():
            assert value is None or isinstance(value, (str, int, float)), key
            if isinstance(value, float):
                assert math.isfinite(value) and (value > 0 or key.startswith("error")), (key, row)
        if "error" in row or "skipped" in row:
            assert (row.get("error") or row["skipped"]) in written
    timed = [row for row in rows if "ms" in row]
    lines = [line for line in written.splitlines() if line.startswith("| ")]
    assert timed and len(lines) == 1 + len([row for row in timed if row["case"] != "copy"])


@pytest.mark.parametrize("name", ["card", "parts", "scoring", pytest.param("loss", marks=pytest.mark.slow)])
def test_a_stage_measures_a_toy(name: str, tmp_path: Path) -> None:
    stage = importlib.import_module(f"benchmarks.gpu_report.{name}")
    rows = list(stage.run(toy()))
    check(rows, stage)
    # Peers may not be there; ours has to work.
    assert not [row for row in rows if "error" in row and not str(row.get("method")).startswith(("TRL", "Liger"))]
    if hasattr(stage, "draw"):
        stage.draw(rows, tmp_path / "new" / "plot.png")
        assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
        stage.draw([], tmp_path / "empty.png")
        assert not (tmp_path / "empty.png").exists()


@pytest.mark.parametrize("stage", [card, loss, parts, scoring])
def test_past_the_deadline_all_is_skipped(stage: ModuleType) -> None:
    rows = list(stage.run(toy(-1)))
    assert len(rows) > 3 and all(row["skipped"] for row in rows)
    assert rows[0]["case"] in stage.table(rows)


def test_a_block_begins_only_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card: the case has time when it begins, and none is left for its second block."""
    case = first_case(monkeypatch, blocks=((OURS,), ("plain torch",)))
    monkeypatch.setattr(loss, "in_turns", lambda *_: {OURS: loss.Taken(milliseconds=[1.0])})
    left = iter([100.0, 0.0])
    settings: Any = SimpleNamespace(device="cpu", toy=False, left=lambda: next(left))
    rows = list(
        loss.measure(
            settings, case, loss.Known(errors={(case.model.name, "reverse_kl", m): {} for m in (OURS, "plain torch")})
        )
    )
    assert [(row["method"], "skipped" in row) for row in rows] == [(OURS, False), ("plain torch", True)]


def test_what_breaks_is_told_and_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand much more")

    calls: list[int] = []

    def breaks_later(inputs: Any, divergence: str) -> torch.Tensor:
        calls.append(1)
        return breaks() if len(calls) > 3 else DEVICE_METHODS[OURS](inputs, divergence)

    monkeypatch.setitem(DEVICE_METHODS, "TRL", breaks)
    monkeypatch.setitem(DEVICE_METHODS, "Liger eager", breaks_later)
    first_case(monkeypatch, "TRL", OURS, "Liger eager", "plain torch")
    rows = [row for row in loss.run(toy()) if row.get("method") and "second_call_s" not in row]
    found = {row["method"]: row for row in rows}
    assert list(found) == ["TRL", OURS, "Liger eager", "plain torch"]
    assert found["TRL"]["error"] == found["Liger eager"]["error"] == "RuntimeError: no such kernel"
    assert found[OURS]["rounds"] == found["plain torch"]["rounds"] == loss.ROUNDS
    check(rows, loss)


def test_without_ours_and_a_floor_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setitem(DEVICE_METHODS, OURS, breaks)
    monkeypatch.setattr(loss, "ours", breaks)
    monkeypatch.setattr(OurFloor, "__call__", breaks)
    first_case(monkeypatch, blocks=(loss_cases.FLOORS, (OURS, "plain torch")))
    rows = {row.get("method"): row for row in loss.run(toy()) if row["case"].startswith("toy")}
    assert all(rows[name]["skipped"] == "OutOfMemoryError: no room" for name in loss_cases.FLOORS)
    assert rows[OURS]["error"] == "OutOfMemoryError: no room", "its ledger says that it fits"
    assert rows["plain torch"]["ms"] > 0 and rows["plain torch"]["ours_over_this"] is None


def test_a_case_that_breaks_is_a_row() -> None:
    def measure() -> Any:
        yield {"case": "fragile", "ms": 1.0}
        raise ValueError

    rows = list(guarded(toy(), "fragile", 0, measure))
    assert rows == [{"case": "fragile", "ms": 1.0}, {"case": "fragile", "error": "ValueError: "}]
    assert notes(rows).endswith("- fragile: ValueError: ") and notes(rows[:1]) == ""


@pytest.mark.parametrize(("ours", "told"), [(False, "skipped"), (True, "error")])
def test_memory_that_runs_out_is_an_error_of_ours_alone(ours: bool, told: str) -> None:
    def measure() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand much more")
        yield

    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB"
    assert list(guarded(toy(), "large", 0, measure, ours=ours)) == [{"case": "large", told: reason}]


def out_of_memory(*_: Any, **__: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("no room")


def test_a_peers_memory_that_runs_out_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first call or later; what measures beside it goes on, and the report is as it should be."""
    calls: list[int] = []

    def later(inputs: Any, divergence: str) -> torch.Tensor:
        calls.append(1)
        return out_of_memory() if len(calls) > 3 else DEVICE_METHODS[OURS](inputs, divergence)

    monkeypatch.setitem(DEVICE_METHODS, "TRL", out_of_memory)
    monkeypatch.setitem(DEVICE_METHODS, "Liger eager", later)
    case = first_case(monkeypatch, "TRL", OURS, "Liger eager")
    rows = [row for row in loss.run(toy()) if row["case"] == case.name]
    found = {row["method"]: row for row in rows}
    assert found["TRL"]["skipped"] == found["Liger eager"]["skipped"] == "OutOfMemoryError: no room"
    assert found[OURS]["ms"] > 0
    assert report.problems({"loss": Outcome("done", None, 1.0, 2.0, rows)}) == []
    check(rows, loss)


def test_what_the_ledger_says_is_too_large_is_skipped_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "free_bytes", lambda device: 10)
    case = first_case(monkeypatch, OURS, "plain torch")
    rows = [row for row in loss.run(toy()) if row["case"] == case.name]
    assert [row["skipped"] for row in rows] == ["DoesNotFit: it needs about 0.0 GiB, and 0.0 are free"] * 2


def test_plain_torch_without_room_for_scores_is_skipped_and_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = dict.fromkeys((scoring.OURS, scoring.LOGITS, scoring.PLAIN), out_of_memory)
    monkeypatch.setattr(scoring, "scores", lambda inputs, device: methods)
    rows = list(scoring.measure(toy(), "scores", TOYS[0], "scores"))
    assert ["error" in row for row in rows] == [True, False, False]
    assert all(row["skipped"] == "OutOfMemoryError: no room" for row in rows[1:])


def test_a_case_measured_again_has_rows_and_bars_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other methods: the first row is not lost under the last."""
    case: Row = {"case": "a", "model": "m", "tokens": 16, "head": "trainable", "divergence": "reverse_kl"}
    frozen = {**case, "case": "b", "head": "frozen"}
    methods = [*loss_cases.FLOORS, OURS, "TRL", OURS, EVERY_OPTION, OURS, "Liger compiled"]
    rows = [{**case, "method": method, "ms": 1.0 + n} for n, method in enumerate(methods)]
    rows += [{**frozen, "method": OURS, "ms": 1.0}]
    assert [number for number, _ in loss.comparisons(rows)] == [1, 1, 1, 1, 2, 2, 3, 3, 1]
    assert "| m | 16 | trainable | reverse_kl | 3 | sdft-kernels | 7.000 |" in loss.table(rows)
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "bars", lambda axis, groups, heights: drawn.append((groups, heights)))
    loss.draw(rows, tmp_path / "loss.png")
    assert drawn[0][0] == ["m", "m\n(2)", "m\n(3)"] and drawn[1][0] == ["m"]
    assert drawn[0][1][OURS] == {"m": 3.0, "m\n(2)": 5.0, "m\n(3)": 7.0}
    assert drawn[0][1]["TRL"] == {"m": 4.0} and drawn[0][1]["Liger compiled"] == {"m\n(3)": 8.0}


def test_the_errors_name_the_tokens_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    case = first_case(monkeypatch, OURS)
    rows = [row for row in loss.run(toy()) if row["case"] == case.name]
    assert f"against float64, with {loss_cases.TOY_FEW} tokens" in loss.table(rows)
    assert "with 1024 tokens" in loss.table([{**rows[0], "errors_tokens": loss_cases.FEW}])


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_sentence_stands_above_every_table(stage: Stage) -> None:
    row = {"case": "a", "outcome": "passed", "seconds": 1.0, "message": ""} if stage.name == "correctness" else None
    before = ""
    lines = stage.module().table([row] if row else []).splitlines()
    assert any(line.startswith("|---") for line in lines)
    for number, line in enumerate(lines):
        if line.startswith("|") and not lines[number - 1].startswith("|"):
            before = lines[number - 2]
            assert lines[number - 1] == "" and before.endswith(".") and len(before) > 60


def test_errors_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is as exact as bfloat16 gradients are; one that returns another loss is not."""
    monkeypatch.setitem(DEVICE_METHODS, "TRL", lambda inputs, _: DEVICE_METHODS[OURS](inputs, "forward_kl"))
    case = first_case(monkeypatch, OURS, "TRL", EVERY_OPTION)
    rows = {row["method"]: row for row in loss.run(toy()) if row["case"] == case.name}
    for method in (OURS, EVERY_OPTION):
        assert rows[method]["error_loss"] < 1e-5
        assert rows[method]["error_hidden"] < 5e-3 and rows[method]["error_weight"] < 5e-3
    assert rows["TRL"]["error_loss"] > 1e-2 and rows["TRL"]["error_hidden"] > 1e-1


@pytest.mark.parametrize("with_options", [False, True])
def test_the_reference_is_the_same_in_parts(with_options: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_errors, "ERROR_ROWS", 5)
    inputs = make_inputs(TOYS[0].at(12), trainable_head=True, dtype=torch.bfloat16)
    options = every_option(inputs) if with_options else {}
    found = loss_errors.reference(inputs, "jsd", options)
    hidden = inputs.student_hidden.detach().double().requires_grad_()
    weight = inputs.student_weight.detach().double().requires_grad_()
    teacher = inputs.teacher_hidden.double()
    expected = reference_divergence(hidden, weight, teacher, weight.detach(), divergence="jsd", **options).loss
    expected.backward()
    for actual, wanted in zip(found, (expected.detach(), hidden.grad, weight.grad), strict=True):
        assert wanted is not None and relative_error(actual, wanted) < 1e-9


@pytest.mark.parametrize("trainable", [True, False])
def test_the_floor_is_the_bare_products(trainable: bool) -> None:
    """Of all tokens at once, and in the chunks of ours."""
    shape = MODELS["Llama-3.1-8B"].at(8192)
    for whole in (True, False):
        inputs = meta_inputs(shape, trainable_head=trainable)
        noted = record(lambda inputs=inputs, whole=whole: OurFloor(inputs, whole=whole)(inputs, ""), {}, {})
        ops = [op for op in noted.ops if op.flops]
        units = 4 if trainable else 3
        assert sum(op.flops for op in ops) == units * 2 * shape.tokens * shape.hidden * shape.vocab
        assert (len(ops) == units) == whole


def test_peers_take_turns_at_what_they_offer() -> None:
    real = Settings("cuda", False, time.monotonic())
    found = list(loss.cases(real))
    assert [(case.model.name, case.tokens, case.head) for case in found[:5]] == [
        ("Llama-3.1-8B", 8192, "trainable"),
        ("Llama-3.1-8B", 8192, "frozen"),
        ("Llama-3.1-8B", 16_384, "trainable"),
        ("Llama-3.1-8B", 16_384, "frozen"),
        ("Qwen2.5-7B", 8192, "trainable"),
    ]
    assert all(case.guess(case.blocks[-1]) < 15 for case in found[2:4]), (
        "what is compiled later keeps none from running"
    )
    assert {case.divergence for case in found} == {*DIVERGENCES, CROSS_ENTROPY, WITH_HARD}
    for case in found:
        methods = [name for block in case.blocks for name in block]
        assert OURS in methods and len(set(methods)) == len(methods)
        if case.divergence.startswith("skew"):
            assert methods == [OURS]
        assert (loss_cases.SOFTCAP in methods) == (case.model.name == "Gemma-2-9B")
    compiled = [any(name in loss_cases.COMPILED for block in case.blocks for name in block) for case in found]
    assert compiled == sorted(compiled) and sum(compiled) == 3
    assert all(case.guess(case.blocks[-1]) >= loss_cases.COMPILE_SECONDS for case in found[-3:])


def test_a_peer_that_is_not_here_is_skipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("trl", "liger_kernel"):
        monkeypatch.setitem(sys.modules, package, None)
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
    found: list[loss.Case] = []

    def measure(settings: Settings, case: loss.Case, known: loss.Known) -> Any:
        found.append(case)
        yield {"case": case.name}

    monkeypatch.setattr(loss, "measure", measure)
    monkeypatch.setattr(loss, "first_call", lambda settings: iter(()))
    real = Settings("cuda", False, time.monotonic() + 1e6)
    rows = list(loss.run(real))
    assert [row["case"] for row in rows if "skipped" in row] == ["TRL", "Liger", "Liger CuTe"]
    assert not [row for row in rows if "error" in row]
    methods = {name for case in found for block in case.blocks for name in block}
    assert methods == {*loss.IS_OURS, loss_cases.PLAIN, *loss_cases.FLOORS}
    assert len(found) == len(list(loss.cases(real))) - 3, "no case is only about a compiled peer"


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_chunk_has_the_ledgers_launches(model: Any, divergence: str) -> None:
    chunk = parts.chunk_of(model, 8192, divergence)
    shape = model.at(8192)
    row_kernels = [op.name.rpartition(".")[2] for op in chunk.ops if not op.flops]
    mixture = ["mixture_kernel"] if divergence == "jsd" else []
    assert row_kernels == ["partials_kernel", *mixture, "combine_kernel", "gradient_kernel"]
    assert [bool(op.flops) for op in chunk.ops] == [True] * 2 + [False] * len(row_kernels) + [True] * 2
    of_a_token = 2 * shape.hidden * shape.vocab
    flops = [op.flops // of_a_token for op in chunk.ops if op.flops]
    assert flops == [chunk.block] * 2 + [chunk.tokens] * 2
    assert chunk.block == chunk_size(OURS, shape, trainable_head=True) < chunk.tokens <= 8192
    # The second chunk adds to the head's gradient; the first, or the only one, writes it alone.
    added_to = (shape.vocab, shape.hidden)
    assert (added_to in [touch.shape for touch in chunk.ops[-1].reads]) == (not chunk.alone)


@pytest.mark.parametrize(
    ("op", "ms", "words"),
    [
        (Op("mm", flops=10**12), 1e3 / (PRODUCT_EFFICIENCY * 989), "as predicted"),
        (
            Op("mm", flops=10**12),
            2.0,
            "the product reaches 500 TFLOP/s where 692 were assumed; with a bfloat16 result 625",
        ),
        (Op("mm", flops=10**12), 2.0, "; a large square one 700; memory at 0.00 of 3.35 TB/s"),
        (Op("mm", flops=10**12), 1.0, "faster: the product reaches 1000 TFLOP/s"),
        (Op("k", (Touch(0, (1,), 2 * 10**9),)), 1.0, "reads and writes, at 2.00 of 3.35 TB/s"),
        (
            Op("mm", (Touch(0, (1,), 2 * 10**9),), flops=10**9),
            1.0,
            "the product waits for memory, at 2.00 of 3.35 TB/s",
        ),
        (Op("k", (Touch(0, (1,), 10),)), 0.012, "a launch of 12 µs, where 3 were assumed"),
    ],
)
def test_a_part_that_is_off_is_explained(op: Op, ms: float, words: str) -> None:
    other = 1.6 if op.flops else None
    row = parts.row_of(parts.Part("part", lambda: None), op, ms, other, H100, [700.0])
    assert words in row["diagnosis"]
    assert "predicted_ms" not in parts.row_of(parts.Part("part", lambda: None), op, ms, other, None, [])


@pytest.mark.parametrize(
    ("name", "gib", "entry"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "A100"),
        ("NVIDIA A100-SXM4-40GB", 40, None),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA H100 PCIe", 80, None),
        ("NVIDIA H100 NVL", 94, None),
        ("NVIDIA H200", 141, "H200"),
        ("NVIDIA GH200 480GB", 96, None),
        ("NVIDIA B200", 180, "B200"),
        ("NVIDIA GeForce RTX 4090", 24, None),
    ],
)
def test_a_prediction_stands_beside_the_gpu_that_it_is_of_alone(
    name: str, gib: int, entry: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=gib * 2**30))
    found = gpu.this_gpu()
    assert (found and found.name) == entry
