"""Two processes with half of the batch each give what one process gives with all of it: DDP and FSDP2, over gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import process_worker, tiny
from tests.waiting import patience

TRAININGS = [
    *process_worker.CASES,
    *(f"{case} resumed" for case in process_worker.RESUMED),
    "stopped",
    "stopped resumed",
]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    process_worker.main(folder)
    return folder


def in_two_processes(folder, command, environment):
    """Run a script or module with arguments in two processes; what they print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FSDP")}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, *command],
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module", params=["DDP", "FSDP2"])
def two_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    worker = str(ROOT / "tests" / "process_worker.py")
    in_two_processes(folder, [worker, str(folder)], {"FSDP": "1"} if request.param == "FSDP2" else {})
    wrapped = "DistributedDataParallel" if request.param == "DDP" else "FSDPModule"
    for process in (0, 1):
        assert wrapped in json.loads((folder / "base" / f"wrapped-{process}.json").read_text())
    return folder


def weights(folder):
    """What a training saved: the model's weights, or the adapter's."""
    (saved,) = folder.glob("*model.safetensors")
    return load_file(saved)


def assert_close(got, expected):
    """Equal to 1e-5 of the norm of each tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAININGS)
def test_two_processes_train_as_one_does(case, one_process, two_processes):
    one, two = one_process / case, two_processes / case
    expected, history = (json.loads((folder / "history.json").read_text()) for folder in (one, two))
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=1e-5), name
    assert_close(weights(two), weights(one))
    if (one / "average.safetensors").exists():
        assert_close(load_file(two / "average.safetensors"), load_file(one / "average.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["base", "sft", "frozen embeddings"])
def test_the_model_that_two_processes_save_loads_with_from_pretrained(case, two_processes):
    saved = load_file(two_processes / case / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(two_processes / case)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (case == "frozen embeddings")


@pytest.mark.slow
@pytest.mark.parametrize("case", [*process_worker.RESUMED, "stopped"])
def test_two_processes_that_resume_end_with_the_weights_of_those_that_did_not(case, two_processes):
    """Also where SIGTERM to one of the two ended training in both."""
    uninterrupted = "average" if case == "stopped" else case
    straight, resumed = (weights(two_processes / c) for c in (uninterrupted, f"{case} resumed"))
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.slow
def test_the_best_model_is_saved_and_measured_by_every_process(two_processes):
    """Not the last one, also where checkpoints are in pieces."""
    measured = json.loads((two_processes / "best" / "history.json").read_text())["measured"]
    states = [json.loads(path.read_text()) for path in sorted((two_processes / "best").glob("*/trainer_state.json"))]
    assert [state["best_global_step"] for state in states] == [2, 2]
    assert {Path(state["best_model_checkpoint"]).name for state in states} == {"checkpoint-2"}
    assert states[-1]["best_metric"] in [pytest.approx(value, rel=1e-5) for value in measured]


@pytest.mark.slow
def test_processes_had_unequal_numbers_of_tokens_and_sometimes_none(two_processes):
    """What makes the comparison above one: a mean of the processes' own means would not pass it."""

    def tokens(case, process, skip):
        steps = json.loads((two_processes / case / f"lengths-{process}.json").read_text())
        return [sum(max(length - skip, 0) for length in step) for step in steps]

    assert all(a != b for a, b in zip(tokens("base", 0, 0), tokens("base", 1, 0), strict=True))
    pairs = list(zip(tokens("mostly skipped", 0, 2), tokens("mostly skipped", 1, 2), strict=True))
    assert any((a == 0) != (b == 0) for a, b in pairs)


@pytest.mark.slow
def test_the_command_gives_in_two_processes_what_it_gives_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.tiny_model(max_position_embeddings=512).save_pretrained("model")
    tiny.tiny_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    recipe = {
        "model": "model",
        "train_file": "rows.jsonl",
        "eval_file": "rows.jsonl",
        "general_file": "rows.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 4,
        "max_completion_length": 6,
        "eval_completion_length": 6,
        "learning_rate": "1e-3",
        "log_completions": 2,
        "save_strategy": "no",
        "use_cpu": True,
    }
    for processes in (1, 2):
        name = f"{processes}.yaml"
        own = {"output_dir": f"out{processes}", "per_device_train_batch_size": 4 // processes}
        Path(name).write_text(yaml.safe_dump({**recipe, **own}))
        command = ["-m", "sdft.cli", "train", name]
        if processes == 2:
            printed = in_two_processes(tmp_path, command, {})
        else:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], env=environment, capture_output=True, check=True)
    one, two = (Path(f"out{processes}") for processes in (1, 2))
    assert_close(weights(two), weights(one))
    measured = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for name, value in measured[0].items():
        if not name.endswith(("seconds", "per_second", "_mib")):
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, int | float) else value
            assert measured[1][name] == expected, name
    steps = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)
    ]
    assert [line["step"] for line in steps[1]] == [line["step"] for line in steps[0]]
    answers = [(folder / "completions.jsonl").read_text().splitlines() for folder in (one, two)]
    assert len(answers[0]) == len(answers[1]) == 8
    assert printed.count("has the trained model") == 1, "one process reports"
