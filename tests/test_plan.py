"""`sdft plan`: tensors without values are counted as real ones are, and the report says what was found."""

import json
import random

import pytest
import torch
from torch.overrides import _len_torch_function_stack as len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack as len_torch_dispatch_stack
from transformers import AutoModelForCausalLM

from benchmarks.plan_check import measured, planned
from sdft._compat import storage_number
from sdft.cli import main
from sdft.commands.train import say_what_is_planned
from sdft.early_checks import BITSANDBYTES, TORCHAO
from sdft.planning.ahead import longest, plan_ahead
from sdft.planning.devices import GIB, memory_of
from sdft.planning.optimizers import COMPUTED, state_of
from sdft.planning.presets import config_of, preset_of, presets
from sdft.planning.pretend import Device, attention
from sdft.planning.quantised import QuantisedLinear
from sdft.planning.report import longest_rollout
from sdft.planning.shapes import Shapes
from sdft.planning.step import Lengths, Measured, Step
from sdft.planning.tracker import MemoryTracker, Peak
from sdft.settings.arguments import SDFTConfig
from sdft.settings.inputs import LoraArguments
from sdft.trainer import SDFTTrainer
from tests.tiny import rows, tiny_model, tiny_tokenizer

META = torch.device("meta")


# The tracker


def test_storage_counts_until_nothing_refers_to_it():
    with MemoryTracker() as tracker:
        one = torch.empty(1000, device=META)
        assert tracker.current == 4000
        view = one[10:].view(2, -1)
        two = one + 1
        assert tracker.current == 8000
        del one
        assert tracker.current == 8000  # the view keeps it
        del view
        assert tracker.current == 4000
        two.mul_(2)
        assert (tracker.current, tracker.peak.total) == (4000, 8000)


def test_parts_are_those_of_the_moment_of_the_peak():
    with MemoryTracker() as tracker:
        with tracker.phase("first"), tracker.part("weights"):
            weights = torch.empty(100, device=META)
        with tracker.phase("second"), tracker.part("others"):
            other = torch.empty(50, device=META)
            tracker.relabel(other, "gradients")
            last = torch.empty(10, device=META)
        del other, last
    assert tracker.peak == Peak(640, "second", {"weights": 400, "gradients": 200, "others": 40})
    assert tracker.peaks["first"].total == 400
    assert tracker.parts == {"weights": 400} and weights.numel() == 100


def test_sizes_are_rounded_as_an_allocator_gives_them_out():
    with MemoryTracker(512) as tracker:
        kept = [torch.empty(1, device=META), torch.empty(129, device=META)]
    assert tracker.current == 512 + 1024 and len(kept) == 2


def test_host_memory_counts_by_itself():
    with MemoryTracker() as tracker:
        on_device = torch.empty(100, device=META)
        with tracker.in_host_memory(), tracker.part("teacher"):
            on_host = torch.empty(50, device=META)
    assert tracker.is_on_host(on_host) and not tracker.is_on_host(on_device)
    assert (tracker.current, tracker.host_peak) == (400, Peak(200, "", {"teacher": 200}))
    del on_host
    with tracker:
        tracker.forget_peak()
    assert tracker.host_peak == Peak()


def test_graph_is_counted_until_backward_frees_it():
    with MemoryTracker() as tracker:
        x = torch.empty(100, 100, device=META, requires_grad=True)
        y = x.exp().exp().sum()
        assert tracker.current == 3 * 40_000 + 4
        y.backward()
        del y
        assert tracker.current == 2 * 40_000  # x and its gradient


def test_results_are_remembered_by_shape_and_memory_is_shared_as_before():
    shapes, aten = Shapes(), torch.ops.aten
    for count in (3, 3, 5):
        x = torch.empty(count, 4, device=META)
        new = shapes.run(aten.exp.default, (x,), {})
        assert new.shape == x.shape and storage_number(new.untyped_storage()) != storage_number(x.untyped_storage())
        assert shapes.run(aten.mul_.Tensor, (x, 2), {}) is x
        view = shapes.run(aten.view.default, (x, [count * 4]), {})
        assert storage_number(view.untyped_storage()) == storage_number(x.untyped_storage())
        assert shapes.run(aten.sum.dim_IntList, (x, [1]), {"dtype": torch.float64}).dtype == torch.float64
        assert shapes.run(aten.add.Tensor, (x, 1), {}).dtype == torch.float32
        ids = torch.empty(count, dtype=torch.long, device=META)
        assert [shapes.run(aten.add.Tensor, (ids, n), {}).dtype for n in (1, 1.0)] == [torch.long, torch.float32]


