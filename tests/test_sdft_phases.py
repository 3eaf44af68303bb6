"""Seconds belong to the phase that was under way, the innermost one."""

import torch

from sdft.progress import phases
from sdft.progress.phases import Phases


def test_time_within_a_phase_of_a_phase_is_the_inner_ones(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: clock[0])
    spent = Phases(torch.device("cpu"))

    def passes(seconds):
        clock[0] += seconds

    passes(100)
    spent.begin("learn")
    passes(1)
    with spent("score"):
        passes(20)
        assert spent.now == "score"
    passes(3)
    assert spent.take() == {"rollout": 0, "feedback": 0, "score": 20, "learn": 4, "save": 0, "eval": 0}
    passes(5)
    spent.begin(None)
    passes(100)
    with spent("save"):
        passes(6)
    assert spent.take() == {"rollout": 0, "feedback": 0, "score": 0, "learn": 5, "save": 6, "eval": 0}
