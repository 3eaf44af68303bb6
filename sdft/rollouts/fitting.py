"""How many rollouts are written at once where that is for the memory to say.

A rollout takes memory for the keys and values of its prompt and of all tokens that it may have, for its logits while a
token is chosen, and for what the model makes of its prompt. The first is known: one token is read, and its keys and
values counted. The rest is estimated with room to spare. If memory runs out all the same, half as many are written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from sdft._compat import cache_argument, takes_dynamic_cache, with_cache
from sdft.errors import UsageError, counted
from sdft.forward import evaluating
from sdft.memory.exhausted import ran_out
from sdft.memory.free import free_memory, give_back
from sdft.rollouts.kv_cache import room_for, roomy_cache

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

#: Of the memory that is free, rollouts are meant to take this share.
SHARE = 0.9
#: Numbers for each entry of the vocabulary while a token is chosen: logits, sorted for top-p, their order, noise.
LOGITS = 10
#: Numbers for each entry of a hidden state while a layer reads the prompt: most are those within its MLP.
READING = 32


class AsManyAsFit:
    """The number of rollouts at once, for as long as a run goes on: what has failed before is not tried again."""

    def __init__(self) -> None:
        self.most: int | None = None

    def size(self, model: PreTrainedModel, prompts: Sequence[int], new_tokens: int) -> int:
        """How many rollouts of prompts of these lengths fit, at least 1."""
        free = free_memory(model.device)
        size = len(prompts)
        if free is not None and prompts:
            size = min(size, int(free * SHARE) // rollout_bytes(model, max(prompts), new_tokens))
        return max(1, size if self.most is None else min(size, self.most))

    def attempt(self, write: Callable[[], Result], rollouts: int, device: torch.device) -> Result | None:
        """What `write` gives for so many rollouts; None where memory ran out, and `most` is half of them from then."""
        try:
            return write()
        except RuntimeError as error:
            if rollouts == 1 or not ran_out(error):
                raise
        # Only here, where the error is gone, is what its frames refer to gone as well.
        give_back(device)
        self.most = rollouts // 2
        logger.warning(
            "memory ran out with %s at once: from here on there are at most %d", counted(rollouts, "rollout"), self.most
        )
        return None


def rollout_bytes(model: PreTrainedModel, prompt: int, new_tokens: int) -> int:
    """The memory of one rollout that has come to its full length, with a prompt of so many tokens."""
    config, tokens = model.config.get_text_config(decoder=True), prompt + new_tokens
    cache, widest = 0, 0
    for layer in _cache_of_a_token(model).layers:
        keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
        if keys is None or values is None:
            continue
        numbers = keys.shape[1] * (keys.shape[3] + values.shape[3])
        # Under mixed precision continuous batching keeps them in the weights' type.
        of_token = numbers * max(keys.itemsize, values.itemsize, model.dtype.itemsize)
        cache += of_token * min(room_for(tokens), getattr(layer, "sliding_window", None) or room_for(tokens))
        # Attention may repeat a layer's for each head that asks, and the cache is copied when its room runs out.
        copies = 1 + max(1, getattr(config, "num_attention_heads", 1) // keys.shape[1])
        widest = max(widest, of_token * copies * tokens)
    logits = LOGITS * config.vocab_size * torch.float32.itemsize
    reading = READING * prompt * config.hidden_size * model.dtype.itemsize
    return cache + max(widest, reading) + logits


@torch.no_grad()
def _cache_of_a_token(model: PreTrainedModel) -> Any:
    """The model's cache with one token in it."""
    if not takes_dynamic_cache(model) or cache_argument(model) is None:
        raise UsageError(
            f"rollout_batch_size is 'auto', and {type(model).__name__} keeps something else than keys and values of "
            "what it has read; it must be a number, or not set"
        )
    cache = roomy_cache(model) or DynamicCache(config=model.config.get_text_config(decoder=True))
    with evaluating(model):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        cast(Any, model)(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
    return cache
