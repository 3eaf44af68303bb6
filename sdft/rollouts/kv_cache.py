"""Keys and values of what has been read and written, with room to spare: a token more does not copy all before it.

transformers' cache joins each new token's keys and values to the old ones in a new tensor, which for every token of a
rollout reads and writes those of the whole prompt and completion. Here a layer's tensors have room for what comes,
and are copied only when that runs out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from sdft._compat import cache_argument, takes_dynamic_cache, takes_static_cache

#: Room is made for this share of the tokens more, and for at least so many: all copies together are then at most nine
#: times what there is in the end, however long that is.
SPARE, LEAST_SPARE = 1 / 8, 32

#: A static cache's length is a multiple of this.
STEP = 256


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, (rows, heads, tokens, head dim), which are the beginnings of larger tensors."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values with those of new tokens after them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._key_room, self._value_room = self.keys, self.values
        self._key_room, self.keys = _append(self._key_room, self.keys, key_states)
        self._value_room, self.values = _append(self._value_room, self.values, value_states)
        return self.keys, self.values

    def keep(self, rows: Tensor, places: Tensor) -> None:
        """Leave of the cache these rows, and of row r the tokens at `places[r]`, (rows, tokens)."""
        index = places[:, None, :, None]
        for name in ("keys", "values"):
            whole = getattr(self, name).index_select(0, rows)
            setattr(self, name, whole.gather(2, index.expand(-1, whole.shape[1], -1, whole.shape[3])))
        self._key_room, self._value_room = self.keys, self.values


def _append(room: Tensor, before: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor with room, and its beginning: `before` and after it `new`. It is `room` if both fit there."""
    old, tokens = before.shape[-2], before.shape[-2] + new.shape[-2]
    if room.data_ptr() != before.data_ptr() or room.shape[:-2] != before.shape[:-2] or tokens > room.shape[-2]:
        room = new.new_empty(*new.shape[:-2], room_for(tokens), new.shape[-1])
        room[..., :old, :] = before
    room[..., old:tokens, :] = new
    return room, room[..., :tokens, :]


def room_for(tokens: int) -> int:
    """The tokens that there is room for, where it is made for so many."""
    return tokens + max(LEAST_SPARE, int(tokens * SPARE))


def roomy_cache(model: PreTrainedModel) -> DynamicCache | None:
    """The cache that `generate` would make for the model, with room to spare in each layer that attends to all tokens.

    None, for `generate` to do what it does, where there is no such layer or the model remembers in another way.
    """
    if not takes_dynamic_cache(model) or cache_argument(model) is None:
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache if any(isinstance(layer, RoomyLayer) for layer in cache.layers) else None


def static_cache(model: PreTrainedModel, tokens: int) -> StaticCache:
    """A cache with room for so many tokens, and up to `STEP` more: passes are compiled for few lengths."""
    config = model.config.get_text_config(decoder=True)
    return StaticCache(config=config, max_cache_len=-(-tokens // STEP) * STEP)


def check_static_cache(model: PreTrainedModel) -> str | None:
    """Why the model cannot write with such a cache, if it cannot."""
    if not takes_static_cache(model) or cache_argument(model) is None:
        return "it cannot keep its keys and values in tensors of one length"
    return None
