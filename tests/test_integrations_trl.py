"""The integrations' trainers compute TRL's losses, gradients and metrics, on the same completions."""

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl.experimental.gkd import GKDTrainer
from trl.experimental.sdft import SDFTTrainer
from trl.experimental.server_distillation import ServerDistillationTrainer

from sdft_kernels.integrations.models import View, check_head
from sdft_kernels.integrations.trl import apply_to_trl
from tests import tiny, trl_trainers
from tests.trl_trainers import TRAINERS, build, config, learnt, lengths
from tests.waiting import patience

pytestmark = pytest.mark.peers
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    trl_trainers.save_models(folder)
    return folder


def assert_close(got, expected, name=""):
    got, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (got, expected))
    assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-7, f"{name}: {got} and not {expected}"


def assert_same_training(ours, theirs):
    assert len(ours["logged"]) == len(theirs["logged"])
    series = []  # of each metric over the steps, whose norm is its size: one step's mean may be of terms that cancel
    for logged in (ours["logged"], theirs["logged"]):
        series.append(
            {key: [entry.get(key, 0.0) for entry in logged] for key in {k for entry in logged for k in entry}}
        )
    assert [entry.keys() for entry in ours["logged"]] == [entry.keys() for entry in theirs["logged"]]
    for key, values in series[1].items():
        assert_close(series[0][key], values, key)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert_close(ours["weights"][name], weight, name)


@pytest.fixture(scope="module")
def pairs(folder):
    """By a trainer's name and whether it has an adapter: TRL's and ours, and the batch that TRL's met in a step."""
    made = {}

    def pair(name, lora):
        if (name, lora) not in made:
            options = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4}
            trainers = [build(name, folder, kind, lora, **options) for kind in TRAINERS[name][:2]]
            met = []
            for trainer in trainers:
                compute = trainer.compute_loss

                def noting(model, inputs, *rest, compute=compute, **named):
                    met.append(inputs)
                    return compute(model, inputs, *rest, **named)

                trainer.compute_loss = noting
                trainer.train()
                del trainer.compute_loss
            made[name, lora] = (*trainers, met[0])
        Accelerator()  # its state is the whole process's, and begins anew with each configuration that is made
        return made[name, lora]

    return pair


def loss_and_gradients(trainer, inputs, items):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    for metrics in getattr(trainer, "_metrics", {}).values():
        metrics.clear()
    options = {} if items is None else {"num_items_in_batch": items}
    loss = trainer.compute_loss(trainer.model_wrapped, dict(inputs), **options)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
    return {
        "loss": loss.detach(),
        **{k: v[0] for k, v in getattr(trainer, "_metrics", {}).get("train", {}).items()},
    }, gradients


def settings(trainer, share, temperature, clip):
    """The share as each trainer calls it, and the others where it has them."""
    trainer.beta = trainer.args.distillation_alpha = share
    trainer.temperature = temperature
    trainer.args.distillation_is_clip = clip


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", TRAINERS)
def test_losses_gradients_and_metrics_are_trls(pairs, name, share, lora):
    theirs, ours, inputs = pairs(name, lora)
    mask = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != -100
    assert len(set(mask.sum(-1).tolist())) > 1, "all completions are as long: nothing here shows what masks do"
    before = {**inputs, "old_per_token_logps": -5 + torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))}
    for temperature, clip, batch, items in [(1.0, None, inputs, None), (0.7, 2.0, before, torch.tensor(11))]:
        for trainer in (theirs, ours):
            settings(trainer, share, temperature, clip)
        expected, expected_gradients = loss_and_gradients(theirs, batch, items)
        got, gradients = loss_and_gradients(ours, batch, items)
        assert got.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
        assert expected["loss"] > 1e-4 and len(gradients) > 5
        for key, value in expected.items():
            assert_close(got[key], value, key)
        for key, gradient in expected_gradients.items():
            assert_close(gradients[key], gradient, key)


SAMPLED = [
    ("sdft", {"distillation_mode": "sampled_token"}),
    ("sdpo", {"distillation_mode": "sampled_token"}),
    ("sdpo", {"distillation_mode": "sampled_token", "distillation_weight": 0.3}),
    ("sdpo", {"distillation_weight": 0.3, "distillation_alpha": 0.5}),
    ("sdpo", {"distillation_weight": 0.0}),
]
POLICIES = [("grpo", "token"), ("bnpo", "sequence"), ("dr_grpo", "token"), ("dapo", "sequence")]


