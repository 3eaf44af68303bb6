"""The likeliest tokens by a head, to be shown beside those that were written; a chunk of logits at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdft.forward import autocasting
from sdft.head import Head

#: How many are shown for each token.
COUNT = 3
#: The most bytes of logits at once: less than the loss takes for its own, so that a step's peak stays what it was.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


class Likeliest(NamedTuple):
    """Tokens (N, COUNT) and their log-probabilities (N, COUNT), the likeliest first."""

    tokens: Tensor
    logprobs: Tensor


@torch.no_grad()
def likeliest(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    logprobs: Tensor,
    *,
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    max_chunk_bytes: int | None = None,
) -> Likeliest:
    """The likeliest next tokens after each of the hidden states (N, H).

    `logprobs` (N,) are those of the `labels` (N,), which the loss knows exactly. The others follow from them by
    differences of logits, in float32, whatever the type of the products that found the tokens.
    """
    count = min(COUNT, head.weight.shape[0])
    most = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    chunk = max(1, min(max_chunk_bytes or most, most) // (8 * head.weight.shape[0]))
    tokens, values = [labels.new_empty(0, count)], [logprobs.new_empty(0, count)]
    for states, label, logprob in zip(hidden.split(chunk), labels.split(chunk), logprobs.split(chunk), strict=True):
        states = states if autocast else states.to(head.weight.dtype)
        with autocasting(hidden.device, autocast):
            found = head.logits(states).topk(count).indices
        rows = torch.cat([label[:, None], found], 1)
        with torch.autocast(hidden.device.type, enabled=False):
            product = (head.weight[rows].float() @ states.float()[:, :, None])[:, :, 0]
            logits = head.shaped(product if head.bias is None else product + head.bias[rows].float()) / temperature
        found_logprobs, order = (logits[:, 1:] - logits[:, :1] + logprob[:, None]).sort(descending=True)
        tokens.append(found.gather(1, order))
        values.append(found_logprobs)
    return Likeliest(torch.cat(tokens), torch.cat(values))
