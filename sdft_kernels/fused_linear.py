"""The public loss: checks its arguments, then calls the operator."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor, nn

from sdft_kernels import arguments, checks
from sdft_kernels.autograd import wanted_gradients
from sdft_kernels.operator import fused_linear_divergence_op
from sdft_kernels.options import LossInputs, LossOptions
from sdft_kernels.outputs import DivergenceOutput
from sdft_kernels.registration import values_of


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    hard_weight: float | Tensor | None = None,
    hard_labels: Tensor | None = None,
    hard_temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> DivergenceOutput:
    """Divergence between the next-token distributions of a student and a teacher, without their logits.

    For each of N tokens, with p the student's and q the teacher's softmax over the whole vocabulary, computes the
    named divergence exactly, chunk by chunk straight from hidden states and heads; nothing of size N×V is ever held.
    Logits are float32 whatever the inputs: y = scale · (hidden weightᵀ + bias), c = softcap · tanh(y / softcap) (or
    y), and the softmax is of z = c / temperature.

    | `divergence`        | per token, m = (1-β) p + β q | source                            |
    |---------------------|------------------------------|-----------------------------------|
    | `"reverse_kl"`      | Σ p (log p - log q)          | SDFT as written, arXiv 2601.19897 |
    | `"forward_kl"`      | Σ q (log q - log p)          | SDFT as its authors ran it        |
    | `"jsd"`             | (1-β) KL(p‖m) + β KL(q‖m)    | GKD, arXiv 2306.13649             |
    | `"skew_reverse_kl"` | KL(p‖m)                      | DistiLLM, arXiv 2402.03898        |
    | `"skew_forward_kl"` | KL(q‖m)                      | DistiLLM                          |

    Gradients reach `student_hidden`, `student_weight` and `student_bias`, each computed only where it is
    required (a frozen head costs nothing), in the forward pass while the chunk's logits are there; the
    teacher's side, `token_weight` and `old_logprobs` never receive any. Weight gradients accumulate in float32;
    on NVIDIA devices a bfloat16 head's is then rounded before the upstream gradient multiplies it, which costs
    digits only where that is no power of two.

    Args:
        student_hidden: (N, Hs), float32, bfloat16 or float16 (float64 is for gradient checks).
        student_weight: (V, Hs), the student's LM head.
        teacher_hidden: (N, Ht), the teacher's hidden states at the same tokens; Ht may differ from Hs.
        teacher_weight: (Vt, Ht), the teacher's LM head; may be the same tensor as `student_weight`.
        student_bias: (V,) or None. An entry of -inf masks the token, under a negative scale too: what both models mask
            has no part in the loss. Its logit is -2^100 times the scale's size, so that all stays finite where only one
            model masks: there reverse KL is the student's probability of what only the teacher masks, times some
            1e30 / temperature, and forward KL the other way round, instead of inf. Under a soft cap a bias of -inf
            only makes the logit -softcap. A masked logit is a constant: its bias and its row of the head get a gradient
            of 0.
        teacher_bias: (Vt,) or None.
        divergence: a name from the table above.
        beta: the teacher's share of the mixture m, between 0.001 and 0.999; unused by the two plain KLs.
        temperature: divides the logits; positive.
        student_logit_scale: multiplies the student's logits (Cohere multiplies; Granite divides: pass 1/x).
        teacher_logit_scale: the teacher's.
        student_softcap: soft cap of the student's logits (Gemma 2), positive, at most a million temperatures, or None.
        teacher_softcap: the teacher's.
        token_weight: (N,) floating point, or None for all ones. A token of weight 0 contributes exactly
            nothing, whatever its hidden states hold; on the CPU it is not even projected, on a device (where
            the host cannot know without waiting) zeros are projected in the student's place. A negative weight is
            taken as it is: its token moves the student away from the teacher, and the mean divides by the sum of all.
        labels: (N,) int64, the sampled tokens, or None. Not read where the weight is 0.
        old_logprobs: (N,) log-probabilities of the labels when they were sampled, in nats; then each token's
            weight is multiplied by exp(student_logprob - old_logprobs), without gradient through it. In float16 a
            gradient overflows where this factor times the gradient of a token of the largest `token_weight` passes
            1,023 (63 with JSD and the skewed divergences), even if a small factor of the loss would bring it back:
            `importance_clip` keeps it below.
        importance_clip: upper limit of that factor, positive, or None.
        hard_weight: with `hard_labels`, the factor of each token's cross-entropy with its hard label, which is then
            added to the divergence: a number, (N,) floating point, or None for 1. The token's weight multiplies both.
            That takes no matrix product more, and an exponential a logit where the two temperatures differ.
        hard_labels: (N,) int64, or None for no hard term. Not read where the weight is 0.
        hard_temperature: divides the student's logits in the cross-entropy, as `temperature` does in the divergence.
        ignore_index: the hard label of tokens that have none: of these only the divergence counts.
        reduction: "mean": Σ w·L / Σ w, with `token_weight` for w in the denominator · "sum": Σ w·L ·
            "none": w·L, (N,), differentiable.
        vocab_size: compare the first `vocab_size` entries of both heads. Without it, heads whose sizes differ
            by at most 1 % or 1,024 entries, as padding makes them, are compared on the smaller size, with a warning.
        max_chunk_bytes: memory for logits; None chooses on the CPU 160 MiB, or less or more for 112 to 256 tokens,
            elsewhere what keeps the device busy, up to 3 GiB. Of no effect where nothing takes a gradient and Triton
            works on bfloat16 or float16: for reverse and forward KL its kernel multiplies a tile at a time, and no
            logit reaches memory.
        backend: "torch", "compiled" (kernels in C, on a CPU), "triton", or "auto": for float32 logits Triton on CUDA
            where it is installed and the compiled kernels on a CPU where they were built (with this package, by a C
            compiler), else torch.

    Returns:
        A `DivergenceOutput`: `loss` (differentiable), `token_loss`, `student_entropy`, `teacher_entropy`, with labels
        `student_logprob` and `teacher_logprob`, and with hard labels `hard_loss`, all in nats. Entropies and
        log-probabilities are right to a few last digits of float32, and to one of 1 nat, 1.2e-7, where they are small.
        With N = 0, or no weight other than 0, the loss is 0 and backpropagates zeros.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        NotImplementedError: an argument has a tangent (torch.func.jvp).

    Example:
        >>> import torch
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> out = fused_linear_divergence(h, w, torch.randn(5, 8), w, divergence="forward_kl")
        >>> out.loss.backward()
        >>> h.grad.shape, out.token_loss.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    options = LossOptions(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        importance_clip=importance_clip,
        reduction=reduction,
        vocab_size=vocab_size,
        max_chunk_bytes=max_chunk_bytes,
        backend=backend,
        hard_temperature=None if hard_labels is None else hard_temperature,
    )
    options = arguments.check_options(options)
    given = LossInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        student_bias=student_bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        token_weight=token_weight,
        labels=labels,
        old_logprobs=old_logprobs,
        hard_labels=hard_labels,
        hard_weight=arguments.hard_weight(hard_weight, hard_labels),
    )
    return _divergence(given, options, checks.integer("ignore_index", ignore_index))