@pytest.fixture
def pair_with(pairs, monkeypatch):
    """TRL's trainer and ours with other settings, and the batch that TRL's met."""

    def pair(name, lora, options):
        theirs, ours, inputs = pairs(name, lora)
        for trainer in (theirs, ours):
            monkeypatch.setattr(trainer, "temperature", 0.7)
            for key, value in {"distillation_alpha": 1.0, "distillation_is_clip": 2.0, **options}.items():
                monkeypatch.setattr(trainer.args, key, value)
        return theirs, ours, inputs

    return pair


def assert_same_step(theirs, ours, batch, items=None):
    expected, expected_gradients = loss_and_gradients(theirs, batch, items)
    got, gradients = loss_and_gradients(ours, batch, items)
    assert got.keys() == expected.keys() and gradients.keys() == expected_gradients.keys()
    assert len(gradients) > 5 and sum(gradient.norm() for gradient in gradients.values()) > 1e-3
    for key, value in expected.items():
        assert_close(got[key], value, key)
    for key, gradient in expected_gradients.items():
        assert_close(gradients[key], gradient, key)
    return got


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
def test_the_loss_of_iw_opd_is_trls(pair_with, lora, monkeypatch):
    theirs, ours, inputs = pair_with("iw_opd", lora, {})
    written = torch.randn(inputs["labels"].shape, generator=torch.Generator().manual_seed(0)) - 5
    for trainer in (theirs, ours):
        monkeypatch.setattr(trainer, "distillation_objective", "iw_opd")
        monkeypatch.setattr(trainer, "iw_opd_gamma", 0.8)
    for batch, items in [(inputs, None), ({**inputs, "rollout_logprobs": written}, torch.tensor(11))]:
        metrics = assert_same_step(theirs, ours, batch, items)
        assert metrics["iw_opd/min_weight"] < metrics["iw_opd/max_weight"]
    with no_logits(ours):
        assert ours.compute_loss(ours.model_wrapped, inputs).isfinite()


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize(("name", "options"), SAMPLED)
def test_losses_of_sampled_tokens_are_trls(pair_with, name, options, lora, monkeypatch):
    theirs, ours, inputs = pair_with(name, lora, options)
    monkeypatch.setattr(ours, "num_iterations", 2)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    logprobs = ours._compute_rollout_logps(*(inputs[name] for name in names))
    random = torch.Generator().manual_seed(0)
    inputs = {**inputs, "advantages": torch.randn(len(logprobs), generator=random)}
    for old in (None, logprobs + 0.5 * torch.randn(logprobs.shape, generator=random)):  # some ratios are clipped
        batch = inputs if old is None else {**inputs, "old_per_token_logps": old}
        for loss_type, level in POLICIES if options.get("distillation_weight", 1) < 1 else POLICIES[:1]:
            for trainer in (theirs, ours):
                monkeypatch.setattr(trainer, "loss_type", loss_type, raising=False)
                monkeypatch.setattr(trainer, "importance_sampling_level", level, raising=False)
            got = assert_same_step(theirs, ours, batch)
    unlikely = {**inputs, "old_per_token_logps": old.where(inputs["completion_mask"].bool(), -200)}
    assert loss_and_gradients(ours, unlikely, None)[0] == got  # padding's ratio of e**200 takes no part


TOP_K = {"distillation_mode": "topk_logits", "distillation_topk": 7}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("add_tail", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_losses_of_the_likeliest_tokens_are_trls(pair_with, name, alpha, add_tail, lora):
    options = {**TOP_K, "distillation_alpha": alpha, "distillation_add_tail": add_tail}
    theirs, ours, inputs = pair_with(name, lora, options)
    written = torch.randn(inputs["completion_ids"].shape, generator=torch.Generator().manual_seed(0)) - 5
    for batch in (inputs, {**inputs, "old_per_token_logps": written}):
        assert_same_step(theirs, ours, batch)


def test_a_batch_without_a_token_to_distil_has_a_loss_of_0_with_a_gradient(pair_with):
    theirs, ours, inputs = pair_with("sdpo", False, {"distillation_mode": "sampled_token"})
    empty = {**inputs, "self_distillation_mask": torch.zeros(len(inputs["prompt_ids"]))}
    (expected, _), (got, gradients) = (loss_and_gradients(trainer, empty, None) for trainer in (theirs, ours))
    assert got == expected and got["loss"] == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients.values()) and gradients