# Attention


def attention_bytes(length, implementation):
    device = Device()
    with device.planning():
        q = torch.empty(1, 4, length, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        before = device.tracker.current
        out = implementation(q, q, q)
        kept = device.tracker.current - before
        out.sum().backward()
    return kept


def eager(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def test_attention_of_flash_kernels_grows_with_the_length_and_eager_with_its_square():
    flash = [attention_bytes(length, attention) for length in (1024, 2048)]
    assert flash == [4 * n * (64 * 2 + 4) for n in (1024, 2048)]
    squares = [attention_bytes(length, eager) for length in (1024, 2048)]
    assert squares[0] >= 4 * 1024**2 * 2 and squares[1] > 3.5 * squares[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_step_holds_a_square_for_eager_attention_alone(implementation):
    config = tiny_model(max_position_embeddings=8192).config
    config._attn_implementation = implementation
    step = Step(config, "bfloat16", LoraArguments(), settings())
    short, long = (step.run(Lengths(8, n, 0)).phases["forward"].total for n in (1024, 4096))
    assert (long > 4 * 4096**2 * 2) == (implementation == "eager")
    assert short < long


# A step


def settings(**options):
    given = {"output_dir": "unused", "report_to": "none", "per_device_train_batch_size": 2, **options}
    return SDFTConfig(**given)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(("mixed", "teacher"), [(False, "base"), (True, "base"), (True, "live"), (True, "ema")])
def test_planned_peak_is_what_the_allocator_held_on_a_cpu(checkpointing, rank, mixed, teacher):
    options = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 2003, "num_hidden_layers": 4}
    config = tiny_model(**options).config
    told = settings(activation_checkpointing=checkpointing, teacher=teacher)
    told.bf16 = mixed  # which transformers takes only where there is a GPU
    given = (config, "float32", LoraArguments(lora_rank=rank), told)
    lengths = Lengths(32, 300, 40)
    found = measured(given, lengths)
    assert planned(given, lengths) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_peak_is_what_the_allocator_held_where_a_sample_goes_in_tiles(checkpointing):
    config = tiny_model(hidden_size=128, intermediate_size=1536, num_hidden_layers=4).config
    lengths, peaks = Lengths(32, 300, 40), {}
    for tokens in (None, 64):
        told = settings(activation_checkpointing=checkpointing, max_forward_tokens=tokens)
        told.per_device_train_batch_size = 1
        given = (config, "float32", LoraArguments(), told)
        peaks[tokens] = planned(given, lengths)
        found = measured(given, lengths)
        assert peaks[tokens] == pytest.approx(found, rel=0.1)
    assert peaks[64] < peaks[None]


def test_peak_has_the_parts_of_full_fine_tuning():
    config = tiny_model().config
    step = Step(config, "float32", LoraArguments(), settings(gradient_accumulation_steps=2))
    numbers = step.parameters * 4
    measured = step.run(Lengths(8, 64, 16))
    parts = measured.phases["optimizer step"].parts
    for name, times in (("weights", 1), ("teacher", 1), ("gradients", 1), ("optimizer", 2)):
        assert parts[name] == pytest.approx(times * numbers, rel=0.3), name  # sizes are rounded up
    assert measured.peak.total == max(phase.total for phase in measured.phases.values())
    left = step.tracker.current
    assert step.run(Lengths(8, 64, 16)) == measured and step.tracker.current == left


def test_settings_that_save_memory_do():
    config = config_of("SmolLM2-135M")
    config.num_hidden_layers = 4

    def peak(rank=0, dtype="float32", **options):
        return (
            Step(config, dtype, LoraArguments(lora_rank=rank), settings(**options)).run(Lengths(64, 512, 64)).peak.total
        )

    whole = peak()
    assert peak(activation_checkpointing=True) < whole
    assert peak(rank=16) < whole
    assert peak(optim="adamw_8bit") < whole
    assert peak(teacher="live") < whole
    assert peak(dtype="bfloat16") < whole
    assert peak(teacher="ema") >= whole


MANY_LAYERS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "max_position_embeddings": 8192}


def test_offloaded_teacher_has_its_layers_in_host_memory_but_for_one():
    config = tiny_model(**MANY_LAYERS).config

    def run(**options):
        step = Step(config, "bfloat16", LoraArguments(), settings(**options))
        layers = sum(p.numel() for name, p in step.learner.named_parameters() if "layers." in name)
        return step.run(Lengths(8, 64, 0)), layers

    whole, layers = run()
    base, _ = run(teacher_offload=True)
    assert base.host.parts["teacher"] == pytest.approx(2 * layers, rel=0.1)
    for phase, left in (("forward", 0), ("scoring", 1 / 8)):
        saved = whole.phases[phase].total - base.phases[phase].total
        assert saved == pytest.approx(2 * layers * (1 - left), rel=0.1), phase
    ema, _ = run(teacher_offload=True, teacher="ema")
    assert ema.host.parts["teacher"] > 2.9 * base.host.parts["teacher"]  # with a float32 average
    assert ema.phases["forward"].total == pytest.approx(base.phases["forward"].total, rel=0.02)


def test_offloaded_activations_are_in_host_memory_but_for_those_in_flight():
    config, lengths = tiny_model(**MANY_LAYERS).config, Lengths(8, 2040, 0)
    kept, offloaded = (
        Step(config, "float32", LoraArguments(), settings(activation_checkpointing=True, activation_offload=on)).run(
            lengths
        )
        for on in (False, True)
    )
    inputs = 2 * 2048 * 128 * 4
    assert offloaded.host.parts["activations"] >= 8 * inputs
    saved = kept.phases["backward"].total - offloaded.phases["backward"].total
    assert 5 * inputs <= saved <= 8 * inputs


def test_mixed_precision_in_float16_takes_what_it_takes_in_bfloat16():
    found = {}
    for name in ("bf16", "fp16"):
        told = settings()
        setattr(told, name, True)
        found[name] = Step(tiny_model().config, "float32", LoraArguments(), told).run(Lengths(8, 64, 16))
    assert found["bf16"] == found["fp16"]


# Weights in few bits

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("told", "each"),
    [
        (NF4, 1 / 2 + 4 / 64),
        (NF4 | {"bnb_4bit_use_double_quant": True}, 1 / 2 + 1 / 64 + 4 / (64 * 256)),
        ({"load_in_8bit": True}, 1 + 4 / 256),
    ],
)
def test_quantised_weights_have_their_bytes(told, each):
    options = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 7}
    config = tiny_model(**options).config
    plain = Step(config, "bfloat16", LoraArguments(lora_rank=8), settings())
    layers = sum(p.numel() for name, p in plain.learner.named_parameters() if "base_layer" in name)
    config.quantization_config = told
    step = Step(config, "bfloat16", LoraArguments(lora_rank=8), settings())
    assert step.parameters == plain.parameters
    saved = plain.tracker.parts["weights"] - step.tracker.parts["weights"]
    assert saved == pytest.approx((2 - each) * layers, rel=5e-3)  # sizes are rounded up
    assert step.tracker.parts["adapter"] == plain.tracker.parts["adapter"]