def _divergence(given: LossInputs, options: LossOptions, ignore_index: int) -> DivergenceOutput:
    """Checks the tensors, and calls the operator, which sees of the teacher's side and the weights no graph."""
    operands = arguments.check(given, options)
    trained = (given.student_hidden, given.student_weight, given.student_bias)
    wanted = wanted_gradients(options.reduction, *trained)
    ignored = None
    if given.hard_labels is not None and given.hard_weight is not None:
        ignored = given.hard_labels == ignore_index
        given = replace(
            given,
            hard_labels=given.hard_labels.masked_fill(ignored, 0),
            hard_weight=given.hard_weight.detach().masked_fill(ignored, 0),
        )
    others = values_of(given)[len(trained) :]
    loss, token_loss, student_entropy, teacher_entropy, student_logprob, teacher_logprob, hard_loss, *_ = (
        fused_linear_divergence_op(
            *trained,
            *(None if tensor is None else tensor.detach() for tensor in others),
            *values_of(options),
            operands,
            *values_of(wanted),
        )
    )
    return DivergenceOutput(
        loss=loss,
        token_loss=token_loss.detach(),
        student_entropy=student_entropy.detach(),
        teacher_entropy=teacher_entropy.detach(),
        student_logprob=None if given.labels is None else student_logprob.detach(),
        teacher_logprob=None if given.labels is None else teacher_logprob.detach(),
        hard_loss=None if ignored is None else hard_loss.detach().masked_fill(ignored, 0),
    )


class FusedLinearDivergence(nn.Module):
    """`fused_linear_divergence` with its settings kept: a module to call with hidden states and heads.

    The settings are as there: `divergence`, `beta`, `temperature`, `student_logit_scale`, `teacher_logit_scale`,
    `student_softcap`, `teacher_softcap`, `importance_clip`, `hard_temperature`, `ignore_index`, `reduction`,
    `vocab_size`, `max_chunk_bytes` and `backend`.

    Example:
        >>> import torch
        >>> criterion = FusedLinearDivergence("jsd", beta=0.5)
        >>> h, w = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
        >>> criterion(h, w, torch.randn(5, 8), w).loss.backward()
    """

    def __init__(
        self,
        divergence: str = "reverse_kl",
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        importance_clip: float | None = None,
        hard_temperature: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_size: int | None = None,
        max_chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        options = LossOptions(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            importance_clip=importance_clip,
            reduction=reduction,
            vocab_size=vocab_size,
            max_chunk_bytes=max_chunk_bytes,
            backend=backend,
            hard_temperature=hard_temperature,
        )
        self.options = arguments.check_options(options)
        self.ignore_index = checks.integer("ignore_index", ignore_index)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        labels: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        hard_weight: float | Tensor | None = None,
        hard_labels: Tensor | None = None,
    ) -> DivergenceOutput:
        """The loss of these hidden states and heads; `importance_clip` applies where `old_logprobs` are given, and
        `hard_temperature` where `hard_labels` are."""
        given = LossInputs(
            student_hidden=student_hidden,
            student_weight=student_weight,
            student_bias=student_bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            token_weight=token_weight,
            labels=labels,
            old_logprobs=old_logprobs,
            hard_labels=hard_labels,
            hard_weight=arguments.hard_weight(hard_weight, hard_labels),
        )
        options = self.options
        if old_logprobs is None:
            options = replace(options, importance_clip=None)
        if hard_labels is None:
            options = replace(options, hard_temperature=None)
        return _divergence(given, options, self.ignore_index)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self.options).items() if value is not None)
