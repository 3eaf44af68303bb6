"""What a teacher of K entries is made of: a model's likeliest tokens, or its log-probabilities of given ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdft_kernels import arguments, checks
from sdft_kernels.backends import products
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunk_loop import head_operands
from sdft_kernels.chunking import Held, plan_chunks
from sdft_kernels.tokens import on_its_device
from sdft_kernels.topk_arguments import check_ids


class TopkLogprobs(NamedTuple):
    """The result of `linear_topk_logprobs`: what `fused_linear_topk_divergence` takes of a teacher; without gradients.

    Attributes:
        ids: (N, K) int64, the likeliest entry first, or those that were asked for.
        logprobs: (N, K) float32 (float64 for float64 inputs), in nats, of a softmax over the whole vocabulary.
        tail_logprob: (N,) log-probability of all other entries, -inf where there are none; a sum over these, which has
            its digits where the K entries hold nearly everything.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor


@torch.no_grad()
def linear_topk_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int | None = None,
    *,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
) -> TopkLogprobs:
    """A model's K likeliest entries of each token with their log-probabilities, or those of given entries.

    Logits as in `fused_linear_divergence`, a chunk of tokens at a time, in plain torch on any device: one product.

    Args:
        hidden: (N, H), float32, bfloat16 or float16 (or float64).
        weight: (V, H), the LM head.
        k: the number of entries, from 1 to V; None where `ids` are given.
        ids: (N, K) int64 in [0, V), none twice for one token, or None.
        bias: (V,) or None; an entry of -inf masks the token.
        temperature: positive.
        logit_scale: finite, not 0.
        softcap: positive, or None.
        vocab_size: only the first `vocab_size` entries of the head take part; None means all.
        max_chunk_bytes: memory for logits; None chooses for the device.

    Returns:
        A `TopkLogprobs`.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> found = linear_topk_logprobs(torch.randn(2, 8), torch.randn(100, 8), 5)
        >>> found.ids.shape, found.tail_logprob.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """
    arguments.head("", hidden, weight, bias)
    options = arguments.logit_options("", logit_scale, softcap, temperature)
    vocab_size = checks.count("vocab_size", vocab_size, "tokens")
    vocab = arguments.shared_vocabulary(weight.shape[0], weight.shape[0], vocab_size)
    k = _columns(hidden, k, ids, vocab)
    operands = arguments.products_dtype(hidden.device, hidden=hidden, weight=weight)
    max_chunk_bytes = checks.count("max_chunk_bytes", max_chunk_bytes, "bytes")
    dtypes, tokens = Dtypes.of(operands, weight.dtype, hidden.device), hidden.shape[0]
    # The logits, and their exponentials.
    plan = plan_chunks(tokens, vocab, Held(2 * dtypes.wide.itemsize), hidden.device, max_chunk_bytes)
    found = TopkLogprobs(
        hidden.new_empty((tokens, k), dtype=torch.int64),
        hidden.new_empty((tokens, k), dtype=dtypes.wide),
        hidden.new_empty(tokens, dtype=dtypes.wide),
    )
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        head = head_operands(weight, bias, vocab, dtypes, options)
        workspace = hidden.new_empty((plan.chunk, vocab), dtype=dtypes.wide)
        for chunk in plan.slices(tokens):
            states = hidden[chunk].to(operands)
            z = workspace[: len(states)]
            products.logits(states, head.weight, z)
            if head.bias is not None:
                z += head.bias
            z *= options.inner
            if options.softcap is not None:
                z.tanh_()
            z *= options.factor
            chosen = z.topk(k).indices if ids is None else ids[chunk]
            at_ids = z.gather(1, chosen)
            rest = z.scatter_(1, chosen, -torch.inf).logsumexp(-1)
            total = torch.logaddexp(rest, at_ids.logsumexp(-1))
            found.ids[chunk] = chosen
            found.logprobs[chunk] = at_ids - total.unsqueeze(1)
            found.tail_logprob[chunk] = rest - total
    return found


def _columns(hidden: Tensor, k: int | None, ids: Tensor | None, vocab: int) -> int:
    """The number of entries for each token, of which one of `k` and `ids` says."""
    if (k is None) == (ids is None):
        raise ValueError("linear_topk_logprobs needs one of k and ids: how many entries, or which")
    if ids is None:
        if (count := checks.count("k", k, "entries") or 0) > vocab:
            raise ValueError(f"k must lie between 1 and {vocab}, the vocabulary's size, not be {k!r}")
        return count
    arguments.readable("ids", ids)
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or ids.shape[1] == 0:
        raise ValueError(f"ids must have shape ({hidden.shape[0]}, K), K at least 1, not {tuple(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, not {arguments.dtype_name(ids)}")
    arguments.same_device("ids", ids, hidden.device)
    check_ids("ids", ids.sort(dim=1).values, vocab)
    return ids.shape[1]
