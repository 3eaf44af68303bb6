"""Stop strings: texts that end a completion, found among its tokens.

A completion ends with the token that completes the first stop string in its text, so the string itself stays in, with
whatever else that token brings. Text is decoded with special tokens in it, so that those can be named too.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


def stopped_length(tokens: Sequence[int], stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens it takes until the first of the stop strings is complete; None where none of them is there."""

    def stopped(count: int) -> bool:
        return _contains(_text(tokens[:count], tokenizer), stop)

    if not stop or not stopped(len(tokens)):
        return None
    return bisect.bisect_left(range(len(tokens)), True, key=stopped)


def just_stopped(tokens: Sequence[int], stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token has completed a stop string; to be asked after each token of a completion.

    Only as many tokens are decoded as the longest stop string has bytes, and a few more for a character that begins
    before them. A find is then checked against the completion as a whole.
    """
    window = max(len(text.encode()) for text in stop) + 4
    return _contains(_text(tokens[-window:], tokenizer), stop) and _contains(_text(tokens, tokenizer), stop)


class AtStopString(StoppingCriteria):
    """Tells `generate`, after each token, which rows have just completed a stop string after their prompts."""

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.stop, self.tokenizer, self.prompt_length = stop, tokenizer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([just_stopped(row, self.stop, self.tokenizer) for row in rows], device=input_ids.device)


def _text(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _contains(text: str, stop: Sequence[str]) -> bool:
    return any(string in text for string in stop)
