"""The checks of what `fused_linear_topk_divergence` is given, and what a teacher gives as back-ends read it.

An error is one sentence that names the argument, what it was and what it may be. Values are checked at once on the CPU,
else by the device.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from sdft_kernels import arguments, checks
from sdft_kernels._compat import assert_on_device
from sdft_kernels.chunk_loop import check_labels
from sdft_kernels.coarse import TAILS, tail_of
from sdft_kernels.divergences import DIVERGENCES
from sdft_kernels.options import TopkInputs, TopkOptions
from sdft_kernels.tokens import LiveTokens, TopTokens, reads_are_free

#: How far above 1 the mass of log-probabilities may lie that were rounded to a dtype: float64's may be decimal text of
#: some digits; of halves a log-probability of -12 is known to 12 of their last digits.
LARGEST_EXCESS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.0625, torch.float16: 0.0078125}


def check(given: TopkInputs, options: TopkOptions) -> torch.dtype:
    """As `arguments.check`; `top_tokens` checks the teacher's values."""
    arguments.head("", given.hidden, given.weight, given.bias)
    tokens, device = given.hidden.shape[0], given.hidden.device
    for name, tensor in (("teacher_ids", given.teacher_ids), ("teacher_logprobs", given.teacher_logprobs)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of shape (N, K), not {type(tensor).__name__}")
        arguments.readable(name, tensor)
        if tensor.dim() != 2 or tensor.shape[0] != tokens or tensor.shape[1] == 0:
            raise ValueError(f"{name} must have shape ({tokens}, K), K at least 1, not {tuple(tensor.shape)}")
        arguments.same_device(name, tensor, device)
    if given.teacher_ids.shape != given.teacher_logprobs.shape:
        raise ValueError(
            f"teacher_logprobs must have the shape of teacher_ids, {tuple(given.teacher_ids.shape)}, not "
            f"{tuple(given.teacher_logprobs.shape)}"
        )
    if given.teacher_ids.dtype != torch.int64:
        raise TypeError(f"teacher_ids must be int64, not {arguments.dtype_name(given.teacher_ids)}")
    if given.teacher_logprobs.dtype not in arguments.DTYPES:
        raise TypeError(
            "teacher_logprobs must be float32, bfloat16, float16 or float64, not "
            f"{arguments.dtype_name(given.teacher_logprobs)}"
        )
    arguments.per_token("teacher_tail_logprob", given.teacher_tail_logprob, tokens, device, floating=True)
    arguments.per_token("token_weight", given.token_weight, tokens, device, floating=True)
    arguments.per_token("labels", given.labels, tokens, device, floating=False)
    arguments.per_token("old_logprobs", given.old_logprobs, tokens, device, floating=True)
    arguments.differentiated_by_backward(given)
    if given.teacher_tail_logprob is not None and options.tail == "dropped":
        raise ValueError(
            "teacher_tail_logprob does nothing with tail='dropped', which compares the given entries alone"
        )
    arguments.importance_weights(given, options.importance_clip)
    vocab = arguments.shared_vocabulary(given.weight.shape[0], given.weight.shape[0], options.vocab_size)
    if given.teacher_ids.shape[1] > vocab:
        raise ValueError(f"teacher_ids has {given.teacher_ids.shape[1]} columns, more than the vocabulary's {vocab}")
    dtype = arguments.products_dtype(device, hidden=given.hidden, weight=given.weight)
    arguments.supported_backend(options.backend, device, dtype)
    return dtype


def check_options(options: TopkOptions) -> TopkOptions:
    """As `arguments.check_options`."""
    checks.one_of("divergence", options.divergence, DIVERGENCES)
    checks.one_of("tail", options.tail, TAILS)
    checks.one_of("reduction", options.reduction, arguments.REDUCTIONS)
    arguments.available_backend(options.backend)
    logits = arguments.logit_options("", options.logit_scale, options.softcap, options.temperature)
    clip = options.importance_clip
    return replace(
        options,
        beta=arguments.teachers_share(options.beta, options.divergence),
        temperature=logits.temperature,
        logit_scale=logits.scale,
        softcap=logits.softcap,
        importance_clip=None if clip is None else checks.positive("importance_clip", clip),
        vocab_size=checks.count("vocab_size", options.vocab_size, "tokens"),
        max_chunk_bytes=checks.count("max_chunk_bytes", options.max_chunk_bytes, "bytes"),
    )


def top_tokens(given: TopkInputs, live: LiveTokens, vocab: int, student_tail: Tensor) -> TopTokens:
    """What the teacher gives of the live tokens, checked, ids in rising order."""
    ids, logprobs = live.take(given.teacher_ids), live.take(given.teacher_logprobs)
    tail = None if given.teacher_tail_logprob is None else live.take(given.teacher_tail_logprob).double()
    if given.token_weight is not None and not reads_are_free(given.token_weight):
        # On a device the other tokens are among them: they get what passes, and is used for nothing.
        counts = live.take(given.token_weight).unsqueeze(1) != 0
        ids = torch.where(counts, ids, torch.arange(ids.shape[1], device=ids.device))
        logprobs = torch.where(counts, logprobs, -math.log(2 * ids.shape[1]))
        tail = None if tail is None else torch.where(counts.squeeze(1), tail, -math.log(2))
    _check_logprobs(logprobs, tail)
    entries = logprobs > -torch.inf
    _check_some(entries)
    ids, order = ids.where(entries, vocab).sort(dim=1)
    check_ids("teacher_ids", ids, vocab, entries.gather(1, order))
    return TopTokens(
        ids.contiguous(),
        logprobs.gather(1, order),
        tail_of(logprobs.double()) if tail is None else tail,
        student_tail,
    )


def check_ids(name: str, ids: Tensor, vocab: int, entries: Tensor | None = None) -> None:
    """Checks ids in rising order, each row's entries: they lie in the vocabulary, and none comes twice."""
    repeated = ids[:, 1:] == ids[:, :-1]
    if entries is not None:
        ids, repeated = ids.where(entries, 0), repeated & entries[:, 1:]
    check_labels(ids, vocab, name)
    if not reads_are_free(ids):
        assert_on_device(~repeated.any(), f"{name} must not name an entry twice for one token")
    elif repeated.any():
        entry = ids[:, 1:][repeated][0].item()
        raise ValueError(f"{name} must name each entry once for a token, and name {entry} twice")


def _check_some(entries: Tensor) -> None:
    """Checks that there is an entry in each row."""
    some = entries.any(-1).all()
    if not reads_are_free(entries):
        assert_on_device(some, "teacher_logprobs must have an entry above -inf for each token")
    elif not some:
        raise ValueError(
            "teacher_logprobs are all -inf for a token, which says that the teacher gives nothing of it: give such a "
            "token weight 0 (token_weight)"
        )


def _check_logprobs(logprobs: Tensor, tail: Tensor | None) -> None:
    """Checks that numbers are log-probabilities, and of a token not more than 1 in sum, or with the tail just 1."""
    excess = LARGEST_EXCESS[logprobs.dtype]
    mass = logprobs.double().exp().sum(-1)
    whole = mass if tail is None else mass + tail.exp()
    over, under = (whole > 1 + excess).any(), (whole < 1 - excess).any() & (tail is not None)
    largest = logprobs.amax() if logprobs.numel() else logprobs.new_zeros(())
    not_numbers = whole.isnan().any()
    if not reads_are_free(logprobs):
        right = ~(over | under | not_numbers | (largest > math.log1p(excess)))
        assert_on_device(right, "teacher_logprobs (and teacher_tail_logprob) must be log-probabilities")
    elif not_numbers:
        name = "teacher_logprobs" if mass.isnan().any() else "teacher_tail_logprob"
        raise ValueError(f"{name} must be log-probabilities, and some are NaN")
    elif largest > math.log1p(excess):
        raise ValueError(f"teacher_logprobs must be log-probabilities, at most 0, and reach {largest.item():.6g}")
    elif over and tail is None:
        raise ValueError(
            f"teacher_logprobs have probabilities that sum to {whole.amax().item():.6g} for a token: they must be "
            "those of a softmax over the whole vocabulary, whose sum is at most 1"
        )
    elif over or under:
        worst = whole[(whole - 1).abs().argmax()].item()
        raise ValueError(
            f"teacher_tail_logprob and teacher_logprobs have probabilities that sum to {worst:.6g} for a token: the "
            "tail's must be what the entries leave to 1"
        )