IW_OPD = {"distillation_objective": "iw_opd", "loss_top_k": 1}  # its defaults
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
TRAININGS = [
    ("sdft", {**EVALUATED, "gradient_accumulation_steps": 4, "num_iterations": 2, "num_loss_tokens_to_skip": 1}),
    ("sdft", {"teacher_model_kind": "ema", "teacher_update_rate": 0.5, "temperature": 0.8, "lora": True}),
    ("sdft", {"teacher_model_kind": "live", "gradient_checkpointing": True, "steps_per_generation": 2}),
    ("sdpo", {**EVALUATED, "gradient_accumulation_steps": 4, "distillation_alpha": 0.5}),
    ("sdft", {**SAMPLED[0][1], "distillation_alpha": 1.0, "gradient_accumulation_steps": 4, "lora": True}),
    ("sdpo", {**EVALUATED, **SAMPLED[2][1], "gradient_accumulation_steps": 4, "num_iterations": 2}),
    ("sdft", {**EVALUATED, **TOP_K, "gradient_accumulation_steps": 4, "num_iterations": 2}),
    ("sdpo", {**TOP_K, "distillation_alpha": 0.5, "distillation_add_tail": True, "lora": True}),
    ("sdpo", {**SAMPLED[3][1], "steps_per_generation": 2, "teacher_model_kind": "live"}),
    ("sdpo", {**EVALUATED, **SAMPLED[4][1], "importance_sampling_level": "sequence"}),
    ("gkd", {**EVALUATED, "gradient_accumulation_steps": 4, "lmbda": 0.5, "temperature": 0.8}),
    ("gkd", {"seq_kd": True, "lmbda": 0.0, "beta": 1.0, "lora": True}),
    ("distillation", {**EVALUATED, "gradient_accumulation_steps": 4, "beta": 0.3}),
    ("gold", {**EVALUATED, "gradient_accumulation_steps": 4, "lmbda": 0.5, "temperature": 0.8}),
    ("iw_opd", {**EVALUATED, "gradient_accumulation_steps": 4, "beta": 0.5}),
    ("iw_opd", {**EVALUATED, **IW_OPD, "gradient_accumulation_steps": 4, "temperature": 0.8}),
    ("iw_opd", {**IW_OPD, "lora": True}),
]


@pytest.mark.parametrize(("name", "options"), TRAININGS)
def test_a_training_is_trls(folder, name, options):
    theirs, ours, *_ = TRAINERS[name]
    assert_same_training(learnt(build(name, folder, ours, **options)), learnt(build(name, folder, theirs, **options)))


@contextmanager
def no_logits(trainer):
    heads = [trainer.model.lm_head, trainer.accelerator.unwrap_model(trainer.teacher_model).lm_head]
    for head in heads:
        head.forward = lambda hidden: pytest.fail("the head has made logits")
    try:
        yield
    finally:
        for head in heads:
            del head.forward


@pytest.mark.parametrize("name", TRAINERS)
def test_no_logits_are_made(pairs, name):
    _, ours, inputs = pairs(name, False)
    with no_logits(ours):
        assert ours.compute_loss(ours.model_wrapped, dict(inputs)) > 0
        if name in ("sdft", "sdpo"):
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            ours.num_iterations = 2
            assert ours._compute_rollout_logps(*(inputs[name] for name in names)).isfinite().all()


@pytest.mark.parametrize(("name", "options"), [*SAMPLED, ("sdft", TOP_K)])
def test_no_logits_are_made_for_sampled_tokens_and_the_likeliest(pair_with, name, options):
    _, ours, inputs = pair_with(name, False, options)
    with no_logits(ours):
        assert ours.compute_loss(ours.model_wrapped, dict(inputs)).isfinite()


@pytest.mark.parametrize("name", ["sdft", "gkd"])
def test_mixed_precision_is_trls_but_for_the_rounding_of_logits(folder, name):
    found, types = [], set()
    for kind in TRAINERS[name][:2]:
        trainer = build(name, folder, kind, bf16=True, max_steps=1)
        layer = trainer.model.base_model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
        trainer.train()
        found.append(trainer.state.log_history[0])
    assert types == {torch.bfloat16}
    for key in ("loss", "grad_norm"):
        assert found[1][key] == pytest.approx(found[0][key], rel=5e-3) and found[1][key] != found[0][key], key