def is_packed(module):
    return isinstance(module, QuantisedLinear)


@pytest.mark.parametrize("told", [NF4, {"load_in_8bit": True}])
def test_quantised_weights_are_unpacked_one_at_a_time(told):
    config = tiny_model(**MANY_LAYERS).config
    config.quantization_config = told
    step = Step(config, "bfloat16", LoraArguments(lora_rank=8), settings(activation_checkpointing=True))
    one, layers = 2 * 128 * 256, 2 * sum(m.in_features * m.out_features for m in step.learner.modules() if is_packed(m))
    assert one <= step.run(Lengths(8, 8, 0)).phases["backward"].parts["backward"] < layers / 5


@pytest.mark.parametrize(
    ("told", "rank", "message"),
    [
        (NF4, "0", "lora_rank is 0, and the model's weights are in 4 bits, which do not train; it must be at least 1"),
        ({"quant_method": "gptq", "bits": 4}, "4", "model has a quantization_config of gptq; sdft plan knows that of"),
    ],
)
def test_quantised_model_that_is_not_planned(tmp_path, told, rank, message, capsys):
    config = tiny_model().config
    config.quantization_config = told
    config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--lora_rank", rank]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


# Optimizers


@pytest.mark.parametrize(("name", "numbers"), [("sgd", 0), ("adagrad", 1), ("rmsprop", 1), ("adamw_torch", 2)])
def test_optimizer_that_torch_has_is_run(name, numbers):
    step = Step(tiny_model(**MANY_LAYERS).config, "float32", LoraArguments(), settings(optim=name))
    assert step.tracker.parts.get("optimizer", 0) == pytest.approx(numbers * 4 * step.parameters, rel=0.02)


