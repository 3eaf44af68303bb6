"""`rows_on_disk`: rows in a file, of which memory holds one number each, and a run that is the same to the last bit."""

import bz2
import functools
import json
import tracemalloc

import pytest

from sdft import SDFTConfig, SDFTTrainer
from sdft.cli import main
from sdft.data import Limits, encode_rows, load_rows
from sdft.data.encode import Places
from sdft.data.storage import StoredRows, on_disk
from sdft.errors import UsageError
from sdft.templates import parse_template
from tests import tiny

ROWS = [{"prompt": f"say {n}", "demonstration": "é" * n or "-"} for n in range(7)]


def test_rows_come_back_as_they_were_by_place_by_slice_and_one_by_one(tmp_path):
    stored = StoredRows(ROWS, str(tmp_path))
    assert list(stored) == list(stored) == ROWS  # as often as they are asked for
    assert (len(stored), stored[0], stored[-1], stored[1:5:2]) == (7, ROWS[0], ROWS[-1], ROWS[1:5:2])
    stored[0]["prompt"] = "changed"
    assert stored[0] == ROWS[0]
    for beyond in (7, -8):
        with pytest.raises(IndexError):
            stored[beyond]
    assert not StoredRows([], str(tmp_path))
    assert not any(tmp_path.iterdir())  # no name that a killed run could leave behind


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mine.jsonl", "\n\n".join(map(json.dumps, ROWS))),
        ("mine.json", json.dumps(ROWS, indent=1)),
        ("mine.csv", "prompt,demonstration\na,b\nc,d\n"),
        ("others.csv", "Question,Answer\na,b\nc,d\n"),
    ],
)
@pytest.mark.parametrize("columns", [None, {"prompt": "demonstration", "demonstration": "prompt"}])
def test_a_file_is_read_to_disk_as_it_is_to_memory(tmp_path, name, text, columns):
    (tmp_path / name).write_text(text, encoding="utf-8")
    source, given = str(tmp_path / name), {"columns": None if name == "others.csv" else columns}
    in_memory, stored = load_rows(source, **given), load_rows(source, **given, keep=on_disk(str(tmp_path)))
    assert isinstance(in_memory, list) and isinstance(stored, StoredRows)
    assert list(stored) == in_memory and len(stored) > 1
    weights = {source: 2.5}
    mixed = load_rows(weights, **given, seed=3, keep=on_disk(str(tmp_path)))
    assert list(mixed) == load_rows(weights, **given, seed=3)
    assert list(load_rows([source] * 2, **given, keep=on_disk(str(tmp_path)))) == in_memory * 2


