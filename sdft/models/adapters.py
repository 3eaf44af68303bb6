"""What peft puts on a model: checked before it trains, found in it, and merged into it when it is loaded.

Every type of adapter, and every option of LoRA's, stands in one of the lists below (tests/test_sdft_inherited holds the
installed peft against them). A type or an option that is in none is refused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from sdft._compat import dequantized
from sdft.errors import UsageError, counted, kind_of

if TYPE_CHECKING:
    from sdft.settings.inputs import LoraArguments

#: Types of adapters that lie in layers, so that the loss finds the backbone's hidden states and the adapter merges.
ADAPTERS = frozenset(
    """
    LORA BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR MISS OFT OSF PEANUT
    PSOFT RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
    """.split()  # noqa: SIM905
)
_PROMPTS = "it learns what is put before the text, which the backbone's own hidden states know nothing of"
_OWN_LOOP = "it takes a training loop that allots its ranks"
_MIXES = "it mixes adapters that are there before"
_NOT_MERGED = "it cannot be merged into the model's weights"
_RANDOM = "it is random in training, where student and teacher are compared token by token"
_CHANGES = "it changes the model's own weights, and the teacher is the model without the adapter"
REFUSED_ADAPTERS = {
    "ADALORA": _OWN_LOOP,
    "ADAMSS": _OWN_LOOP,
    "ADAPTION_PROMPT": _PROMPTS,
    "BEFT": _NOT_MERGED,
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "LILY": _NOT_MERGED,
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "POLY": "it routes tasks, and rows have none",
    "PREFIX_TUNING": _PROMPTS,
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "PVERA": _RANDOM,
    "SHADOW": _NOT_MERGED,
    "XLORA": _MIXES,
}
#: Options of LoRA's that do here what peft says that they do.
LORA_OPTIONS = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core
    trainable_token_indices loftq_config eva_config corda_config lora_ga_config use_dora velora_config use_qalora
    qalora_group_size runtime_config target_parameters use_bdlora ensure_weight_tying
    """.split()  # noqa: SIM905
)
REFUSED_LORA = {
    "alora_invocation_tokens": _NOT_MERGED,
    "arrow_config": _MIXES,
    "kasa_config": _CHANGES,
    "layer_replication": _NOT_MERGED,
    "lora_bias": _NOT_MERGED,
    "monteclora_config": _RANDOM,
}
#: Values of init_lora_weights, by how they begin, with which LoRA changes the weights under it.
REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

ONLY = "default"  # what peft calls an adapter for which no name is given, and saves where the model is
SAMPLES = 64  # numbers by which a parameter is known again


def check_adapter(config: Any) -> None:
    """UsageError for an adapter, by its peft configuration, that could not be trained or loaded again as it was."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ADAPTERS:
        reason = REFUSED_ADAPTERS.get(kind, "it is not known to work here")
        raise UsageError(f"peft_config is of type {kind}, which is refused: {reason}; LORA and others are taken")
    if kind == "LORA":
        _check_lora(config)


def _check_lora(config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in LORA_OPTIONS or value == field.default:
            continue
        if field.name in REFUSED_LORA or value != getattr(type(config)(), field.name):
            reason = REFUSED_LORA.get(field.name, "it is not known to work here")
            raise UsageError(f"{field.name} is {value!r}; it must not be set: {reason}")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(REFUSED_STARTS):
        raise UsageError(f"init_lora_weights is {start!r}; it must not be: {_CHANGES}")


def check_adapters(model: nn.Module) -> None:
    """UsageError for the adapters of a model that could not be trained, or saved and loaded again, as they are."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})  # a transformers model has them by add_adapter
    if configs and not (has_adapter(model) or isinstance(model, PreTrainedModel)):
        raise UsageError(f"model is a {type(model).__name__}, which does not load again; it must be by get_peft_model")
    if configs and list(configs) != [ONLY]:
        raise UsageError(
            f"the model has {counted(len(configs), 'adapter')} ({', '.join(configs)}); it must have one, which is "
            f"called {ONLY!r}, for that is what a saved model consists of"
        )
    for config in configs.values():
        check_adapter(config)


def adapted(model: PreTrainedModel, config: Any) -> nn.Module:
    """The model with a fresh adapter. UsageError for one that is refused, or changes the model's own weights."""
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        raise UsageError(f"peft_config is {kind_of(config)}; it must be a configuration of peft's, such as LoraConfig")
    check_adapter(config)
    if any(is_adapted(layer) for layer in model.modules()):
        raise UsageError("peft_config is set, and the model has an adapter; it must be one or the other")
    own = [(parameter, _sample(parameter)) for parameter in model.parameters()]
    learner = get_peft_model(model, config)
    kept = {id(parameter) for parameter in learner.parameters()}
    if not all(id(parameter) in kept and torch.equal(_sample(parameter), before) for parameter, before in own):
        raise UsageError(f"peft_config is {config!r}; it must be of another kind: {_CHANGES}")
    return learner


