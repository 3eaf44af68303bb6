"""The divergence from a teacher's top-k log-probabilities: the public function, and its torch operator."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdft_kernels import autograd, registration, topk_arguments
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunk_loop import Side, Wanted, check_labels, run_chunks, token_weights
from sdft_kernels.options import TopkInputs, TopkOptions
from sdft_kernels.outputs import TopkDivergenceOutput
from sdft_kernels.tokens import LiveTokens, TokenRows, on_its_device


def fused_linear_topk_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    teacher_tail_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    tail: str = "bucket",
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> TopkDivergenceOutput:
    """Divergence from a teacher who gives K log-probabilities of each token, as servers and files have them, without
    the student's logits.

    Both models are compared on what the teacher gives: K + 1 outcomes of each token, which are its K entries and all
    others together as a bucket, whose probability is what the entries leave. On these outcomes the named divergence of
    `fused_linear_divergence` is exact. It is at most the divergence over the whole vocabulary, and equal to it with
    K = V, or where the models' probabilities in the bucket are proportional. With `tail="dropped"` the outcomes are the
    K entries alone, and both models' probabilities are divided by their sums over these.

    Logits as there: y = logit_scale · (hidden weightᵀ + bias), c = softcap · tanh(y / softcap) (or y), z = c /
    temperature, in float32 whatever the inputs, a chunk of tokens at a time. Gradients reach `hidden`, `weight` and
    `bias`, each computed only where it is required: three matrix products in all, two with a frozen head. The student's
    probability of the bucket is a sum over the bucket's entries, and has its digits where the K entries hold nearly
    everything. For each chunk of C tokens some 100 bytes for each of C · K entries are held, so K is meant to be small
    beside V.

    Args:
        hidden: (N, H), float32, bfloat16 or float16 (float64 is for gradient checks): the student's hidden states.
        weight: (V, H), the student's LM head.
        teacher_ids: (N, K) int64 in [0, V), in any order, no entry twice for one token.
        teacher_logprobs: (N, K) floating point, log-probabilities over the whole vocabulary, in nats, at the
            temperature that the teacher is wanted at: `temperature` is the student's alone. -inf says that there is no
            entry here, whatever its id, for tokens with fewer than K. Other numbers are at most 0, and a token's
            probabilities sum to at most 1, up to rounding: 1.0001 in float32. Each token has at least one.
        teacher_tail_logprob: (N,) log-probability of all other entries, where it is known better than as what the given
            ones leave, log(1 - Σ q). That is taken to be at least 1e-7, as in TRL, since rounding hides less. Of one
            that is given, -inf becomes -2^100.
        bias: (V,) or None; an entry of -inf masks the token, as in `fused_linear_divergence`.
        divergence: "reverse_kl", "forward_kl", "jsd", "skew_reverse_kl" or "skew_forward_kl", as there.
        beta: the teacher's share of the mixture, as there.
        tail: "bucket", or "dropped" for the K entries alone.
        temperature: divides the student's logits; positive.
        logit_scale: multiplies the logits; finite, not 0.
        softcap: positive, or None.
        token_weight: (N,) floating point, or None for all ones. A token of weight 0 contributes exactly nothing,
            whatever its hidden state, ids and log-probabilities hold; on the CPU it is not even projected.
        labels: (N,) int64, the sampled tokens, or None; they need not be among the teacher's. Not read where the weight
            is 0.
        old_logprobs: (N,) log-probabilities of the labels when they were sampled: importance weights, as there, and
            in float16 with the limit that JSD has.
        importance_clip: upper limit of these weights, positive, or None.
        reduction: "mean": Σ w·L / Σ w, with `token_weight` for w in the denominator · "sum": Σ w·L ·
            "none": w·L, (N,), differentiable.
        vocab_size: only the first `vocab_size` entries of the head take part; None means all.
        max_chunk_bytes: memory for logits; None chooses for the device.
        backend: "torch", "compiled", "triton" or "auto", as there.

    Returns:
        A `TopkDivergenceOutput`: `loss` (differentiable), `token_loss`, `student_entropy`, `student_tail_logprob`, and
        with labels `student_logprob`, in nats, (N,) float32 and detached. With no token that counts, the loss is 0 and
        backpropagates zeros.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        NotImplementedError: an argument has a tangent (torch.func.jvp).

    Example:
        >>> import torch
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> logprobs, ids = torch.randn(5, 100).log_softmax(-1).topk(10)  # of a teacher
        >>> out = fused_linear_topk_divergence(h, w, ids, logprobs, divergence="forward_kl")
        >>> out.loss.backward()
        >>> h.grad.shape, out.student_tail_logprob.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    options = topk_arguments.check_options(
        TopkOptions(
            divergence=divergence,
            beta=beta,
            tail=tail,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            importance_clip=importance_clip,
            reduction=reduction,
            vocab_size=vocab_size,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
        )
    )
    given = TopkInputs(
        hidden=hidden,
        weight=weight,
        bias=bias,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        teacher_tail_logprob=teacher_tail_logprob,
        token_weight=token_weight,
        labels=labels,
        old_logprobs=old_logprobs,
    )
    operands = topk_arguments.check(given, options)
    wanted = autograd.wanted_gradients(options.reduction, hidden, weight, bias)
    trained, others = registration.values_of(given)[:3], registration.values_of(given)[3:]
    loss, token_loss, entropy, student_tail, logprob, *_ = fused_linear_topk_divergence_op(
        *trained,
        *(None if tensor is None else tensor.detach() for tensor in others),
        *registration.values_of(options),
        operands,
        *registration.values_of(wanted),
    )
    return TopkDivergenceOutput(
        loss,
        token_loss.detach(),
        entropy.detach(),
        student_tail.detach(),
        None if labels is None else logprob.detach(),
    )


OpResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@registration.flat
def _forward(given: TopkInputs, options: TopkOptions, operands: torch.dtype, wanted: Wanted) -> OpResult:
    """Returns the loss, four vectors over tokens, and what `autograd.differentiable` asks for."""
    hidden, vocab = given.hidden, options.vocab_size or given.weight.shape[0]
    dtypes = Dtypes.of(operands, given.weight.dtype, hidden.device)
    live = LiveTokens(given.token_weight, hidden.shape[0])
    weight, missing_factor = token_weights(
        live, given.token_weight, hidden, options.reduction, dtypes, options.objective
    )
    labels, old_logprobs, logprob = given.labels, given.old_logprobs, None
    loss, entropy, student_tail = (hidden.new_empty(live.count, dtype=dtypes.wide) for _ in range(3))
    if labels is not None:
        labels, logprob = live.take(labels).contiguous(), torch.empty_like(loss)
        check_labels(labels, vocab)
    if old_logprobs is not None:
        old_logprobs = live.take(old_logprobs).to(dtypes.wide).contiguous()
    top = topk_arguments.top_tokens(given, live, vocab, student_tail)
    rows = TokenRows(weight, labels, old_logprobs, loss, entropy, None, logprob, None, top=top)
    with on_its_device(hidden), torch.autocast(hidden.device.type, enabled=False):
        side = Side(hidden, given.weight, given.bias)
        gradients = run_chunks(side, None, live, rows, options, vocab, dtypes, wanted)
    weighted = live.spread(rows.weight * loss)
    return (
        (weighted if options.reduction == "none" else weighted.sum()) * missing_factor,
        live.spread(loss),
        live.spread(entropy),
        live.spread(student_tail),
        loss.new_empty(0) if logprob is None else live.spread(logprob),
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
        hidden.new_empty(0 if given["labels"] is None else tokens, dtype=wide),
        *autograd.empty_gradients(given, hidden, weight),
    )


fused_linear_topk_divergence_op = autograd.differentiable("fused_linear_topk_divergence", _forward, _fake)
