"""Cross-entropy straight from hidden states and an LM head: the public function, and its torch operator."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import arguments, autograd, checks, registration
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunk_loop import Side, Wanted, check_labels, run_chunks, token_weights
from sdft_kernels.options import CrossEntropyInputs, CrossEntropyOptions
from sdft_kernels.outputs import CrossEntropyOutput
from sdft_kernels.tokens import LiveTokens, TokenRows, on_its_device


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy_weight: float = 0.0,
    reduction: str = "mean",
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> CrossEntropyOutput:
    """Cross-entropy of a model's next-token distributions with labels, without its logits.

    Logits as in `fused_linear_divergence`: y = logit_scale · (hidden weightᵀ + bias), c = softcap · tanh(y / softcap)
    (or y), z = c / temperature, in float32 whatever the inputs, a chunk of tokens at a time. Of each token, with p the
    softmax of z over V entries, the loss is

        -(1 - s) log p(label) - s Σ log p / V + z_loss · logsumexp(z)² - entropy_weight · H(p),  s = label_smoothing

    Gradients reach `hidden`, `weight` and `bias`, each computed only where it is required, in the forward pass while
    the chunk's logits are there: three matrix products in all, two with a frozen head. Weight gradients accumulate in
    float32.

    Args:
        hidden: (N, H), float32, bfloat16 or float16 (float64 is for gradient checks).
        weight: (V, H), the LM head.
        labels: (N,) int64 in [0, V), or `ignore_index`.
        bias: (V,) or None; an entry of -inf masks the token, as in `fused_linear_divergence`. Label smoothing asks for
            every entry: with one that is masked its loss is some 1e30.
        token_weight: (N,) floating point, or None for all ones. A token of weight 0 or with an ignored label
            contributes exactly nothing, whatever its hidden state holds; on the CPU it is not even projected.
        ignore_index: the label of tokens that are left out.
        temperature: divides the logits; positive.
        logit_scale: multiplies the logits; finite, not 0.
        softcap: positive, or None.
        label_smoothing: the share of the target that all entries have in equal parts (arXiv 1512.00567), from 0 to 1.
        z_loss: weight of the squared log-sum-exp, which keeps it near 0 (PaLM, arXiv 2204.02311; Liger's
            `lse_square_scale`); at least 0.
        entropy_weight: weight of an entropy bonus, as policy-gradient losses have it; a negative one sharpens p.
        reduction: "mean": Σ w·L / Σ w over the tokens that count · "sum": Σ w·L · "none": w·L, (N,), differentiable.
        vocab_size: only the first `vocab_size` entries of the head take part; None means all.
        max_chunk_bytes: memory for logits; None chooses for the device.
        backend: "torch", "compiled", "triton" or "auto", as there.

    Returns:
        A `CrossEntropyOutput`: `loss` (differentiable), `token_loss`, `logprob`, `entropy` and `logsumexp`, in nats,
        (N,) float32 and detached. With no token that counts, the loss is 0 and backpropagates zeros.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        NotImplementedError: an argument has a tangent (torch.func.jvp).

    Example:
        >>> import torch
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> out = fused_linear_cross_entropy(h, w, torch.tensor([3, 1, 4, 1, -100]), z_loss=1e-4)
        >>> out.loss.backward()
        >>> h.grad.shape, out.logprob.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    options = arguments.check_cross_entropy_options(
        CrossEntropyOptions(
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            entropy_weight=entropy_weight,
            reduction=reduction,
            vocab_size=vocab_size,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
    )
    given = CrossEntropyInputs(hidden=hidden, weight=weight, bias=bias, labels=labels, token_weight=token_weight)
    operands = arguments.check_cross_entropy(given, options)
    ignored = labels == checks.integer("ignore_index", ignore_index)
    if token_weight is None:
        token_weight = torch.ones_like(labels, dtype=torch.float32)
    wanted = autograd.wanted_gradients(options.reduction, hidden, weight, bias)
    loss, token_loss, logprob, entropy, logsumexp, *_ = fused_linear_cross_entropy_op(
        hidden,
        weight,
        bias,
        labels,
        torch.where(ignored, 0, token_weight.detach()),
        *registration.values_of(options),
        operands,
        *registration.values_of(wanted),
    )
    return CrossEntropyOutput(loss, token_loss.detach(), logprob.detach(), entropy.detach(), logsumexp.detach())


OpResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@registration.flat
def _forward(
    given: CrossEntropyInputs, options: CrossEntropyOptions, operands: torch.dtype, wanted: Wanted
) -> OpResult:
    """Returns the loss, four vectors over tokens, and what `autograd.differentiable` asks for."""
    hidden, vocab = given.hidden, options.vocab_size or given.weight.shape[0]
    dtypes = Dtypes.of(operands, given.weight.dtype, hidden.device)
    live = LiveTokens(given.token_weight, hidden.shape[0])
    weight, missing_factor = token_weights(
        live, given.token_weight, hidden, options.reduction, dtypes, options.objective
    )
    labels = live.take(given.labels).contiguous()
    check_labels(labels, vocab)
    loss, entropy, logprob, logsumexp = (hidden.new_empty(live.count, dtype=dtypes.wide) for _ in range(4))
    rows = TokenRows(weight, labels, None, loss, entropy, None, logprob, None, logsumexp, hard_labels=labels)
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        side = Side(hidden, given.weight, given.bias)
        gradients = run_chunks(side, None, live, rows, options, vocab, dtypes, wanted)
    weighted = live.spread(rows.weight * loss)
    return (
        (weighted if options.reduction == "none" else weighted.sum()) * missing_factor,
        live.spread(loss),
        live.spread(logprob),
        live.spread(entropy),
        live.spread(logsumexp),
        gradients.hidden,
        gradients.weight.to(dtypes.head_gradient),
        gradients.bias,
        missing_factor,
    )


def _fake(*values: Any) -> OpResult:
    given = dict(zip(inspect.signature(_forward).parameters, values, strict=True))
    hidden, weight = given["hidden"], given["weight"]
    wide, tokens = Dtypes.of(given["operands"], weight.dtype, hidden.device).wide, hidden.shape[0]
    return (
        hidden.new_empty((tokens,) if given["reduction"] == "none" else (), dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        *autograd.empty_gradients(given, hidden, weight),
    )


fused_linear_cross_entropy_op = autograd.differentiable("fused_linear_cross_entropy", _forward, _fake)
