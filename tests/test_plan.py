"""`sdft plan`: tensors without values are counted as real ones are, and the report says what was found."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from sdft.cli import main
from sdft.planning.devices import GIB, memory_of
from sdft.planning.presets import config_of, preset_of, presets
from sdft.planning.pretend import Device, attention
from sdft.planning.report import longest_rollout
from sdft.planning.step import Lengths, Measured, Step
from sdft.planning.tracker import MemoryTracker, Peak
from sdft.settings.arguments import SDFTConfig
from sdft.settings.config import LoraArguments
from tests.tiny import tiny_model

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


def test_graph_is_counted_until_backward_frees_it():
    with MemoryTracker() as tracker:
        x = torch.empty(100, 100, device=META, requires_grad=True)
        y = x.exp().exp().sum()
        assert tracker.current == 3 * 40_000 + 4
        y.backward()
        del y
        assert tracker.current == 2 * 40_000  # x and its gradient


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


def measured_on_cpu(step, lengths):
    """The most that torch's CPU allocator held in the forward pass, the loss and the backward pass, above the start."""
    batch, _ = step._batch(lengths)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found, step.device.planning():
        step._micro_batch(batch)
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


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
    planned = Step(*given, Device("cpu"))
    before = planned.tracker.current
    batch, _ = planned._batch(lengths)
    planned.tracker.forget_peak()
    with planned.device.planning():
        planned._micro_batch(batch)
    found = measured_on_cpu(Step(*given, Device("cpu", real=True)), lengths)
    assert planned.tracker.peak.total - before == pytest.approx(found, rel=0.1)


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


# The longest rollout


@pytest.mark.parametrize("budget", [150_000, 1_000_000, 5_000_000])
def test_longest_rollout_is_found_along_lines_that_cross(budget):
    runs = []

    def run(length):
        runs.append(length)
        phases = {"one": Peak(100_000 + 20 * length, "one"), "two": Peak(60 * length, "two")}
        return Measured(max(phases.values(), key=lambda peak: peak.total), phases)

    found = longest_rollout(run, 1000, budget, 2**20)
    assert found in runs and run(found).peak.total <= budget
    assert run(found + 128).peak.total > 0.995 * budget
    assert len(runs) <= 8


def test_no_rollout_fits_where_the_weights_do_not():
    phases = {"one": Peak(10**9, "one")}
    assert longest_rollout(lambda length: Measured(phases["one"], phases), 1024, 10**6) == 0


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
    words = ["plan", str(recipe), "--prompt_tokens", "8", "--gpu", "T4", "--compare", "--output_file", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "not measured" in printed and "T4 has 16.00: the step fits" in printed and "lora_rank 64" in printed
    found = json.loads(out.read_text())
    assert found["measured_on_a_gpu"] is False and found["fits"] and found["rollout_tokens"] == 16
    assert sum(found["peak"]["parts"].values()) == found["peak"]["total"]
    assert set(found["phases"]) == {"rollouts", "scoring", "forward", "backward", "optimizer step"}


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "sft"],
        ["--demonstration_weight", "0.5", "--num_iterations", "2"],
        ["--rollout_tokens", "1", "--rollout_from", "teacher", "--bf16"],
        ["--max_forward_tokens", "64", "--rollout_batch_size", "2", "--freeze_embeddings"],
        ["--lora_rank", "4", "--teacher", "ema", "--optim", "adamw_torch", "--rollout_batch_size", "auto"],
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
        (["--optim", "adafactor"], "--optim is 'adafactor'; of optimizers sdft plan knows"),
        (["--teacher_offload"], "--teacher_offload is True, which sdft plan does not know"),
        (
            ["--activation_checkpointing", "--activation_offload"],
            "--activation_offload is True, which sdft plan does not know",
        ),
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
