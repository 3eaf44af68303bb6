"""Rollouts by a vLLM server, with a stand-in for it that has the workers' own class.

tests/with_vllm has the server itself.
"""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sdft import SDFTConfig, _compat
from sdft.cli import main
from sdft.errors import TrainingError, UsageError
from sdft.launch import check_launch
from sdft.rollouts import server as by_server
from sdft.rollouts import server_calls
from sdft.rollouts.generate import write
from sdft.rollouts.interface import Request, Sampling
from sdft.rollouts.server import ServerRollouts
from tests import tiny
from tests.test_sdft_trainer import trained, trainer

PROBE = [10, 11, 12]


class StandIn:
    """A server, of as much as is used of it: a model of its own, which transformers' `generate` samples."""

    def __init__(self, worker_class, **described):
        self.worker_class, self.described = worker_class, {"logprobs_mode": "processed_logprobs", **described}
        self.asked, self.loads, self.fails, self.lock = [], [], [], threading.Lock()
        self.begin()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"data": [{"id": "served"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in.lock:
                    code, answer = stand_in.answer(self.path, body)
                self.reply(code, answer)

            def reply(self, code, answer):
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def begin(self):
        """Start with weights that are nobody's."""
        with torch.random.fork_rng():
            self.model = tiny.tiny_model(seed=7)
        self.model.load_weights = self.load
        self.worker = self.worker_class()
        if self.worker_class is not SimpleNamespace:  # without methods
            self.worker.get_model = lambda: self.model
            known = {"get_vocab_size": lambda: 101, "max_model_len": 60, "dtype": torch.float32, **self.described}
            self.worker.model_config = SimpleNamespace(**known)

    def load(self, weights):
        weights = dict(weights)
        self.loads.append(len(weights))
        self.model.load_state_dict(weights, strict=False)
        return set(weights)

    def answer(self, path, body):
        self.asked.append((path, body))
        if self.fails and self.fails[0][0] in (path, body.get("method")):
            return self.fails.pop(0)[1]()
        if path == "/collective_rpc":
            try:
                return 200, {"results": [getattr(self.worker, body["method"])(*body["args"])]}
            except AttributeError as error:
                return 500, {"error": {"message": f"Worker failed with error {error}"}}
        drawn = body["temperature"] or None
        sampling = Sampling(body["max_tokens"], frozenset(body["stop_token_ids"]), drawn, logprobs=True)
        (written,) = write(self.model, [Request(body["prompt"], body["seed"])], sampling)
        logprobs = None if body["logprobs"] is None else {"token_logprobs": written.logprobs}
        return 200, {"choices": [{"token_ids": written.tokens, "logprobs": logprobs}]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(by_server, "PAUSE", 0.0)
    monkeypatch.setattr(by_server, "PATIENCE", 20.0)


@pytest.fixture
def worker_class(monkeypatch):
    """The class that vLLM's workers are given, with a stand-in for what it imports of vLLM."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(_compat, "keep_vllm_from_packing_weights", lambda: None)
    monkeypatch.delitem(sys.modules, "sdft.rollouts.vllm_worker", raising=False)
    from sdft.rollouts.vllm_worker import StudentWeights

    return StudentWeights


@pytest.fixture
def stand_in(worker_class):
    made = StandIn(worker_class)
    yield made
    made.http.shutdown()
    made.http.server_close()


def losses(folder, **options):
    history = trained(folder, rollout_correction="none", **options).state.log_history
    return [line["loss"] for line in history if "loss" in line]


def test_training_with_it_is_training_with_generate_and_weights_come_again_when_it_restarts(tmp_path, stand_in):
    """The stand-in draws as `generate` does, so that the two would part where it had other weights than the student."""
    ours = losses(tmp_path / "generate")
    options = {"rollout_backend": "vllm", "rollout_server": f"{stand_in.url}/"}
    assert losses(tmp_path / "server", **options) == pytest.approx(ours, abs=1e-6) and len(set(ours)) == 4
    assert len(stand_in.loads) == 1 + 4
    salts = [body["cache_salt"] for path, body in stand_in.asked if path == "/v1/completions"]
    assert len(set(salts)) == 1 + 4

    def again():
        stand_in.begin()
        return 503, {"error": {"message": "starting"}}

    def in_the_middle():
        stand_in.begin()
        return stand_in.answer("/v1/completions", stand_in.asked[-1][1])

    stand_in.fails += [("/v1/completions", then) for then in (again, again, in_the_middle)]
    assert losses(tmp_path / "restarts", **options) == pytest.approx(ours, abs=1e-6)
    assert not stand_in.fails and len(stand_in.loads) > 2 * (1 + 4)


def test_a_request_is_told_in_its_words_and_the_probabilities_come_back(stand_in):
    model = tiny.tiny_model()
    served = ServerRollouts(stand_in.url, model, longest=40, probe=PROBE)
    sampling = Sampling(7, frozenset({5, 1}), 0.7, 0.8, 9, 0.1, ("ab",), logprobs=True)
    (written,) = served.answer(model, [Request([3, 4], seed=2**62)], sampling)
    body = [body for path, body in stand_in.asked if path == "/v1/completions"][-1]
    said = {"prompt": [3, 4], "max_tokens": 7, "temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.1}
    assert body.items() >= (said | {"seed": 2**62, "ignore_eos": True, "logprobs": 0}).items()
    assert body["stop_token_ids"] == [1, 5] and len(written.logprobs) == len(written.tokens)
    one, other = served.answer(model, [Request([3])] * 2, Sampling(9, temperature=1.0))
    assert one.tokens != other.tokens and one.logprobs is None


def test_an_adapter_is_merged_into_what_is_written_in_files_of_some_size(stand_in, monkeypatch):
    monkeypatch.setattr(by_server, "FILE", 10_000)
    learner = get_peft_model(tiny.tiny_model(), LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    served = ServerRollouts(stand_in.url, learner.get_base_model(), longest=40, probe=PROBE)  # whose check compares
    (folder,) = served._weights.parent.iterdir()
    assert len(list(folder.iterdir())) > 3
    with served.serving(learner.get_base_model()):
        pass
    assert len(list(folder.parent.iterdir())) == 1


def test_weights_that_do_not_reach_a_layer_are_found(stand_in):
    model, other = tiny.tiny_model(), tiny.tiny_model(seed=1)
    served = ServerRollouts(stand_in.url, model, longest=40, probe=PROBE)
    load = stand_in.load
    stand_in.model.load_weights = lambda weights: load((n, w) for n, w in weights if "up_proj" not in n)
    with pytest.raises(UsageError, match=r"cannot load the student's weights: .* not model.layers.0.mlp.up_proj"):
        served.push(other)
    stand_in.model.load_weights = lambda weights: {name for name, _ in weights}
    served.push(other)
    with pytest.raises(TrainingError, match="vLLM draws tokens with other log-probabilities than LlamaForCausalLM has"):
        served.check(other)


def test_it_is_waited_for_so_long_and_it_serves_one_run(stand_in, monkeypatch, caplog):
    model = tiny.tiny_model()
    served = ServerRollouts(stand_in.url, model, longest=40, probe=PROBE)
    stand_in.worker.student_version = "another-1"
    with pytest.raises(TrainingError, match="was given weights by another run meanwhile; it must serve one"):
        served.answer(model, [Request([3])], Sampling(2))
    stand_in.http.shutdown()
    stand_in.http.server_close()
    monkeypatch.setattr(by_server, "PATIENCE", 0.0)
    with pytest.raises(TrainingError, match=r"which has been away for 0 seconds: .*refused"):
        served.answer(model, [Request([3])], Sampling(2))
    assert "waiting for it, up to 0 seconds" in caplog.text


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"get_vocab_size": lambda: 99}, "serves a model of 99 tokens, and LlamaForCausalLM has 101"),
        ({"max_model_len": 39}, "takes 39 tokens, and the longest prompt has 40 .*; --max-model-len 40 would do"),
        ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs; start it with --logprobs-mode processed_logprobs"),
    ],
    ids=["vocabulary", "length", "log-probs"],
)
def test_a_server_for_other_models_is_refused(worker_class, described, said):
    made = StandIn(worker_class, **described)
    with pytest.raises(UsageError, match=f"^rollout_server is '{made.url}', which {said}"):
        ServerRollouts(made.url, tiny.tiny_model(), longest=40, probe=PROBE)
    made.http.shutdown()
    made.http.server_close()


def test_a_server_that_gives_no_probabilities_or_refuses_is_refused(stand_in):
    stand_in.fails.append(("/v1/completions", lambda: (200, {"choices": [{"token_ids": [3], "logprobs": None}]})))
    with pytest.raises(UsageError, match="which gives no log-probabilities with its completions"):
        ServerRollouts(stand_in.url, tiny.tiny_model(), longest=40, probe=PROBE)
    stand_in.fails.append(("/v1/completions", lambda: (400, {"error": {"message": "no\nsuch model"}})))
    with pytest.raises(UsageError, match=r"which refuses a request: 400 no such model$"):
        ServerRollouts(stand_in.url, tiny.tiny_model(), longest=40, probe=PROBE)


def test_what_is_not_there_or_takes_no_weights_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    made = StandIn(SimpleNamespace)
    said = f"rollout_server is '{made.url}', which"
    with pytest.raises(UsageError, match=f"{said} takes no weights; it must be started by VLLM_SERVER_DEV_MODE=1 vllm"):
        server_calls.describe(made.url)
    made.fails.append(("/collective_rpc", lambda: (404, {"detail": "Not Found"})))
    with pytest.raises(UsageError, match=f"{said} takes no weights"):
        server_calls.describe(made.url)
    made.http.shutdown()
    made.http.server_close()
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "demonstration": "b"}\n')
    words = ["--model", str(tmp_path), "--train_file", str(data), "--rollout_backend", "vllm"]
    (tmp_path / "config.json").write_text("{}")
    assert main(["train", *words, "--rollout_server", made.url, "--output_dir", str(tmp_path / "o")]) == 2
    assert f"--rollout_server is '{made.url}', which does not answer: " in capsys.readouterr().err
    with pytest.raises(UsageError, match="rollout_server is 'localhost:8000'; it must be a URL that begins with http"):
        SDFTConfig(output_dir=str(tmp_path / "o"), rollout_server="localhost:8000")


def test_of_several_processes_the_first_pushes_and_each_answers(stand_in, monkeypatch):
    """Two threads in place of processes; `sdft.processes`, which they stand in for, has tests with real ones."""
    barrier, of, values = threading.Barrier(2, timeout=20), threading.local(), []

    def of_first(value):
        if of.number == 0:
            values.append(value)
        barrier.wait()
        return values[-1]

    monkeypatch.setattr(by_server, "is_first", lambda: of.number == 0)
    monkeypatch.setattr(by_server, "of_first", of_first)
    monkeypatch.setattr(by_server, "wait_for_all", barrier.wait)

    def process(number):
        of.number = number
        model = tiny_models[number]
        served = ServerRollouts(stand_in.url, model, longest=40, probe=PROBE)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        with served.serving(model) as backend:
            if number == 1:
                stand_in.begin()  # by its weights of no meaning nobody may have answers
            barrier.wait()
            return write(model, [Request([3, number], seed=number)], Sampling(9, temperature=1.0), backend=backend)

    tiny_models = [tiny.tiny_model() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(process, range(2)))
    for number, ours in enumerate(written):
        assert ours == write(tiny_models[0], [Request([3, number], seed=number)], Sampling(9, temperature=1.0))
    assert 3 <= len(stand_in.loads) <= 4  # two pushes, and what was lost


def test_under_fsdp_another_back_end_is_asked_for(tmp_path):
    run = trainer(tmp_path / "run")
    run.args.rollout_backend, run.args.rollout_server, run.is_fsdp_enabled = "vllm", "http://localhost:1", True
    with pytest.raises(
        UsageError, match=r"and the run is under FSDP; it must be generate, for vLLM serves one process$"
    ):
        check_launch(run)


# Evaluation and the commands


def test_answers_of_an_evaluation_are_written_by_what_writes_the_rollouts(tmp_path, stand_in):
    """The stand-in draws as `generate` does; a prompt that is longer than it was asked for is left to that."""
    options = {"eval_dataset": tiny.rows(), "eval_strategy": "steps", "eval_temperature": 1.0, "eval_samples": 2}
    served = {"rollout_backend": "vllm", "rollout_server": stand_in.url, "rollout_correction": "none"}
    ways = {"generate": {}, "continuous": {"rollout_backend": "continuous"}, "server": served}
    runs = {way: trainer(tmp_path / way, eval_completion_length=8, **options, **of) for way, of in ways.items()}
    measured = {way: run.evaluate()["eval_accuracy"] for way, run in runs.items()}
    assert measured["generate"] == measured["continuous"] == measured["server"]
    answered = [body["max_tokens"] for path, body in stand_in.asked if path == "/v1/completions"]
    assert answered.count(8) == 16 + 2  # with those of the comparison
    runs["server"].evaluate([{"prompt": "a" * 50, "answer": "b"}])
    assert len([path for path, _ in stand_in.asked if path == "/v1/completions"]) == len(answered)


def test_eval_and_generate_take_the_same_back_ends(tmp_path, stand_in, capsys, caplog):
    stand_in.described["max_model_len"] = 200
    stand_in.begin()
    model = tiny.saved(tmp_path / "model", tiny.tiny_model())
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(2)))
    ways = {"generate": (), "continuous": ("--rollout_backend", "continuous")}
    ways["server"] = ("--rollout_backend", "vllm", "--rollout_server", stand_in.url)
    sampled = ("--eval_temperature", "1", "--eval_samples", "2", "--eval_completion_length", "9")
    said, scores = {}, {}
    for way, words in ways.items():
        files = ("--output_file", str(tmp_path / f"{way}.jsonl"))
        assert main(["eval", "--model", model, "--eval_file", str(data), *sampled, *files, *words]) == 0
        scores[way] = (tmp_path / f"{way}.jsonl").read_text()
        capsys.readouterr()
        assert main(["generate", "--model", model, "--prompt", "say a", "--max_completion_length", "20", *words]) == 0
        said[way] = capsys.readouterr().out
    assert scores["generate"] == scores["continuous"] == scores["server"] and scores["generate"].count("\n") == 4
    assert said["generate"] == said["continuous"] == said["server"]
    assert {body["max_tokens"] for path, body in stand_in.asked if path == "/v1/completions"} == {9, 20}
    assert main(["generate", "--model", model, "--prompt", "a", "--rollout_backend", "sglang"]) == 2
    assert "--rollout_backend is 'sglang'; it may be generate, continuous or vllm" in capsys.readouterr().err
    assert main(["eval", "--model", model, "--eval_file", str(data), "--rollout_server", "http://localhost:1"]) == 0
    assert "rollout_server is 'http://localhost:1' and does nothing: rollout_backend is 'generate'" in caplog.text
