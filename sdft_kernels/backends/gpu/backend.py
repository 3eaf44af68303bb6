"""The loss of a chunk of tokens by Triton kernels: what `interface.Backend` asks for.

There are two ways. In the first, the device's own matrix products make logits, (C, V) in float32. The gradient has
memory of its own, in the inputs' dtype, where products of that dtype accumulate in float32; else it takes the place of
the student's logits. With memory of its own, the gradient is kept for the whole chunk, and logits are made for a block
of its tokens at a time: so the two products with the gradient, of which one reads and writes the head's whole gradient,
take many tokens at once and little memory. In the second way, where each logit is needed only once, a kernel makes the
product as well, and there is no memory for logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sdft_kernels.backends import products
from sdft_kernels.backends.gpu.divergence import process_rows
from sdft_kernels.backends.gpu.linear import process_hidden, score_hidden
from sdft_kernels.backends.gpu.operands import Operands, multiplies
from sdft_kernels.backends.gpu.scaling import scale as scale
from sdft_kernels.backends.gpu.scoring import score_rows
from sdft_kernels.backends.gpu.top import process_top_rows
from sdft_kernels.backends.interface import ROW_ALIGNMENT, ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.chunking import BLOCK_TOKENS, Held, blocks
from sdft_kernels.divergences import LogitOptions, Objective, is_mixture
from sdft_kernels.tokens import TokenRows, TokenScores

#: The teacher's hidden state of a token of weight 0 may hold anything: the gradient's kernel writes 0 for such a token.
TEACHER_MAY_BE_ANYTHING = True


def empty_logits(like: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised array, (tokens, vocab), whose rows are padded to the alignment."""
    padded = -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return like.new_empty((tokens, padded), dtype=dtype)[:, :vocab]


@dataclass(frozen=True)
class LogitBuffers:
    """Memory for the logits of a block and the gradient of a chunk, or for the logits of a chunk alone: then `gradient`
    is `student`."""

    student: Tensor
    teacher: Tensor | None
    gradient: Tensor

    @cached_property
    def ones(self) -> Tensor:
        """Ones, (tokens, 1). A product with them sums half-precision numbers over tokens in float32, in one launch."""
        return self.gradient.new_ones(len(self.gradient), 1)


def _gradient_apart(dtypes: Dtypes, with_gradient: bool) -> bool:
    """Whether the gradient is in another dtype than the logits, and so does not fit in their place."""
    return with_gradient and dtypes.gradient != dtypes.wide


def _without_logits(dtypes: Dtypes, objective: Objective, with_gradient: bool) -> bool:
    """Whether the loss needs each logit once, and a kernel that multiplies takes the operands.

    A gradient and a mixture read logits again: without a buffer of them, every product would be made twice. Losses of
    labels are rarely asked for without a gradient.
    """
    plain = objective.hard is None and not is_mixture(objective.divergence)
    return multiplies(dtypes.operands) and not with_gradient and plain


def held(dtypes: Dtypes, objective: Objective, *, with_gradient: bool) -> Held:
    """The bytes of the loss's workspace."""
    if _without_logits(dtypes, objective, with_gradient):
        return Held(0)
    logits = (2 if objective.has_teacher else 1) * dtypes.wide.itemsize
    if _gradient_apart(dtypes, with_gradient):
        return Held(dtypes.gradient.itemsize, logits)
    return Held(logits)


def loss_workspace(
    like: Tensor, tokens: int, vocab: int, dtypes: Dtypes, objective: Objective, *, with_gradient: bool
) -> LogitBuffers | Operands:
    """A workspace for chunks of up to `tokens` tokens."""
    if _without_logits(dtypes, objective, with_gradient):
        return Operands()
    apart = _gradient_apart(dtypes, with_gradient)
    at_once = min(tokens, BLOCK_TOKENS) if apart else tokens
    student = empty_logits(like, at_once, vocab, dtypes.wide)
    teacher = empty_logits(like, at_once, vocab, dtypes.wide) if objective.has_teacher else None
    if not apart:
        return LogitBuffers(student, teacher, student)
    return LogitBuffers(student, teacher, empty_logits(like, tokens, vocab, dtypes.gradient))


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student: HeadOperands,
    teacher: HeadOperands | None,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: LogitBuffers | Operands,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    if isinstance(workspace, Operands):
        assert teacher_hidden is not None and teacher is not None
        heads = workspace.head(student), workspace.head(teacher)
        process_hidden(student_hidden, teacher_hidden, *heads, rows, objective)
        return
    tokens = len(student_hidden)
    gradient = workspace.gradient[:tokens]
    for block in [slice(tokens)] if workspace.gradient is workspace.student else blocks(tokens):
        width = len(student_hidden[block])
        student_logits, teacher_logits, teacher_bias = workspace.student[:width], None, None
        products.logits(student_hidden[block], student.weight, student_logits)
        if teacher_hidden is not None and teacher is not None and workspace.teacher is not None:
            teacher_logits, teacher_bias = workspace.teacher[:width], teacher.bias
            products.logits(teacher_hidden[block], teacher.weight, teacher_logits)
        wanted = gradient[block] if gradients.any else None
        of_block = rows[block]
        if of_block.top is not None:
            process_top_rows(student_logits, of_block.top, of_block, objective, wanted, student.bias)
        else:
            process_rows(student_logits, teacher_logits, of_block, objective, wanted, student.bias, teacher_bias)
    if gradients.hidden is not None:
        products.hidden_gradient(gradient, student.weight, gradients.hidden)
    if gradients.weight is not None:
        products.add_weight_gradient(gradient, student_hidden, gradients.weight, first=gradients.first)
    if gradients.bias is not None and gradient.dtype == gradients.bias.dtype:
        gradients.bias += gradient.sum(0)
    elif gradients.bias is not None:
        products.add_weight_gradient(gradient, workspace.ones[:tokens], gradients.bias[:, None], first=False)


def scoring_held(dtypes: Dtypes) -> Held:
    """The bytes of scoring's workspace."""
    return Held(0 if multiplies(dtypes.operands) else dtypes.wide.itemsize)


def scoring_workspace(like: Tensor, tokens: int, vocab: int, dtypes: Dtypes) -> Tensor | Operands:
    """A workspace for chunks of up to `tokens` tokens."""
    if multiplies(dtypes.operands):
        return Operands()
    return empty_logits(like, tokens, vocab, dtypes.wide)


def score_chunk(
    hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions, workspace: Tensor | Operands
) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    if isinstance(workspace, Operands):
        score_hidden(hidden, workspace.head(head), scores, options)
        return
    logits = workspace[: len(hidden)]
    products.logits(hidden, head.weight, logits)
    score_rows(logits, head.bias, scores, options)
