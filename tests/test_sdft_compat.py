"""What is used of transformers and accelerate that is private or has other names in other releases."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers import core_model_loading as loading
from transformers.generation.continuous_batching import cb_logits_processors, continuous_api, requests

from sdft import _compat
from tests import tiny

HERE = f"transformers {transformers.__version__}"


@pytest.mark.parametrize("name", _compat.OVERRIDES)
def test_the_trainer_has_the_methods_that_are_overridden(name: str) -> None:
    needed = _compat.OVERRIDES[name]
    method = getattr(Trainer, name, None)
    assert method is not None, f"{HERE} has no Trainer.{name} any more, by which {needed.reason}"
    parameters = tuple(inspect.signature(method).parameters)[1:]
    assert parameters == needed.parameters, f"{HERE} calls Trainer.{name} with other arguments: {parameters}"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("_prepare_inputs", ["inputs"]), ("set_initial_training_values", ["args", "dataloader"])],
)
def test_the_trainer_has_the_methods_that_are_called(name: str, parameters: list[str]) -> None:
    method = getattr(Trainer, name, None)
    assert method is not None, f"{HERE} has no Trainer.{name} any more: see sdft._compat"
    assert list(inspect.signature(method).parameters)[1:] == parameters, f"{HERE} has another Trainer.{name}"


def test_the_trainer_counts_the_steps_last() -> None:
    counts = inspect.getsource(Trainer.set_initial_training_values).rpartition("return")[2]
    assert counts.strip(" ()\n").rstrip(",").endswith("max_steps"), f"{HERE} returns max_steps elsewhere: {counts}"


def test_the_trainer_can_be_kept_to_one_gpu() -> None:
    args = TrainingArguments(use_cpu=True, report_to="none")
    args._n_gpu = 4
    assert args.n_gpu == 4, f"{HERE} has another place for TrainingArguments._n_gpu: see sdft._compat.use_one_gpu"
    _compat.use_one_gpu(args)
    assert args.n_gpu == 1


def test_a_models_attention_and_cache_are_told() -> None:
    model = tiny.tiny_model()
    model.set_attn_implementation("eager")
    assert _compat.attention_of(model) == "eager", f"{HERE} keeps the attention's name elsewhere"
    assert hasattr(model, "_supports_default_dynamic_cache"), f"{HERE} no longer says who takes a DynamicCache"
    assert _compat.takes_dynamic_cache(model)


def test_accelerate_keeps_the_forward_pass_that_it_wraps() -> None:
    model = tiny.tiny_model()
    assert _compat.forward_without_autocast(model) is None
    forward = model.forward
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare_model(model)
    assert _compat.forward_without_autocast(model) == forward, "accelerate keeps the wrapped forward pass elsewhere"


def test_quantised_models_keep_their_conversions_where_they_are_removed() -> None:
    assert "model._weight_conversions" in inspect.getsource(loading), f"{HERE} has other names: see dequantized"


def test_weights_get_the_names_that_they_have_in_files(tmp_path: Path) -> None:
    shape = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
    }
    model = MixtralForCausalLM(MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    named = _compat.names_in_files(model, model.state_dict())
    assert named.keys() == written.keys() != model.state_dict().keys(), f"{HERE} saves by other names than these"
    assert all(torch.equal(named[name], weight) for name, weight in written.items())


def test_fsdp_marks_checkpointed_modules_by_this_name() -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    assert checkpoint_wrapper._CHECKPOINT_PREFIX == _compat.CHECKPOINTED, f"torch {torch.__version__} has another name"


def test_a_page_is_a_block_where_transformers_calls_it_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"page_size": 32, "auto_switch_to_flash": False, "num_blocks": 7}
    monkeypatch.setattr(_compat, "ContinuousBatchingConfig", dict)
    monkeypatch.setattr(_compat, "_PAGES_ARE_BLOCKS", True)
    assert _compat.batching_config(**given) == {"block_size": 32, "num_blocks": 7}
    monkeypatch.setattr(_compat, "_PAGES_ARE_BLOCKS", False)
    assert _compat.batching_config(**given) == given


def test_continuous_batching_is_set_as_before() -> None:
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    wanted = {"num_blocks", "max_batch_tokens", "seed", "use_cuda_graph", "use_async_batching"}
    assert wanted <= names, f"{HERE} has no {wanted - names} in ContinuousBatchingConfig"
    assert {"page_size", "block_size"} & names, f"{HERE} has another name for a page of the cache"
    assert len(inspect.signature(_compat.WorkloadHints).parameters) >= 3, f"{HERE} has other WorkloadHints"


def test_the_manager_of_continuous_batching_is_made_as_before() -> None:
    manager = tiny.tiny_model().init_continuous_batching(GenerationConfig(eos_token_id=-1, max_new_tokens=1))
    for name in ("logit_processor", "background_thread_status", "add_requests", "get_result", "is_running", "destroy"):
        assert hasattr(manager, name), f"{HERE} has no {name} in its manager of continuous batching"
    assert _compat.fatal_error(manager) is None
    added = _Processor()
    before = manager.logit_processor.tensors_required
    _compat.add_processor(manager, added)
    own: Any = manager.logit_processor
    assert isinstance(own, cb_logits_processors.ContinuousBatchingLogitsProcessorList), f"{HERE} has another list"
    made = cb_logits_processors.ContinuousBatchingLogitsProcessorList(LogitsProcessorList([added]))
    assert vars(made).keys() == vars(own).keys()
    assert own.do_processing and made.do_processing and own.tensors_required == before + 1
    assert list(own.logits_processor)[-1] is added


def test_a_storage_is_told_from_others_and_modes_see_what_item_runs() -> None:
    one, other = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    numbers = [_compat.storage_number(tensor.untyped_storage()) for tensor in (one, one[1:], other)]
    assert numbers[0] == numbers[1] != numbers[2], f"torch {torch.__version__} numbers storages in another way"
    seen = []

    class Seeing(_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Seeing():
        torch.ones(1).item()
    assert _compat.READ_NUMBER in seen, f"torch {torch.__version__} reads a number in another way"
    assert _compat.tree_leaves({"a": [1, (2,)]}) == [1, 2]


class _Processor(_compat.RequestProcessor):
    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return scores


def test_requests_have_names_and_tokens() -> None:
    state = requests.RequestState(request_id="r", initial_tokens=[1])
    assert hasattr(state, "generated_tokens"), f"{HERE} has another name for the tokens of a request"
    parts = inspect.signature(requests.FutureRequestState).parameters
    assert "state" in parts, f"{HERE} gives processors something else than states of requests: {list(parts)}"
    assert continuous_api.logger is logging.getLogger(_compat.BATCHING_LOGGER), f"{HERE} logs under another name"
