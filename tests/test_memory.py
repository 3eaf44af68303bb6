"""Long sequences in tiles, what is kept in host memory, and peaks by phase."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sdft.errors import TrainingError, UsageError
from sdft.memory.exhausted import explained
from sdft.memory.offload import OnHost
from sdft.memory.peaks import Peaks
from sdft.memory.tiles import Tiled, tile
from sdft.progress.phases import Phases
from sdft.settings.config import SDFTConfig
from sdft.trainer import SDFTTrainer
from tests import tiny

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
}
#: Architectures, with the modules of a layer that work in tiles.
NORMS = ("input_layernorm", "post_attention_layernorm")
ARCHITECTURES = {
    "llama": ("mlp", *NORMS),
    "qwen2": ("mlp", *NORMS),
    "qwen3": ("mlp", *NORMS),
    "gemma3_text": ("mlp", *NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("mlp", "post_attention_layernorm", "post_feedforward_layernorm"),
    "phi3": ("mlp", *NORMS),
    "mixtral": ("mlp", *NORMS),
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES, pad_token_id=0, attention_dropout=0.0)
    return AutoModelForCausalLM.from_config(config).train()


def states_and_gradients(model: PreTrainedModel, ids: Tensor, *, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    hidden = hidden if model.dtype == torch.float64 else hidden.float()
    hidden.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": hidden.detach(), **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= limit * value.norm(), name


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_tiles_change_nothing(kind: str, checkpointed: bool) -> None:
    """In float64, since on some machines a float32 product of fewer rows is rounded in another way."""
    exact = kind != "mixtral"  # whose experts have no product of float64
    model, ids = made(kind), torch.randint(1, 60, (2, 23))
    model, limit = (model.double(), 1e-6) if exact else (model, 1e-5)
    names = list(model.state_dict())
    expected = states_and_gradients(model, ids)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert set(tile(model, 10)) == set(ARCHITECTURES[kind])
    assert list(model.state_dict()) == names
    found = states_and_gradients(model, ids)
    assert_same(found, expected, limit)
    with torch.no_grad():
        assert_same({"": model.model(input_ids=ids, use_cache=False).last_hidden_state}, {"": expected[""]}, limit)


@pytest.mark.parametrize("trained", ["all", "last MLP", "norms"])
def test_tiles_give_gradients_where_part_of_the_model_trains(trained: str) -> None:
    model, ids = made("llama").double(), torch.randint(1, 60, (1, 30))
    for name, parameter in model.named_parameters():
        chosen = {"all": True, "last MLP": "layers.1.mlp" in name, "norms": "layernorm" in name}[trained]
        parameter.requires_grad_(chosen)
    expected = states_and_gradients(model, ids)
    tile(model, 7)
    assert_same(states_and_gradients(model, ids), expected, 1e-6)


def test_a_parameter_that_no_tile_uses_has_no_gradient() -> None:
    model, ids = made("llama").double(), torch.randint(1, 60, (1, 30))
    model.model.layers[0].mlp.unused = nn.Parameter(torch.ones(3))
    expected = states_and_gradients(model, ids)
    tile(model, 7)
    assert_same(states_and_gradients(model, ids), expected, 1e-6)


def test_tiles_keep_to_autocast() -> None:
    model, ids = made("llama"), torch.randint(1, 60, (1, 30))
    expected = states_and_gradients(model, ids, autocast=True)
    tile(model, 7)
    assert_same(states_and_gradients(model, ids, autocast=True), expected, 2e-2)


def test_a_copy_of_a_tiled_model_has_weights_of_its_own() -> None:
    model, ids = made("llama"), torch.randint(1, 60, (1, 30))
    tile(model, 7)
    other = copy.deepcopy(model)
    before = states_and_gradients(other, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_same(states_and_gradients(other, ids), before, 1e-6)


def test_a_model_can_be_whole_again() -> None:
    model = made("llama")
    tile(model, 7)
    tile(model, None)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, Tiled)
    assert mlp.tile_tokens > 10**9
    assert tile(made("llama"), None) == []


class Kept:
    """Bytes that are kept for a backward pass, counted once a storage."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


