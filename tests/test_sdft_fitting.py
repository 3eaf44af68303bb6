"""As many rollouts at once as memory takes: how many that is, and what happens when it runs out."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdft.errors import UsageError
from sdft.memory import free
from sdft.memory.exhausted import MemoryRanOut
from sdft.rollouts import fitting
from sdft.rollouts.fitting import AsManyAsFit, rollout_bytes
from sdft.rollouts.generate import BACKENDS, sample
from sdft.rollouts.interface import Sampling
from sdft.rollouts.kv_cache import LEAST_SPARE
from tests import tiny

PROMPTS = [[10, 11, 12], [20], [30, 31, 32, 33, 34, 35], [40, 41], [50, 51, 52, 53], [60]]
SAMPLING = Sampling(20, frozenset({40, 41}), temperature=1.3)
LONGEST = max(map(len, PROMPTS))
SEEDS = range(len(PROMPTS))
CPU = torch.device("cpu")
#: Keys and values of a token in the tiny model: two layers of two heads of 8 numbers of 4 bytes.
OF_TOKEN = 2 * 2 * 2 * 8 * 4


def widths(monkeypatch, room=None):
    """The batches that `generate` is given from here on, of which those beyond `room` rollouts run out of memory."""
    seen = []
    function = BACKENDS["generate"]

    def watched(model, prompts, *others):
        seen.append(len(prompts))
        if room is not None and len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(model, prompts, *others)

    monkeypatch.setitem(BACKENDS, "generate", watched)
    return seen


def free_for(monkeypatch, model, rollouts):
    """Have the device seem to have room for so many rollouts of PROMPTS and half a one."""
    each = rollout_bytes(model, LONGEST, SAMPLING.max_new_tokens)
    monkeypatch.setattr(fitting, "free_memory", lambda device: int((rollouts + 0.5) * each / fitting.SHARE))


def test_as_many_as_fit_are_written_at_once_and_the_tokens_are_the_same(monkeypatch):
    model = tiny.tiny_model()
    expected = sample(model, PROMPTS, SAMPLING, seeds=SEEDS)
    for rollouts, batches in [(0, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (50, [6])]:
        with monkeypatch.context() as patch:
            free_for(patch, model, rollouts)
            seen = widths(patch)
            assert sample(model, PROMPTS, SAMPLING, seeds=SEEDS, batch_size=AsManyAsFit()) == expected
        assert seen == batches


def test_where_memory_runs_out_half_as_many_go_on_with_the_same_tokens(monkeypatch, caplog):
    model, progress = tiny.tiny_model(), []
    expected = sample(model, PROMPTS, SAMPLING, seeds=SEEDS)
    free_for(monkeypatch, model, 50)
    seen, at_once = widths(monkeypatch, room=2), AsManyAsFit()
    watched = Sampling(20, SAMPLING.eos_ids, temperature=1.3, watch=lambda count: progress.append(count()))
    given = {"seeds": SEEDS, "batch_size": at_once}
    with caplog.at_level(logging.WARNING):
        assert sample(model, PROMPTS, watched, **given) == expected
    assert seen == [6, 3, 1, 1, 1, 1, 1, 1]
    assert [record.message for record in caplog.records] == [
        "memory ran out with 6 rollouts at once: from here on there are at most 3",
        "memory ran out with 3 rollouts at once: from here on there are at most 1",
    ]
    assert all(tokens <= sum(map(len, expected)) for tokens, _ in progress)
    assert sample(model, PROMPTS, SAMPLING, **given) == expected
    assert seen[8:] == [1] * 6, "it does not try again what has failed"


def test_what_fewer_rollouts_do_not_mend_is_raised(monkeypatch):
    model = tiny.tiny_model()
    widths(monkeypatch, room=0)
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, PROMPTS, SAMPLING, seeds=SEEDS, batch_size=AsManyAsFit())
    monkeypatch.undo()
    seen = widths(monkeypatch, room=2)
    with pytest.raises(torch.OutOfMemoryError):
        sample(model, PROMPTS, SAMPLING, seeds=SEEDS, batch_size=4)
    assert seen == [4], "a number stays as it is"

    def broken(*given):
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(BACKENDS, "generate", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        sample(model, PROMPTS, SAMPLING, batch_size=AsManyAsFit())


def test_continuous_batching_without_room_for_its_cache_goes_on_with_fewer(monkeypatch):
    model, real = tiny.tiny_model(), torch.empty
    expected = sample(model, PROMPTS[:2], SAMPLING, seeds=range(2))
    at_once = AsManyAsFit()
    attempt, failures = at_once.attempt, []

    def first_without_room(write, rollouts, device):
        def empty(*shape, **options):
            if options.get("dtype") == torch.float32 and not failures:
                failures.append(rollouts)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*shape, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            return attempt(write, rollouts, device)

    monkeypatch.setattr(at_once, "attempt", first_without_room)
    given = {"seeds": range(2), "backend": "continuous", "batch_size": at_once}
    assert sample(model, PROMPTS[:2], SAMPLING, **given) == expected
    assert failures == [2] and at_once.most == 1


def test_keys_and_values_of_a_rollout_are_counted_by_layer():
    model, logits = tiny.tiny_model(), fitting.LOGITS * 101 * 4
    kept = OF_TOKEN * (25 + LEAST_SPARE)
    attention = OF_TOKEN // 2 * (2 + 1) * 25  # two heads ask for each of keys and values, and a copy
    reading = fitting.READING * 5 * 32 * 4
    assert rollout_bytes(model, 1, 24) == kept + attention + logits
    assert rollout_bytes(model, 5, 20) == kept + reading + logits
    assert rollout_bytes(model.to(torch.bfloat16), 5, 20) == (kept + reading) / 2 + logits


def test_a_layer_with_a_window_keeps_no_more_than_that():
    settings = {**tiny.tiny_model().config.to_dict(), "head_dim": 8, "sliding_window": 4, "model_type": "mistral"}
    settings.pop("architectures")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    without = rollout_bytes(tiny.tiny_model(), 5, 20)
    assert rollout_bytes(model, 5, 20) == without - OF_TOKEN * (25 + LEAST_SPARE - 4)


def test_a_model_that_keeps_something_else_is_refused():
    settings = {"vocab_size": 101, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).eval()
    with pytest.raises(UsageError, match="rollout_batch_size is 'auto', and MambaForCausalLM keeps something else"):
        sample(model, PROMPTS, SAMPLING, batch_size=AsManyAsFit())


def test_free_memory_is_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(free, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "CGROUP", tmp_path)
    assert free.free_memory(CPU) is None
    assert AsManyAsFit().size(tiny.tiny_model(), [3, 5], 20) == 2
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\nHugePages_Total:   0\n")
    assert free.free_memory(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 700000\ninactive_file 300000\n")
    assert free.free_memory(CPU) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    assert free.free_memory(CPU) == 2_300_000


def test_free_memory_of_a_gpu_is_what_the_driver_says_once_caches_are_given_back(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append(device.index), (7, 9))[1])
    assert free.free_memory(torch.device("cuda", 1)) == 7
    assert calls == ["empty", 1]


def test_an_error_in_a_sentence_is_not_put_in_another() -> None:
    from sdft.memory.exhausted import explained
    from sdft.progress.phases import Phases

    phases = Phases(CPU)
    with pytest.raises(MemoryRanOut, match=r"^continuous batching failed$"), explained(phases), phases("rollout"):
        raise MemoryRanOut("continuous batching failed")