@pytest.mark.parametrize("text", ['{"prompt": "a"}', '{"prompt": "a", "demonstration": "b"}\n{"prompt": 1}', "[1", ""])
def test_what_is_wrong_with_a_file_is_said_as_in_memory(tmp_path, text):
    (tmp_path / "mine.jsonl").write_text(text)
    said = []
    for keep in (list, on_disk(str(tmp_path))):
        with pytest.raises(UsageError) as error:
            load_rows(str(tmp_path / "mine.jsonl"), keep=keep)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_rows_lie_beside_the_run_or_where_it_will_be(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("sdft.data.storage.StoredRows", lambda rows, folder: made.append(folder))
    on_disk(str(tmp_path))([])
    on_disk(str(tmp_path / "runs" / "mine"))([])
    monkeypatch.chdir(tmp_path)
    on_disk("runs/mine")([])
    assert made == [str(tmp_path)] * 3
    assert not any(tmp_path.iterdir())


class Unwritten:
    def __reduce__(self):
        raise ValueError("a client of a server")


def test_what_a_source_fails_at_is_not_the_disks_fault(tmp_path):
    """A picture that is missing, or a damaged file: what is said is what memory would say."""

    class Pictures:
        def __len__(self):
            return 1

        def __iter__(self):
            yield (tmp_path / "nowhere.png").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        load_rows(Pictures(), keep=on_disk(str(tmp_path)))
    damaged = bytearray(bz2.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "mine.jsonl.bz2").write_bytes(bytes(damaged))
    for keep in (list, on_disk(str(tmp_path))):
        with pytest.raises(UsageError, match=r"mine\.jsonl\.bz2 cannot be unpacked: "):
            load_rows(str(tmp_path / "mine.jsonl.bz2"), keep=keep)


def test_a_file_is_closed_with_its_rows(tmp_path):
    stored = StoredRows(ROWS, str(tmp_path))
    file = stored._file
    del stored
    assert file.closed


def test_a_disk_that_cannot_be_written_and_a_row_that_cannot_be_are_told(tmp_path):
    with pytest.raises(UsageError, match=r"rows_on_disk is True, and rows cannot be written in .*nowhere: "):
        StoredRows(ROWS, str(tmp_path / "nowhere"))
    deep = functools.reduce(lambda inner, _: {"a": inner}, range(5000), {})
    for value in (lambda: 1, deep, Unwritten()):
        with pytest.raises(UsageError, match="rows_on_disk is True, and row 2 cannot be written to a file: "):
            StoredRows([ROWS[0], {**ROWS[0], "judge": value}], str(tmp_path))
    with pytest.raises(UsageError, match="rows_on_disk is True and dataloader_num_workers 2; it must be 0"):
        SDFTConfig(rows_on_disk=True, dataloader_num_workers=2)


def peak_of(file, keep):
    """The most bytes that Python has taken while a file is read and encoded."""
    tracemalloc.start()
    rows = load_rows(str(file), keep=keep)
    settings = {"method": "sdft", "eos_ids": frozenset({1}), "max_completion_length": 4, "limits": Limits()}
    rows = encode_rows(rows, tiny.tiny_tokenizer(), template=parse_template("turn"), keep=keep, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows[len(rows) - 1]["prompt_ids"]) > 100
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    grown = {}
    for name, keep in (("disk", on_disk(str(tmp_path))), ("memory", list)):
        peaks = []
        for count in (200, 2000):
            file = tmp_path / f"{count}.jsonl"
            file.write_text("\n".join(json.dumps({"prompt": "ab " * 40, "demonstration": "b"}) for _ in range(count)))
            peaks.append(peak_of(file, keep))
        grown[name] = (peaks[1] - peaks[0]) / 1800
    assert grown["disk"] < 100 < 1000 < grown["memory"]  # bytes a row; on disk 8 at each stage


def test_rows_that_are_too_long_or_half_shown_take_no_memory_each(tmp_path):
    places = Places()
    for number in range(3):
        places.add(f"row {number}")
    assert (places.count, places.first) == (3, "row 0")


@pytest.mark.parametrize("shape", [{}, {"method": "sft"}, {"rollouts_per_prompt": 2, "feedback": "successes"}])
def test_training_is_the_same_to_the_last_bit(tmp_path, shape):
    losses = []
    for where in (False, True):
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 1} | shape
        settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "max_completion_length": 6}
        trainer = SDFTTrainer(
            tiny.tiny_model(),
            SDFTConfig(output_dir=str(tmp_path / str(where)), rows_on_disk=where, **settings),
            train_dataset=tiny.rows(5),
            processing_class=tiny.tiny_tokenizer(),
        )
        assert isinstance(trainer.train_dataset, StoredRows) == where
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_other_processes_are_refused_before_a_row_is_read(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(4))))
    model = tiny.saved(tmp_path / "model", tiny.tiny_model())
    monkeypatch.setattr("sdft.rows.load_rows", lambda *_, **__: pytest.fail("rows were read"))
    command = ["train", "--model", model, "--train_file", str(tmp_path / "mine.jsonl"), "--rows_on_disk", "true"]
    assert main([*command, "--dataloader_num_workers", "2"]) == 2
    assert "rows_on_disk is True and dataloader_num_workers 2; it must be 0" in capsys.readouterr().err


def test_the_command_takes_it_and_leaves_nothing_of_it(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(4))))
    model, out = tiny.saved(tmp_path / "model", tiny.tiny_model()), tmp_path / "run"
    command = ["train", "--model", model, "--train_file", str(tmp_path / "mine.jsonl"), "--output_dir", str(out)]
    assert main([*command, "--max_steps", "1", "--max_completion_length", "4", "--rows_on_disk", "true"]) == 0
    assert not list(tmp_path.rglob("rows-*"))