def test_adafactor_keeps_rows_and_columns_and_makes_copies_of_one_parameter_on_the_way():
    step = Step(tiny_model(**MANY_LAYERS).config, "bfloat16", LoraArguments(), settings(optim="adafactor"))
    assert step.tracker.parts["optimizer"] < 0.1 * step.parameters
    assert step.run(Lengths(8, 16, 0)).phases["optimizer step"].parts["optimizer step"] >= 3 * 4 * 128 * 256


def test_the_packages_of_optimizers_are_known_before_transformers_is_imported():
    assert {name for name, state in COMPUTED.items() if state.bitsandbytes} == set(BITSANDBYTES)
    assert {name for name, state in COMPUTED.items() if not state.bitsandbytes} == set(TORCHAO)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw_bnb_8bit", 2 * (1 + 4 / 256)),
        ("lion_8bit", 1 + 4 / 256),
        ("ademamix", 12),
        ("adamw_torch_4bit", 2 * (1 / 2 + 4 / 128)),
        ("paged_adamw_32bit", 8),
    ],
)
def test_state_in_few_bits_is_computed(name, each):
    weight, small = (torch.nn.Parameter(torch.empty(n, 256, dtype=torch.bfloat16, device=META)) for n in (512, 2))
    state = state_of(name)
    assert state.bytes_of(weight, embedding=False) == each * 512 * 256
    bitsandbytes = name != "adamw_torch_4bit"
    assert state.bytes_of(weight, embedding=True) == (state.numbers * 4 if bitsandbytes else each) * 512 * 256
    assert state.bytes_of(small, embedding=False) == state.numbers * (4 if bitsandbytes else 2) * 512


def test_paged_state_is_in_host_memory():
    options = tiny_model(**MANY_LAYERS).config, "float32", LoraArguments()
    there, paged = (Step(*options, settings(optim=name)) for name in ("adamw_8bit", "paged_adamw_8bit"))
    lengths = Lengths(8, 16, 0)
    assert paged.run(lengths).host.parts == {"optimizer": there.tracker.parts["optimizer"]}
    assert "optimizer" not in paged.tracker.parts


# Other losses


def test_full_logits_take_copies_of_them_and_the_step_with_another_loss_has_all_its_other_phases():
    config = tiny_model(vocab_size=50_001, max_position_embeddings=8192).config
    step = Step(config, "bfloat16", LoraArguments(), settings())
    lengths = Lengths(8, 2000, 0)
    measured = step.run(lengths)
    logits = 2 * 2000 * 50_001 * 4
    before = measured.phases["forward"].total
    full = measured.with_loss("full logits")
    assert 4 * logits < full.phases["loss"].total - before < 7 * logits
    tiles = measured.with_loss("TRL's tiles").phases["loss"].total - before
    assert tiles == pytest.approx((2 * 4 + 2) * 4000 * 32_768, rel=0.05)
    assert {name: full.phases[name] for name in full.phases if name != "loss"} == {
        name: phase for name, phase in measured.phases.items() if name != "loss"
    }
    assert measured.peak.total < full.peak.total == full.phases["loss"].total