def check_new_tokens(model: nn.Module) -> None:
    """UsageError for an adapter in the embeddings of a model that was given new tokens, whose head peft does not save.

    peft saves both where neither is adapted, and a head that is named in modules_to_save.
    """
    if not has_adapter(model):
        return
    bare = causal_lm(model)
    embeddings, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    if is_tied(bare) or is_adapted(head) or not hasattr(embeddings, "base_layer"):
        return
    try:
        before = AutoConfig.from_pretrained(str(bare.name_or_path), local_files_only=True).get_text_config().vocab_size
    except (OSError, ValueError):  # a model from nowhere, or from a GGUF file
        return
    if (rows := len(cast(Tensor, embeddings.weight))) != before:
        raise UsageError(
            f"the model has {rows} tokens, {bare.name_or_path} has {before}, and the adapter is in its embeddings but "
            "not in its head, whose new rows would not be saved; modules_to_save must name the head"
        )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's own weight is that of the embeddings."""
    return _own(model.get_output_embeddings()).weight is _own(model.get_input_embeddings()).weight


def _own(layer: Any) -> Any:
    """A layer without what peft has put around it."""
    return getattr(layer, "base_layer", getattr(layer, "original_module", layer))


def _sample(parameter: Tensor) -> Tensor:
    """A few of a parameter's numbers."""
    numbers = parameter.detach().reshape(-1)
    return numbers[:: max(1, len(numbers) // SAMPLES)].clone()


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
        learner = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"lora_target_modules is {settings.lora_target_modules}: {error}") from error
    if is_adapted(model.get_output_embeddings()):
        raise UsageError(
            f"lora_target_modules is {settings.lora_target_modules}; it must leave out the output head, whose weight "
            "the loss takes as one matrix"
        )
    return learner


def merged(peft_model: Any, model: PreTrainedModel, folder: str) -> PreTrainedModel:
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
    if is_tied(model) and is_adapted(embeddings) and not is_adapted(head):
        untie(model)  # the adapter is in the embeddings alone, and would be merged into the head
    return _merge(adapted, folder)


@torch.no_grad()
def _merge(adapted: Any, folder: str) -> PreTrainedModel:
    """The model of an adapted one, each of whose layers gives what it gave with its adapter, as far as its type goes.

    Layers are compared one by one, each on what reaches it: rounding adds up over a whole model, and errors may not.
    """
    model = cast(PreTrainedModel, adapted.get_base_model())
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in layers)
        if (is_adapted(layer) or layer is model.get_output_embeddings()) and not within:
            layers[name] = layer
    calls: dict[str, tuple[tuple, dict[str, Any], Tensor]] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, args, options, output, name=name: calls.update({name: (args, options, _first(output).clone())}),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    model(input_ids=torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None])
    for hook in hooks:
        hook.remove()
    merged = cast(PreTrainedModel, adapted.merge_and_unload())
    limit = max(1e-4, 4 * torch.finfo(merged.dtype).eps)
    for name, (args, options, expected) in calls.items():
        moved = (_first(merged.get_submodule(name)(*args, **options)) - expected).float().norm()
        if not moved <= limit * expected.float().norm():
            raise UsageError(
                f"model is {folder!r}, an adapter that cannot be merged into its model: what {name} gives differs then "
                f"by {moved / expected.float().norm():.2g}, where {limit:.2g} is rounding"
            )
    return merged


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The model's weights by name, as they would be with its adapter merged; the model stays as it is.

    They come in parts: the weights without an adapter, then those of a layer at a time, merged in a copy of it.
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if is_adapted(layer) and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = layer
    prefixes = tuple(f"{name}." for name in layers)
    yield {name: weight for name, weight in model.state_dict().items() if not name.startswith(prefixes)}
    for name, layer in layers.items():
        own: Any = copy.deepcopy(layer)
        if hasattr(own, "unload_and_optionally_merge_module"):  # modules_to_save, trained tokens
            own = own.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            own.merge()
            own = own.get_base_layer()
        yield {f"{name}.{of}": weight for of, weight in own.state_dict().items()}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _vocabulary(model: PreTrainedModel, folder: str) -> int | None:
    """How many tokens an adapter's own embeddings have, where there are such; the model was resized before then."""
    from peft import load_peft_weights

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    weights = load_peft_weights(folder, device="cpu")
    names = [f"base_model.model.{name}.{of}weight" for of in ("", "base_layer.", "token_adapter.base_layer.")]
    saved = next((len(weights[name]) for name in names if name in weights), None)
    return None if saved == len(cast(Tensor, embeddings.weight)) else saved


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether peft has put something around a layer: an adapter, or a copy of it that trains."""
    return hasattr(layer, "active_adapters") and not isinstance(layer, PreTrainedModel)  # models have a method so named


def untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own, and have the configuration say so."""
    head = cast(nn.Module, model.get_output_embeddings())
    head.weight = nn.Parameter(cast(Tensor, head.weight).detach().clone())
    for config in (model.config, model.config.get_text_config()):
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False
