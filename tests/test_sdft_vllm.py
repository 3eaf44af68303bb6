"""The vLLM back-end with a stand-in for vLLM: what is refused, what the engine is told, and the check of its weights.

tests/with_vllm has the same with vLLM itself.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForCausalLM

from sdft import SDFTConfig
from sdft.checkpoints.signals import FinishOnSignal
from sdft.cli import main
from sdft.early_checks import check_package
from sdft.errors import TrainingError, UsageError
from sdft.launch import check_launch, prepare
from sdft.models.adapters import merged_weights
from sdft.rollouts import engine as engines
from sdft.rollouts import vllm as by_vllm
from sdft.rollouts.engine import largest_gap, weights_of
from sdft.rollouts.generate import write
from sdft.rollouts.interface import Request, Sampling
from sdft.rollouts.vllm import ENVIRONMENT, VllmRollouts
from tests import tiny
from tests.test_sdft_trainer import trained, trainer

PROBE = [10, 11, 12]


class LLM:
    """vLLM's engine, of as much as is used of it: a model of its own, which transformers' `generate` samples."""

    made: list[LLM] = []  # noqa: RUF012  # emptied before each test

    def __init__(self, model, **options):
        config = AutoConfig.from_pretrained(model)
        if config.head_dim < 8:
            raise ValueError("heads of 4 are\n not served")
        self.served, self.options, self.settings, self.forgotten = LlamaForCausalLM(config), options, [], 0
        self.served.load_weights = self.load
        LLM.made.append(self)

    def load(self, weights):
        weights = {name: weight.clone() for name, weight in weights}
        self.served.load_state_dict(weights, strict=False)
        return set(weights)

    def apply_model(self, function):
        return [function(self.served)]

    def reset_prefix_cache(self):
        self.forgotten += 1

    def generate(self, prompts, settings, use_tqdm):
        self.settings += settings
        outputs = []
        for prompt, of in zip(prompts, settings, strict=True):
            drawn = of.temperature or None
            sampling = Sampling(of.max_tokens, frozenset(of.stop_token_ids), drawn, logprobs=of.logprobs == 0)
            (written,) = write(self.served, [Request(prompt["prompt_token_ids"], of.seed)], sampling)
            known = zip(written.tokens, written.logprobs or [], strict=False)
            logprobs = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in known]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=written.tokens, logprobs=logprobs)]))
        return outputs


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    """The stand-in as the module that is installed as vllm, with the function that _compat replaces."""
    LLM.made.clear()
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    layers = ModuleType("vllm.model_executor.layers")
    layers.utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=None)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    parts = {part.__name__: part for part in (module, ModuleType("vllm.model_executor"), layers, platforms)}
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    for name in (*ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")
    return SimpleNamespace(utils=layers.utils, platform=platforms.current_platform)


def engine(of, **options):
    return VllmRollouts(of, **{"longest": 40, "dtype": torch.float32, "memory_share": 0.1, "probe": PROBE, **options})


def test_the_engine_is_made_of_the_configuration_alone(vllm):
    threads = torch.get_num_threads()
    engine(tiny.tiny_model())
    (made,) = LLM.made
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and torch.get_num_threads() == threads
    assert made.served.config.architectures == ["LlamaForCausalLM"]
    options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 40, "enforce_eager": True}
    assert made.options.items() >= options.items() and made.options["kv_cache_memory_bytes"] > 0
    layer = torch.nn.Linear(2, 3)
    vllm.utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    given = torch.ones(1, 2)
    assert torch.equal(layer.cpu_linear(given, layer.weight, layer.bias), layer(given))


def test_a_request_is_told_in_vllms_words():
    model = tiny.tiny_model()
    served = engine(model)
    sampling = Sampling(7, frozenset({5, 1}), 0.7, 0.8, 9, 0.1, ("ab",), logprobs=True)
    served.answer(model, [Request([3, 4], seed=11)], sampling)
    said = {"max_tokens": 7, "temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.1, "seed": 11}
    others = {"stop_token_ids": [1, 5], "ignore_eos": True, "logprobs": 0, "detokenize": False}
    assert vars(LLM.made[0].settings[-1]) == said | others
    served.answer(model, [Request([3]), Request([3])], Sampling(2, temperature=1.0))
    one, other = LLM.made[0].settings[-2:]
    assert one.logprobs is None and one.seed != other.seed and None not in (one.seed, other.seed)
    (greedy,) = served.answer(model, [Request([3])], Sampling(2))
    assert LLM.made[0].settings[-1].temperature == 0 and LLM.made[0].settings[-1].seed is None
    assert greedy.logprobs is None


@pytest.mark.parametrize("iterations", [1, 2])
def test_training_with_it_is_training_with_generate(iterations, tmp_path):
    """The stand-in draws as `generate` does, so that the two would part where it had other weights than the student."""
    options = {"rollout_correction": "none", "num_iterations": iterations}
    ours, theirs = (
        [line["loss"] for line in trained(tmp_path / name, rollout_backend=name, **options).state.log_history[:4]]
        for name in ("generate", "vLLM")
    )
    assert theirs == pytest.approx(ours, abs=1e-6) and len(set(theirs)) == 4
    (made,) = LLM.made
    assert made.forgotten == 1 + 4 // iterations  # at the start, and for each step that takes new rollouts
    assert 6 < made.options["max_model_len"] < 40


def test_mixed_precision_is_the_engines_type(tmp_path):
    trainer(tmp_path, rollout_backend="vllm", bf16=True)
    assert LLM.made[0].options["dtype"] == "bfloat16"


def test_auto_corrects_what_another_engine_has_drawn(tmp_path):
    assert trainer(tmp_path, rollout_backend="vllm").corrects


def test_a_layer_that_keeps_its_weights_is_found(monkeypatch):
    model = tiny.tiny_model()
    served, whole = engine(model), weights_of
    stale = dict(whole(tiny.tiny_model(seed=1)))

    def with_a_stale_layer(of):
        return ((name, stale[name] if "1.mlp.up" in name else weight) for name, weight in whole(of))

    monkeypatch.setattr(by_vllm, "weights_of", with_a_stale_layer)
    served.push(model)
    with pytest.raises(
        TrainingError, match=r"differ by \S+ nats in the mean of 32 tokens after push 2 .* 0.001 is round"
    ):
        served.check(model)
    with pytest.raises(TrainingError, match="after push 1 of its weights"):
        engine(model)
    monkeypatch.setattr(engines, "CHECK_EVERY", 3)
    with pytest.raises(TrainingError, match="after push 3 of its weights"), served.serving(model):
        pass
    monkeypatch.setattr(by_vllm, "weights_of", lambda of: (pair for pair in whole(of) if "mlp.up" not in pair[0]))
    with pytest.raises(TrainingError, match=r"but not model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj"):
        served.push(model)


def test_a_gap_is_rounding_by_type_and_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    gaps = [largest_gap(*of) for of in ((torch.float32, cpu), (torch.float32, cuda), (torch.bfloat16, cpu))]
    assert gaps == [1e-3, 0.03, 0.25]


def test_on_a_gpu_the_engine_sleeps_but_for_rollouts(monkeypatch):
    said = []
    served = VllmRollouts.__new__(VllmRollouts)
    served.pushes = 1
    served.llm = SimpleNamespace(wake_up=lambda: said.append("wake"), sleep=lambda level: said.append("sleep"))
    monkeypatch.setattr(by_vllm, "give_back", lambda device: said.append("give back"))
    monkeypatch.setattr(served, "push", lambda model: said.append("push"))
    monkeypatch.setattr(served, "check", lambda model: said.append("check"))
    with served.serving(SimpleNamespace(device=torch.device("cuda"))) as backend:
        said.append("answer")
    assert backend == served.answer and said == ["give back", "wake", "push", "check", "answer", "sleep"]


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"target_modules": "all-linear"}),
        (True, {"target_modules": ["q_proj"], "use_dora": True}),
        (False, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["v_proj"], "trainable_token_indices": [3, 4]}),
    ],
    ids=["lora", "dora", "head", "tokens"],
)
def test_an_adapter_is_merged_into_what_is_pushed_and_stays(tied, options):
    learner = get_peft_model(tiny.tiny_model(tied=tied), LoraConfig(r=2, lora_alpha=8, **options))
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    before = {name: weight.clone() for name, weight in learner.state_dict().items()}
    merged = {name: weight for part in merged_weights(learner.get_base_model()) for name, weight in part.items()}
    assert all(torch.equal(before[name], weight) for name, weight in learner.state_dict().items())
    expected = copy.deepcopy(learner).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    engine(learner.get_base_model())  # whose check finds the same log-probabilities


def test_what_cannot_be_served_is_refused_in_a_sentence(tmp_path, monkeypatch, vllm):
    with pytest.raises(UsageError, match=r"^rollout_backend is 'vllm' and rollout_from 'teacher'; it must be student"):
        SDFTConfig(output_dir=str(tmp_path), rollout_backend="vllm", rollout_from="teacher")
    with pytest.raises(
        UsageError,
        match=r"^rollout_backend is 'vllm', which cannot serve LlamaForCausalLM in torch.float32"
        r" on cpu: heads of 4 are not served \(it may be generate, and vllm_memory_share, .* is 0.1\)$",
    ):
        engine(tiny.tiny_model(head_dim=4))
    vllm.platform.device_type = "cuda"
    with pytest.raises(UsageError, match="which is installed for cuda, and the model is on cpu; it may be generate"):
        engine(tiny.tiny_model())
    run = trainer(tmp_path / "run")
    run.args.rollout_backend = "vllm"
    run.is_fsdp_enabled = True
    with pytest.raises(UsageError, match=r"^rollout_backend is 'vllm', and the run is under FSDP; it must be generate"):
        check_launch(run)
    run.is_fsdp_enabled = False
    monkeypatch.setattr(run.model.config, "quantization_config", SimpleNamespace(quant_method="awq"), raising=False)
    with pytest.raises(UsageError, match="and the model is quantised; it must be generate or continuous"):
        check_launch(run)
    monkeypatch.setattr(type(run.args), "world_size", 2)
    with pytest.raises(UsageError, match="and the run has 2 processes; it must be generate"):
        check_launch(run)


def test_without_vllm_that_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else found(name))
    said = "rollout_backend is 'vllm', which needs vllm: pip install vllm"
    with pytest.raises(UsageError, match=said):
        check_package("rollout_backend is 'vllm'", "vllm")
    with pytest.raises(UsageError, match=said):
        trainer(tmp_path, rollout_backend="vllm")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "demonstration": "b"}\n')
    words = ["--model", "smollm2-135m-instruct", "--train_file", str(data), "--rollout_backend", "vllm"]
    assert main(["train", *words, "--output_dir", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err


# A step ahead


def noted(run):
    """What a run samples, filled as it trains: of each step the student at its start, its samples, and the head of the
    engine as its rollouts were written."""
    found = SimpleNamespace(students=[], samples=[], heads=[])
    make, before, by = run.step_samples, run.get_batch_samples, run.write

    def samples(rows):
        found.samples.append(make(rows))
        return found.samples[-1]

    def batches(*args):
        found.students.append(run.student.lm_head.weight.detach().clone())
        return before(*args)

    def written(*args, **options):
        found.heads.append(LLM.made[-1].served.lm_head.weight.detach().clone())
        return by(*args, **options)

    run.step_samples, run.get_batch_samples, run.write = samples, batches, written
    return found


def ahead(folder, **options):
    """A run of two epochs of four steps."""
    return trainer(folder, **{"rollout_backend": "vllm", "rollout_lag": 1, "max_steps": 8, **options})


def test_where_nothing_is_learned_a_step_ahead_is_the_same(tmp_path):
    runs = [ahead(tmp_path / str(lag), rollout_lag=lag, learning_rate=0.0) for lag in (0, 1)]
    found = [noted(run) for run in runs]
    for run in runs:
        run.train()
    ours, theirs = ([line for line in run.state.log_history if "loss" in line] for run in runs)
    assert found[0].samples == found[1].samples and len({s.completion[0] for of in found[0].samples for s in of}) > 1
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert [line["rollout_lag"] for line in theirs] == [0, 1, 1, 1, 0, 1, 1, 1] and "rollout_lag" not in ours[0]


def test_a_step_ahead_samples_by_the_weights_before_the_last_update(tmp_path):
    run = ahead(tmp_path, eval_dataset=tiny.rows(2), eval_strategy="steps", eval_steps=1)
    found = noted(run)
    run.train()
    heads, students = found.heads, found.students
    assert len(heads) == len(students) == 8
    for step, head in enumerate(heads):
        assert torch.equal(head, students[step if step in (0, 4) else step - 1]), step
    assert not torch.equal(students[0], students[1])
    assert run.state.log_history[2]["effective_share"] < 1  # the weights are not all 1


def test_a_run_a_step_ahead_that_was_told_to_stop_goes_on(tmp_path):
    whole = ahead(tmp_path / "whole", learning_rate=0.0)
    whole.train()
    with FinishOnSignal(silent=True) as finish:
        run = ahead(tmp_path / "run", learning_rate=0.0, callbacks=[finish])
        found, by = noted(run), run.write

        def told(*args, **options):
            if len(found.heads) == 2:  # beside the second step, the third's
                signal.raise_signal(signal.SIGTERM)
            return by(*args, **options)

        run.write = told
        run.train()
    assert run.state.global_step == 2 and run.ahead.pool._work_queue.empty()
    again = ahead(tmp_path / "run", learning_rate=0.0)
    again.train(resume_from_checkpoint="last")
    ours, theirs = ([line for line in of.state.log_history if "loss" in line] for of in (again, whole))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-6)
    assert [line["rollout_lag"] for line in ours] == [0, 1, 0, 1, 0, 1, 1, 1]


def test_what_goes_wrong_a_step_ahead_is_the_same_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    run = ahead(tmp_path, max_steps=3, overwrite_output_dir=True)
    found, by = noted(run), run.write

    def failing(*args, **options):
        if len(found.heads) == 1:
            raise TrainingError("vLLM is gone")
        return by(*args, **options)

    run.write = failing
    with pytest.raises(TrainingError, match=r"^vLLM is gone$"):
        run.train()
    assert run.state.global_step == 1
    run.write = by
    assert run.train().global_step == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout_backend": "generate"}, "1 and rollout_backend 'generate'; it must be 0, or the back-end vllm"),
        ({"rollout_correction": "none"}, "1 and rollout_correction 'none'; it must be 0, or rollout_correction auto"),
        ({"num_iterations": 2}, "1 and num_iterations 2; it must be 0"),
        ({"rollout_lag": 2}, "2; it must be a whole number of at least 0 and at most 1"),
        ({"rollout_top_p": 0.5}, "1, and rollout_correction 'auto' corrects nothing where .* truncate$"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_step_ahead_is_refused_where_nothing_makes_up_for_it(tmp_path, options, said):
    with pytest.raises(UsageError, match=f"^rollout_lag is {said}"):
        ahead(tmp_path, **options)


def test_on_a_gpu_a_server_alone_writes_ahead(tmp_path, monkeypatch):
    run = ahead(tmp_path)
    monkeypatch.setattr(type(run.args), "device", torch.device("cuda"))
    with pytest.raises(UsageError, match="sleeps while the student learns on a GPU; it must be 0, or rollout_server"):
        prepare(run, corrects=True)