REFUSED = [
    (
        "sdft",
        {"distillation_mode": "topk_logits", "distillation_topk": None},
        "distillation_topk is None; 'topk_logits'",
    ),
    ("sdft", {"distillation_mode": "logits"}, "distillation_mode must be one of 'full_logits', 'topk_logits', 'sam"),
    ("sdft", {"distillation_alpha": 1e-4}, "distillation_alpha is 0.0001; it may be 0 (forward KL), 1 (reverse KL)"),
    ("gkd", {"beta": 1e-4}, "beta is 0.0001; it may be 0 (forward KL), 1 (reverse KL)"),
    ("distillation", {"beta": 1e-4}, "beta is 0.0001; it may be 0 (forward KL), 1 (reverse KL)"),
    ("gold", {"use_uld_loss": True}, "use_uld_loss is True; it must be False here"),
    ("iw_opd", {"loss_top_k": 1}, "loss_top_k is 1; it must be 0 here: the fused loss compares whole vocabularies"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(name, options, message, tmp_path):
    arguments = {"reward_funcs": lengths} if name == "sdpo" else {}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TRAINERS[name][1]("no such model", args=config(name, tmp_path, **options), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_without_arguments_says_what_it_needs(name):
    kind = TRAINERS[name][1]
    if name in ("sdft", "sdpo", "distillation"):  # TRL gives the others' `model` a default
        with pytest.raises(TypeError, match=f"{kind.__name__}: missing a required argument: 'model'"):
            kind()
    if name not in ("distillation", "iw_opd"):  # of which TRL makes a configuration
        with pytest.raises(TypeError, match=f"{kind.__name__} needs args, the configuration that TRL has for it"):
            kind("no such model")


def test_outputs_with_logits_are_refused(pairs, folder):
    _, ours, inputs = pairs("gkd", False)
    assert ours.compute_loss(ours.model, inputs, return_outputs=True)[1] == {}
    with pytest.raises(ValueError, match="FusedGKDTrainer has no logits to return"):
        ours.predict(ours.train_dataset)
    with pytest.raises(ValueError, match="FusedGKDTrainer has no logits to return"):
        type(ours)("no such model", None, config("gkd", folder), compute_metrics=print)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"])), "an adapter in its output head"),
        (
            lambda model: get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
            "prompt",
        ),
        (lambda model: rescaled(model), "logits that its hidden states and its output head do not give"),
    ],
)
def test_a_head_that_is_not_one_matrix_is_refused(change, message):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has .*{message}"):
        check_head(change(tiny.tiny_model()))


def rescaled(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def test_a_head_that_is_trained_with_an_adapter_is_the_one_that_is_read():
    model = get_peft_model(tiny.tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained = model.base_model.model.lm_head.modules_to_save["default"]
    with torch.no_grad():
        trained.weight.add_(1)
    hidden = torch.randn(3, 32)
    assert torch.equal(View.of(model, hidden).logits(), trained(hidden))
    with model.disable_adapter():
        assert torch.equal(View.of(model, hidden).logits(), model.base_model.model.lm_head.original_module(hidden))
    check_head(model)


def test_trls_classes_construct_ours_until_that_is_undone(folder):
    class Mine(GKDTrainer):
        def compute_loss(self, *arguments, **named):
            return 2 * super().compute_loss(*arguments, **named)

    undo = apply_to_trl()
    try:
        trainer = build("gkd", folder, Mine, max_steps=1)
        assert isinstance(trainer, Mine) and isinstance(trainer, TRAINERS["gkd"][1])
        assert type(build("sdft", folder, SDFTTrainer)) is TRAINERS["sdft"][1]
        with pytest.raises(
            RuntimeError, match="DistillationTrainer constructs another class already: apply_to_trl was called"
        ):
            apply_to_trl()
        with pytest.raises(TypeError, match="model"):
            ServerDistillationTrainer.__init__(server := ServerDistillationTrainer.__new__(ServerDistillationTrainer))
        assert type(server) is ServerDistillationTrainer
        doubled = learnt(trainer)["logged"][0]["loss"]
    finally:
        undo()
    plain = build("gkd", folder, GKDTrainer, max_steps=1)
    assert type(plain) is GKDTrainer
    assert_close(doubled, 2 * learnt(plain)["logged"][0]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_two_processes_train_as_trls_do(folder, wrapped):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FSDP")}
    inherited |= {"FSDP": "1"} if wrapped == "FSDP2" else {}
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "tests" / "trl_trainers.py"), str(folder)],
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for name in (*trl_trainers.IN_TWO, "labels"):
        ours, theirs = (torch.load(folder / f"{name}-{whose}.pt") for whose in ("ours", "theirs"))
        assert_same_training(ours, theirs)
