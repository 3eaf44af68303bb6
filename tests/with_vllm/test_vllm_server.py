"""Rollouts by a vLLM server: one, of a small model whose head is tied, which takes most of a minute to start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sdft.errors import TrainingError, UsageError
from sdft.rollouts import engine as engines
from sdft.rollouts import server as by_server
from sdft.rollouts.generate import write
from sdft.rollouts.server import ServerRollouts
from tests import tiny
from tests.with_vllm.test_vllm import (
    DRAWN,
    PROMPTS,
    assert_writes_as_generate,
    check_a_step_ahead,
    losses,
    model,
    moved,
    requests,
    tokens,
)

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--max-model-len",
    "60",
    "--dtype",
    "float32",
    "--enforce-eager",
    "--no-enable-chunked-prefill",
    "--kv-cache-memory-bytes",
    "50000000",
)
OURS = (
    *("--logprobs-mode", "processed_logprobs"),
    *("--worker-extension-cls", "sdft.rollouts.vllm_worker.StudentWeights"),
)
WITHIN = 120  # seconds


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    served = tiny.saved(folder / "model", model(seed=5, tied=True))  # other weights than any student's
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", served, "--port", str(port)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *OPTIONS, *OURS], env=environment, stdout=log, stderr=log, cwd=folder
        )
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + WITHIN
    try:
        while not _is_healthy(address):
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _is_healthy(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def served_by(url, learner):
    return ServerRollouts(url, learner, longest=60, probe=PROMPTS[0])


def test_after_each_update_it_writes_what_generate_writes(url):
    learner = model(tied=True)
    assert_writes_as_generate(served_by(url, learner), learner, updates=5)


def test_an_adapter_is_served(url):
    learner = get_peft_model(model(tied=True), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    served = served_by(url, learner.get_base_model())
    moved(learner, 0.2)
    assert_writes_as_generate(served, learner, updates=2)


def test_seeded_rollouts_do_not_depend_on_their_batch_and_say_with_which_probability_they_were_drawn(url):
    learner = model(tied=True)
    served = served_by(url, learner)
    together = write(learner, requests(seeds=True), DRAWN, backend=served.answer)
    alone = write(learner, requests(seeds=True)[::-1], DRAWN, backend=served.answer, batch_size=1)[::-1]
    assert tokens(alone) == tokens(together) != tokens(write(learner, requests(), DRAWN, backend=served.answer))
    for prompt, completion in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logprobs = learner(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), own, atol=1e-3, rtol=0)


def test_weights_that_were_not_pushed_are_found(url, monkeypatch):
    learner = model(tied=True)
    served = served_by(url, learner)
    whole = engines.weights_of
    stale = dict(whole(model(tied=True)))
    monkeypatch.setattr(
        by_server, "weights_of", lambda of: ((n, stale[n] if "1.mlp.down" in n else w) for n, w in whole(of))
    )
    moved(learner)
    served.push(learner)
    with pytest.raises(TrainingError, match="other log-probabilities than LlamaForCausalLM has"):
        served.check(learner)
    monkeypatch.setattr(by_server, "weights_of", lambda of: (p for p in whole(of) if "1.mlp.down" not in p[0]))
    with pytest.raises(UsageError, match=r"cannot load .* not model.layers.1.mlp.down_proj.weight"):
        served.push(learner)


def test_training_with_it_is_training_with_generate(url, tmp_path):
    options = {"rollout_top_k": 1, "make": lambda: model(tied=True)}
    ours = losses(tmp_path / "generate", "generate", **options)
    theirs = losses(tmp_path / "server", "vllm", rollout_server=url, **options)
    assert len(theirs) == 5 and len({line["loss"] for line in theirs}) == 5
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in ours], abs=1e-4)


def test_a_step_ahead(url, tmp_path):
    check_a_step_ahead(tmp_path, rollout_server=url, make=lambda: model(tied=True))