def test_tiles_keep_less_for_the_backward_pass() -> None:
    model, ids = made("llama"), torch.randint(1, 60, (1, 400))
    kept = []
    for tokens in (None, 50):
        tile(model, tokens)
        counted = Kept()
        with counted.hooks():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        kept.append(counted.nbytes)
        del hidden
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_kept_on_the_host_comes_back(checkpointed: bool) -> None:
    model, ids = made("llama"), torch.randint(1, 60, (2, 23))
    expected = states_and_gradients(model, ids)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.zero_grad()
    on_host = OnHost(torch.device("cpu"), least_bytes=1)
    with on_host:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert len(on_host._kept) >= 2
    loss = hidden.square().sum()
    loss.backward(retain_graph=not checkpointed)
    assert not any(on_host._kept) and not on_host._coming
    if not checkpointed:  # what is wanted again comes again
        model.zero_grad()
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({"": hidden.detach(), **found}, expected, 1e-6)


def test_offloading_needs_checkpointing(tmp_path) -> None:
    with pytest.raises(UsageError, match="activation_offload is True and activation_checkpointing is not set"):
        SDFTConfig(output_dir=str(tmp_path), activation_offload=True)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert SDFTConfig(output_dir=str(tmp_path), activation_offload=True, **{name: True})


def test_the_trainers_own_way_of_offloading_is_refused(tmp_path) -> None:
    given = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}
    with pytest.raises(UsageError, match="_checkpointing_kwargs has offload; it must not, but activation_offload may"):
        SDFTConfig(output_dir=str(tmp_path), **given)


def test_each_phase_has_its_own_peak() -> None:
    phases = Phases(torch.device("cpu"))
    with phases("rollout"):
        large = torch.ones(50 << 20)
        del large
    with phases("learn"):
        torch.ones(1)
    peaks = phases.peaks.take()
    assert peaks["rollout"] > peaks["learn"] + 100
    assert phases.peaks.most >= peaks["rollout"]
    assert phases.peaks.take() == {}


def test_without_leave_to_start_anew_a_phase_has_the_peak_so_far(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("sdft.memory.peaks.FORGET", tmp_path / "no" / "such")
    peaks = Peaks(torch.device("cpu"))
    large = torch.ones(50 << 20)
    del large
    peaks.note("rollout")
    peaks.note("learn")
    taken = peaks.take()
    assert taken["learn"] >= taken["rollout"] > 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "ran out in score .CUDA out of memory.",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "max_forward_tokens"),
    ],
)
def test_where_memory_runs_out_the_phase_and_a_setting_are_named(error: RuntimeError, said: str) -> None:
    phases = Phases(torch.device("cpu"))
    phases.begin("learn")
    with pytest.raises(TrainingError, match=said) as caught, explained(phases), phases("score"):
        raise error
    assert isinstance(caught.value, torch.OutOfMemoryError)


def test_another_error_stays_as_it_is() -> None:
    phases = Phases(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="shapes") as caught, explained(phases), phases("learn"):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, TrainingError)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_given_back() -> None:
    script = """
import torch
from sdft.memory.host import give_back_at_once
from sdft.memory.peaks import RESIDENT

def resident():
    return int(next(l for l in RESIDENT.read_text().splitlines() if l.startswith("VmRSS")).split()[1]) / 1024

assert give_back_at_once()
before = resident()
large = [torch.ones(2 << 20) for _ in range(40)]
kept = large[-1]
del large
assert resident() - before < 40, resident() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_run_on_a_cpu_says_that_offloading_has_no_effect(tmp_path, caplog) -> None:
    args = {"activation_offload": True, "activation_checkpointing": True, "max_forward_tokens": 8, "max_steps": 1}
    config = SDFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_completion_length=4, **args)
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    run = SDFTTrainer(model, config, train_dataset=tiny.rows(2), processing_class=tokenizer)
    assert "activation_offload has no effect on a CPU" in caplog.text
    run.train()
    assert isinstance(model.model.layers[0].mlp, Tiled)
    line = run.state.log_history[0]
    assert line["learn_peak_memory_mib"] > 0 and line["rollout_peak_memory_mib"] > 0