def test_supervised_step_has_no_other_loss():
    measured = Step(tiny_model().config, "float32", LoraArguments(), settings(method="sft")).run(Lengths(8, 16, 16))
    assert measured.other_losses == {} and measured.phases["loss"].total > 0


# The longest rollout


@pytest.mark.parametrize("budget", [150_000, 1_000_000, 5_000_000])
def test_longest_rollout_is_found_along_lines_that_cross(budget):
    runs = []

    def run(length):
        runs.append(length)
        phases = {"one": Peak(100_000 + 20 * length, "one"), "two": Peak(60 * length, "two")}
        return Measured(phases)

    found = longest_rollout(run, 1000, budget, 2**20)
    assert found in runs and run(found).peak.total <= budget
    assert run(found + 128).peak.total > 0.995 * budget
    assert len(runs) <= 7
    more = []
    known = {length: run(length) for length in (1000, found, found + 128)}
    assert longest_rollout(lambda length: more.append(length) or run(length), 1000, budget, 2**20, known) == found
    assert not more


def test_no_rollout_fits_where_the_weights_do_not():
    phases = {"one": Peak(10**9, "one")}
    assert longest_rollout(lambda length: Measured(phases), 1024, 10**6) == 0


# Models and cards

#: Parameters as their publishers count them; Gemma 3's from its report, without what sees.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 675e6 + 3209e6,
    "gemma-3-12b": 1012e6 + 10759e6,
    "gemma-3-27b": 1416e6 + 25600e6,
    "Mistral-7B-v0.3": 7_248_023_552,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


def test_every_preset_has_a_published_size():
    assert set(presets()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_as_many_parameters_as_published(name):
    with META:
        model = AutoModelForCausalLM.from_config(config_of(name))
    rel = 2e-3 if isinstance(PUBLISHED[name], float) else 0
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PUBLISHED[name], rel=rel, abs=0)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", None),
        ("smollm2-135m-instruct", "SmolLM2-135M"),
        ("someone/another", None),
    ],
)
def test_preset_is_found_by_a_hub_name(name, preset):
    assert preset_of(name) == preset


def test_memory_of_cards_and_sizes():
    assert memory_of("80GiB") == memory_of("h100") == 80 * GIB
    assert memory_of("24 gb") == 24 * 10**9


# The command


