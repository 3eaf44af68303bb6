"""Keys and values of the prompts that a frozen teacher has read, kept so that it need not read them again.

A prompt is seen again in every rollout of it, in every step that the rollouts serve, and in every epoch. Each is read
alone, whatever is scored beside it, and completions after it: so its numbers are the same whether it was kept or not,
and a run that is resumed, with nothing kept, goes on as one that was never stopped.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sdft._compat import with_cache
from sdft.batch import Sample
from sdft.errors import TrainingError
from sdft.forward import evaluating

Tokens = tuple[int, ...]
KeysAndValues = list[tuple[Tensor, Tensor]]  # of each layer, (heads, tokens, head dim)

#: Layers of a cache that hold nothing but keys and values.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)

MUST_BE_OFF = "teacher_cache_gib must be 0"


class PromptCache:
    """Keys and values of prompts, of at most `budget` bytes: what has not been asked for the longest goes first.

    While completions are scored, those of the batch's prompts, padded, and of its completions are there besides.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._kept: OrderedDict[Tokens, KeysAndValues] = OrderedDict()

    def __contains__(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt need not be read again."""
        return tuple(prompt[:-1]) in self._kept

    @torch.no_grad()
    def hidden_states(self, backbone: nn.Module, samples: Sequence[Sample], skip_tokens: int) -> Tensor:
        """The hidden states (N, H) at the teacher positions that `sdft.batch.lay_out` gives for these samples.

        `backbone` is always the same, with the same weights.
        """
        with evaluating(backbone):  # gradient checkpointing, which is for training, leaves no keys and values
            return self._hidden_states(backbone, samples, skip_tokens)

    def _hidden_states(self, backbone: nn.Module, samples: Sequence[Sample], skip_tokens: int) -> Tensor:
        samples = [sample.read() for sample in samples]
        # The last token of a prompt is read with the completion, which it predicts the first token of.
        prompts = [tuple(sample.teacher_prompt or ()) for sample in samples]
        rows = [
            [prompt[-1], *sample.completion][: max(1, len(sample.completion))]
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        before = torch.tensor([len(prompt) - 1 for prompt in prompts]).unsqueeze(1)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        past, now = int(before.max()), int(lengths.max())
        ids = torch.zeros(len(rows), now, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        # Prompts of a batch end at the same place, and those that are shorter begin later.
        seen = torch.arange(past + now) >= past - before
        positions = before + torch.arange(now).minimum(lengths - 1)
        scored = [
            number * now + place
            for number, sample in enumerate(samples)
            for place in range(skip_tokens, len(sample.completion))
        ]
        device = next(backbone.parameters()).device
        hidden = backbone(
            input_ids=ids.to(device),
            attention_mask=seen.long().to(device),
            position_ids=positions.to(device),
            use_cache=True,
            **with_cache(backbone, self._past(backbone, [prompt[:-1] for prompt in prompts], past)),
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, torch.tensor(scored, dtype=torch.long, device=device))

    def _past(self, backbone: nn.Module, prefixes: list[Tokens], length: int) -> DynamicCache:
        """The prefixes' keys and values as those of a batch, filled up at the start."""
        read = {prefix: self._find(backbone, prefix) for prefix in dict.fromkeys(prefixes) if prefix}
        past = DynamicCache()
        for layer, (keys, values) in enumerate(next(iter(read.values()), [])):
            batch = [like.new_zeros(len(prefixes), like.shape[0], length, like.shape[2]) for like in (keys, values)]
            for row, prefix in enumerate(prefixes):
                if prefix:
                    for states, own in zip(batch, read[prefix][layer], strict=True):
                        states[row, :, length - len(prefix) :] = own
            past.update(batch[0], batch[1], layer)
        return past

    def _find(self, backbone: nn.Module, prefix: Tokens) -> KeysAndValues:
        """Kept or computed; and kept, if there is room for it."""
        if prefix in self._kept:
            self._kept.move_to_end(prefix)
            return self._kept[prefix]
        found = _read(backbone, prefix)
        if _nbytes(found) > self.budget:  # no room would be enough
            return found
        self._kept[prefix] = found
        self.nbytes += _nbytes(found)
        while self.nbytes > self.budget:
            _, dropped = self._kept.popitem(last=False)
            self.nbytes -= _nbytes(dropped)
        return found


def _read(backbone: nn.Module, tokens: Tokens) -> KeysAndValues:
    ids = torch.tensor([tokens], device=next(backbone.parameters()).device)
    cache = DynamicCache()
    backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **with_cache(backbone, cache))
    layers = cast(list[DynamicLayer], cache.layers)
    return [(cast(Tensor, layer.keys)[0], cast(Tensor, layer.values)[0]) for layer in layers]


def _nbytes(states: KeysAndValues) -> int:
    return sum(tensor.nbytes for pair in states for tensor in pair)


def check_prompt_cache(
    model: PreTrainedModel, backbone: nn.Module, tokens: Sequence[int], autocast: torch.dtype | None = None
) -> None:
    """Refuse a model of which a kept prompt would make another: hidden states after one are compared with its own."""
    config = model.config.get_text_config(decoder=True)
    reason = None
    if any(type(layer) not in KEYS_AND_VALUES for layer in DynamicCache(config=config).layers):
        reason = "remembers what it has read in more than keys and values"
    elif "position_ids" not in inspect.signature(backbone.forward).parameters:
        reason = "cannot be told where tokens are"
    elif _depends_on_length(config):
        reason = "reads a prompt differently when what follows is long"
    if reason is not None:
        raise TrainingError(f"{type(model).__name__} {reason}, so that prompts cannot be kept: {MUST_BE_OFF}")
    whole = list(tokens)
    samples = [Sample([], whole, teacher_prompt=prompt) for prompt in (whole, whole[: 1 + len(whole) // 2])]
    with torch.no_grad(), torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None):
        kept = PromptCache(0).hidden_states(backbone, samples, 0).float()
        own = []
        for sample in samples:
            ids = torch.tensor([[*(sample.teacher_prompt or ()), *sample.completion]], device=model.device)
            own.append(backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -len(whole) - 1 : -1].float())
    expected = torch.cat(own)
    difference = ((kept - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()
    tolerance = max(1e-4, 8 * torch.finfo(autocast or model.dtype).eps)
    if not difference <= tolerance:  # a NaN is refused too
        raise TrainingError(
            f"{type(model).__name__} makes something else of a completion after a prompt that it has read before: its "
            f"hidden states differ by {difference:.2g} of the largest, where {tolerance:.2g} is rounding; {MUST_BE_OFF}"
        )


def _depends_on_length(config: Any) -> bool:
    """Whether a token's rotary embedding, or the scale of its attention, depends on where the sequence ends."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (parameters, *parameters.values()) if isinstance(part, dict)}
    return bool(kinds & {"longrope", "dynamic"}) or bool(getattr(config, "attn_temperature_tuning", False))
