"""What a model thinks of given tokens, without its logits and without gradients; a torch operator, as the loss is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft_kernels import arguments, checks, registration
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.select import select
from sdft_kernels.chunk_loop import check_labels, head_operands
from sdft_kernels.chunking import plan_chunks
from sdft_kernels.divergences import LogitOptions
from sdft_kernels.tokens import TokenScores, on_its_device


class TokenStats(NamedTuple):
    """The result of `linear_token_stats`: float32 (float64 for float64 inputs), in nats, without gradients.

    Attributes:
        logprob: (N,) log-probability of the label; None without labels.
        top1: (N,) bool, whether no token is likelier than the label; None without labels.
        entropy: (N,) entropy of the next-token distribution.
        logsumexp: (N,) log Σ exp(z) over the vocabulary.
    """

    logprob: Tensor | None
    top1: Tensor | None
    entropy: Tensor
    logsumexp: Tensor


@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-probabilities, entropies and log-sum-exps of a model's next-token distributions, without its logits.

    Logits as in `fused_linear_divergence`: y = logit_scale · (hidden weightᵀ + bias), c = softcap · tanh(y /
    softcap) (or y), z = c / temperature, in float32 whatever the inputs, a chunk of tokens at a time.

    Args:
        hidden: (N, H), float32, bfloat16 or float16 (or float64).
        weight: (V, H), the LM head.
        labels: (N,) int64 in [0, V), or None.
        bias: (V,) or None; an entry of -inf masks the token.
        temperature: positive.
        logit_scale: finite, not 0.
        softcap: positive, or None.
        vocab_size: only the first `vocab_size` entries of the head take part; None means all.
        max_chunk_bytes: memory for logits; None chooses for the device. Of no effect where Triton works on bfloat16 or
            float16: its kernel multiplies a tile at a time, and no logit reaches memory.
        backend: "torch", "compiled", "triton" or "auto", as there.

    Returns:
        A `TokenStats`. Entropies and log-probabilities are right to a few last digits of float32, and to one of
        1 nat, 1.2e-7, where they are small.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        NotImplementedError: an argument has a tangent (torch.func.jvp).

    Example:
        >>> import torch
        >>> linear_token_stats(torch.zeros(2, 8), torch.randn(100, 8), torch.tensor([3, 5])).entropy
        tensor([4.6052, 4.6052])
    """
    arguments.head("", hidden, weight, bias)
    arguments.per_token("labels", labels, hidden.shape[0], hidden.device, floating=False)
    options = arguments.logit_options("", logit_scale, softcap, temperature)
    arguments.available_backend(backend)
    vocab_size = checks.count("vocab_size", vocab_size, "tokens")
    vocab = arguments.shared_vocabulary(weight.shape[0], weight.shape[0], vocab_size)
    dtype = arguments.products_dtype(hidden.device, hidden=hidden, weight=weight)
    arguments.supported_backend(backend, hidden.device, dtype)
    logprob, top1, entropy, logsumexp = linear_token_stats_op(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        labels,
        *registration.values_of(options),
        vocab,
        dtype,
        checks.count("max_chunk_bytes", max_chunk_bytes, "bytes"),
        backend,
    )
    if labels is None:
        return TokenStats(None, None, entropy, logsumexp)
    return TokenStats(logprob, top1, entropy, logsumexp)


@registration.flat
def _score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    options: LogitOptions,
    vocab: int,
    operands: torch.dtype,
    max_chunk_bytes: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `TokenStats`; what is of labels comes back empty where there are none."""
    if labels is not None:
        labels = labels.contiguous()
        check_labels(labels, vocab)
    dtypes = Dtypes.of(operands, weight.dtype, hidden.device)
    work = select(backend, hidden.device, operands)
    tokens, wide = hidden.shape[0], dtypes.wide
    entropy, logsumexp = (hidden.new_empty(tokens, dtype=wide) for _ in range(2))
    logprob = None if labels is None else hidden.new_empty(tokens, dtype=wide)
    top1 = None if labels is None else hidden.new_empty(tokens, dtype=torch.bool)
    scores = TokenScores(labels, logprob, top1, entropy, logsumexp)
    head = head_operands(weight, bias, vocab, dtypes, options)
    plan = plan_chunks(tokens, vocab, work.scoring_held(dtypes), hidden.device, max_chunk_bytes)
    workspace = work.scoring_workspace(hidden, plan.chunk, vocab, dtypes)
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        for chunk in plan.slices(tokens):
            work.score_chunk(hidden[chunk].to(operands), head, scores[chunk], options, workspace)
    if logprob is None or top1 is None:
        return entropy.new_empty(0), entropy.new_empty(0, dtype=torch.bool), entropy, logsumexp
    return logprob, top1, entropy, logsumexp


linear_token_stats_op = registration.operator("linear_token_stats", _score)


@torch.library.register_fake(linear_token_stats_op)
def _fake(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _, labels, *_, operands, _, _ = values
    wide, tokens = Dtypes.of(operands, weight.dtype, hidden.device).wide, hidden.shape[0]
    labelled = 0 if labels is None else tokens
    return (
        hidden.new_empty(labelled, dtype=wide),
        hidden.new_empty(labelled, dtype=torch.bool),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
    )