@pytest.fixture
def folder(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_command_plans_a_folder_that_has_no_weights(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {folder}\ntrain_file: rows.jsonl\nmax_completion_length: 16\nreport_to: none\n")
    out = tmp_path / "plan.json"
    picture = tmp_path / "plan.png"
    words = ["plan", str(recipe), "--prompt_tokens", "8", "--gpu", "T4", "--compare", "--output_file", str(out)]
    assert main([*words, "--plot_file", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "full logits" in printed and "TRL's tiles" in printed
    assert "not measured" in printed and "T4 has 16.00: the step fits" in printed and "lora_rank 64" in printed
    found = json.loads(out.read_text())
    assert found["measured_on_a_gpu"] is False and found["fits"] and found["rollout_tokens"] == 16
    assert sum(found["peak"]["parts"].values()) == found["peak"]["total"]
    assert set(found["phases"]) == {"rollouts", "scoring", "forward", "loss", "backward", "optimizer step"}
    assert set(found["other_losses"]) == {"full logits", "TRL's tiles"}


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "sft"],
        ["--demonstration_weight", "0.5", "--num_iterations", "2"],
        ["--divergence_clip", "2", "--num_iterations", "2"],
        ["--token_weighting", "early", "--demonstration_weight", "0.5"],
        ["--rollout_tokens", "1", "--rollout_from", "teacher", "--bf16"],
        ["--max_forward_tokens", "64", "--rollout_batch_size", "2", "--freeze_embeddings"],
        ["--lora_rank", "4", "--teacher", "ema", "--optim", "adamw_torch", "--rollout_batch_size", "auto"],
        ["--fp16", "--optim", "paged_adamw_8bit", "--teacher_offload", "--activation_checkpointing", "--compare"],
    ],
)
def test_command_plans_every_kind_of_step(folder, words, capsys):
    assert main(["plan", "--model", folder, "--max_completion_length", "16", "--prompt_tokens", "8", *words]) == 0
    assert "the longest rollout that fits" in capsys.readouterr().out


def test_a_plan_says_that_vllms_engine_is_not_in_it(folder, capsys):
    words = ["--max_completion_length", "4", "--prompt_tokens", "8", "--rollout_backend", "vllm"]
    assert main(["plan", "--model", folder, *words, "--vllm_memory_share", "0.4"]) == 0
    assert "vLLM's engine is not in these numbers: 0.4 of the GPU during rollouts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "B52"], "--gpu is 'B52'; it may be a size such as 80GiB, H100, H200, A100, L40S, RTX4090, RTX3090"),
        (["--gpu", "0GiB"], "--gpu is '0GiB'; it may be a size"),
        (["--model", "./nowhere"], "model is './nowhere', whose config.json is not on this machine; it may be"),
        (["--optim", "galore_adamw"], "--optim is 'galore_adamw'; of optimizers sdft plan knows"),
        (["--fp16", "--bf16"], "--fp16 and bf16 are True; at most one may be"),
        (["--teacher_offload", "--lora_rank", "4"], "--teacher_offload is True, and the teacher of a model with an"),
        (["--plot_file", "no/such.png"], "--plot_file is 'no/such.png'; there is no such folder to write it in"),
        (["--prompt_tokens", "0"], "--prompt_tokens is 0; it must be a whole number of at least 1"),
        (["--rollout_tokens", "3", "--skip_tokens", "3"], "--rollout_tokens is 3; it must be above skip_tokens"),
        (["nowhere.yaml"], "nowhere.yaml is not there: no such recipe"),
    ],
)
def test_mistake_is_one_sentence(folder, words, message, capsys):
    model = [] if "--model" in words else ["--model", folder]
    assert main(["plan", *words, *model]) == 2
    said = capsys.readouterr().err
    assert message.removeprefix("--model ") in said and said.count("\n") == 1


# Before a run


@pytest.fixture
def trainer(tmp_path):
    config = settings(output_dir=str(tmp_path), max_completion_length=24, use_cpu=True)
    model = tiny_model(max_position_embeddings=512)
    return SDFTTrainer(model, config, train_dataset=rows(), processing_class=tiny_tokenizer())


def numbers_and_modes():
    return (
        (torch.initial_seed(), torch.random.get_rng_state().tolist(), random.getstate()),
        (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_autocast_enabled()),
        (len_torch_function_stack(), len_torch_dispatch_stack()),
        (torch.cuda.Stream, torch.nn.functional.scaled_dot_product_attention, torch.clear_autocast_cache),
    )


def test_line_before_a_run_says_what_the_step_takes_and_leaves_the_run_as_it_was(trainer, caplog):
    before, config = numbers_and_modes(), trainer.student.config.to_dict()
    line = plan_ahead(trainer, "float32", LoraArguments(), 80 * GIB)
    assert line == "a step is planned to take 1.0 GiB of 80.0 at most, with completions of 24 tokens"
    assert numbers_and_modes() == before and trainer.student.config.to_dict() == config
    assert not caplog.records
    assert longest(trainer).rollout == 24 and longest(trainer).demonstration > 0


def test_step_that_does_not_fit_is_a_warning(trainer, caplog):
    assert plan_ahead(trainer, "float32", LoraArguments(), GIB)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sdft plan --compare shows settings that take less" in caplog.text


@pytest.mark.parametrize(("name", "value", "patience"), [("optim", "galore_adamw", 20.0), ("optim", "sgd", 0.0)])
def test_plan_that_fails_or_takes_too_long_is_a_line_for_debugging(trainer, caplog, name, value, patience):
    before = numbers_and_modes()
    setattr(trainer.args, name, value)
    with caplog.at_level("DEBUG", logger="sdft.planning.ahead"):
        assert plan_ahead(trainer, "float32", LoraArguments(), GIB, patience=patience) is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert numbers_and_modes() == before


def test_nothing_is_planned_before_a_run_on_a_cpu(trainer, capsys):
    say_what_is_planned(trainer, None, None)
    assert capsys.readouterr().out == ""
