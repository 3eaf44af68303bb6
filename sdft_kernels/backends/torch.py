"""The loss of a chunk of tokens in plain torch, in place: for CPU, and any device without Triton.

Logits lie with the vocabulary along the rows, (V, C), since matrix products of few tokens run faster into that
layout, and the vocabulary is worked through in tiles small enough to stay in the last-level cache from one
operation to the next, each of which is one pass. Where student and teacher share a head, one product of twice as
many tokens makes both models' logits. Each logit's exponential is taken once (twice for mixtures), as a power of two:
the pass that subtracts the maximum also multiplies by the factor that turns u into z, in bits.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from sdft_kernels.backends.interface import ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.tiles import (
    GradientParts,
    LogitTiles,
    Target,
    TileSoftmax,
    WholeSoftmax,
    aligned,
    apply_slope,
    at_labels,
    bits,
    carry_back,
    masked_entries,
    multiply,
    of_tiles,
    padded,
    padded_labels,
    slope_of,
    softmax_of,
    take_out,
    transform,
    u_of_labels,
)
from sdft_kernels.chunking import Held
from sdft_kernels.coarse import Compared, compare
from sdft_kernels.divergences import (
    MASKED,
    MIXTURES,
    NATS,
    PLAIN,
    LogitOptions,
    Objective,
    Sums,
    Tile,
    cross_entropy,
    finish,
    gradient_of_p,
    is_mixture,
    log_ratio_of,
)
from sdft_kernels.tokens import TokenRows, TokenScores, TopTokens

#: Whether the teacher's hidden state of a token of weight 0 may hold anything.
TEACHER_MAY_BE_ANYTHING = False


def arrays(objective: Objective, *, with_gradient: bool) -> int:
    """How many arrays of a model's logits are held: both models' logits, in whose place the gradient's A and B are
    left, and p of a hard term that is apart; of cross-entropy p, and where the entropy or the mean of all logits has a
    gradient, p z and ones."""
    if objective.has_teacher:
        return 3 if objective.hard_apart else 2
    assert objective.hard is not None
    extra = (objective.hard.entropy_weight, objective.hard.label_smoothing)
    return 1 + (sum(value != 0 for value in extra) if with_gradient else 0)


def held(dtypes: Dtypes, objective: Objective, *, with_gradient: bool) -> Held:
    """The bytes of the loss's workspace."""
    return Held(arrays(objective, with_gradient=with_gradient) * dtypes.wide.itemsize)


def loss_workspace(
    like: Tensor, tokens: int, vocab: int, dtypes: Dtypes, objective: Objective, *, with_gradient: bool
) -> LogitTiles:
    """A workspace for chunks of up to `tokens` tokens, with all arrays side by side."""
    keep = with_gradient or is_mixture(objective.divergence)
    width = arrays(objective, with_gradient=with_gradient) * aligned(tokens)
    return LogitTiles(like, width, vocab, dtypes.wide, keep=keep)


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student: HeadOperands,
    teacher: HeadOperands | None,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: LogitTiles,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    hidden = padded(student_hidden, aligned(len(rows.loss)), rows.loss.dtype)
    if rows.top is not None:
        made = _process_top(hidden, student, rows, objective, workspace, with_gradient=gradients.any)
    elif teacher_hidden is None or teacher is None:
        made = _process_labels(hidden, student, rows, objective, workspace, with_gradient=gradients.any)
    else:
        columns = _Columns(hidden, padded(teacher_hidden, len(hidden), hidden.dtype), student, teacher)
        made = _process_pair(columns, rows, objective, workspace, with_gradient=gradients.any)
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, len(hidden) - len(rows.weight)))
        factor = factor * (objective.student.scale / objective.student.temperature)
        masked = masked_entries(student.bias, objective.student)
        carry_back(hidden, student, masked, made.times(factor, hidden.dtype), gradients, workspace)


def _process_pair(
    columns: _Columns, rows: TokenRows, objective: Objective, workspace: LogitTiles, *, with_gradient: bool
) -> GradientParts:
    """Fills `rows` with a divergence, and leaves A and B in the workspace."""
    dtype, width = rows.loss.dtype, len(columns.student)
    labels, hard_labels = padded_labels(rows.labels, width, models=2), padded_labels(rows.hard_labels, width, models=1)
    capped = objective.student.softcap is not None and with_gradient
    mixture = is_mixture(objective.divergence)
    unit = bits(objective.student, dtype)
    teacher_unit = bits(objective.teacher, dtype)
    seen: list[TileSoftmax] = []
    sums: list[Sums] = []
    at_peaks: list[Tensor] = []
    hard_seen: list[TileSoftmax] = []
    hard_u: list[Tensor] = []
    hard_unit, both = bits(objective.hard_logits, dtype), slice(2 * width)
    count = arrays(objective, with_gradient=with_gradient) * width
    for part, kept, passing, scratch in workspace.tiles(count):
        # A mixture's second pass starts from logits.
        logits, exponentials = (kept[:, both], passing[:, both]) if mixture else (passing[:, both], kept[:, both])
        columns.multiply(part, logits)
        student_logits, teacher_logits = logits.split(width, 1)
        transform(student_logits, columns.bias, part, objective.student)
        transform(teacher_logits, columns.teacher_bias, part, objective.teacher)
        if scaled := teacher_unit != unit:
            teacher_logits.mul_(teacher_unit / unit)
        if hard_labels is not None:
            hard_u.append(at_labels(student_logits, hard_labels - part.start))
        if objective.hard_apart:
            apart, own = passing[:, 2 * width :].copy_(student_logits), kept[:, 2 * width :]
            hard_seen.append(softmax_of(apart, own, scratch[:, 2 * width :], hard_unit, None))
        of_tile = None if labels is None else labels - part.start
        inexact = scaled and columns.teacher_bias is not None
        seen.append(softmax_of(logits, exponentials, scratch[:, both], unit, of_tile, inexact_masks=inexact))
        if mixture:
            at_peaks.append(_at_peak(student_logits, teacher_logits))
        else:
            slope = slope_of(student_logits, seen[-1], unit, scratch) if capped else None
            sums.append(PLAIN[objective.divergence](_tile(logits, exponentials, seen[-1])))
            if slope is not None:
                apply_slope(slope, kept)
    softmax = WholeSoftmax(seen, labels, workspace.tile, unit)
    shares = softmax.shares(at_peaks)
    if mixture:
        for number, (_, kept, passing, scratch) in enumerate(workspace.tiles(count)):
            student_logits, teacher_logits = kept[:, both].split(width, 1)
            slope = slope_of(student_logits, seen[number], unit, scratch) if capped else None
            tile = _tile(passing[:, both], kept[:, both], seen[number])
            log_ratio = log_ratio_of(student_logits, teacher_logits, shares.log_ratio[number].to(dtype), tile.teacher)
            kept[:, both].exp2_()
            assert shares.peak_ratio is not None
            sums.append(MIXTURES[objective.divergence](tile, log_ratio, shares.peak_ratio, objective.beta))
            if slope is not None:
                apply_slope(slope, kept)

    loss, x, y = finish(objective.divergence, objective.beta, _stack(sums), shares)
    store_rows(rows, objective, loss, softmax.entropy, softmax.logprob)
    if hard_labels is None or rows.hard_weight is None or rows.hard_loss is None:
        return GradientParts([x, y])
    u = of_tiles(hard_u, hard_labels, workspace.tile)
    hard, of_student = softmax, slice(width)
    if objective.hard_apart:
        hard = WholeSoftmax(hard_seen, None, workspace.tile, hard_unit)
    rows.hard_loss.copy_((hard.logsumexp[of_student] - NATS * hard_unit * u.double())[: len(rows.hard_loss)])
    weight = objective.hard_ratio * torch.nn.functional.pad(rows.hard_weight.double(), (0, width - len(rows.weight)))
    of_p = weight * hard.share[:, of_student]
    coefficients = [x, y, of_p] if objective.hard_apart else [x + of_p, y]
    return GradientParts(coefficients, Target.of(hard_labels, u, objective.student, weight))


def _process_labels(
    hidden: Tensor,
    head: HeadOperands,
    rows: TokenRows,
    objective: Objective,
    workspace: LogitTiles,
    *,
    with_gradient: bool,
) -> GradientParts:
    """Fills `rows` with a cross-entropy, and leaves in the workspace the arrays that `arrays` counts."""
    hard, options, width, vocab = objective.hard, objective.student, len(hidden), len(head.weight)
    assert hard is not None and rows.labels is not None
    labels, unit = torch.nn.functional.pad(rows.labels, (0, width - len(rows.labels))), bits(options, hidden.dtype)
    seen: list[TileSoftmax] = []
    sums: list[Tensor] = []
    for part, kept, passing, scratch in workspace.tiles(arrays(objective, with_gradient=with_gradient) * width):
        exponentials, *others = kept.split(width, 1)
        logits, scratch = passing[:, :width], scratch[:, :width]
        multiply(head.weight, hidden, part, logits)
        transform(logits, head.bias, part, options)
        sums.append(logits.sum(0))
        seen.append(softmax_of(logits, exponentials, scratch, unit, labels - part.start))
        if with_gradient and hard.entropy_weight:
            torch.mul(exponentials, logits, out=others.pop(0))
        if with_gradient and hard.label_smoothing:
            others.pop().fill_(1)
        if with_gradient and options.softcap is not None:
            apply_slope(slope_of(logits, seen[-1], unit, scratch), kept)
    softmax = WholeSoftmax(seen, labels, workspace.tile, unit)
    assert softmax.logprob is not None and softmax.label_u is not None
    mean_logprob = NATS * unit * torch.stack(sums).double().sum(0) / vocab - softmax.logsumexp
    loss = cross_entropy(hard, softmax.logprob, mean_logprob, softmax.logsumexp, softmax.entropy)
    store_rows(rows, objective, loss, softmax.entropy, softmax.logprob, softmax.logsumexp)
    weight_of_p = gradient_of_p(hard, softmax.logsumexp, softmax.entropy, softmax.log_share)
    coefficients = [softmax.share * weight_of_p]
    if hard.entropy_weight:
        coefficients.append(hard.entropy_weight * NATS * softmax.share)
    if hard.label_smoothing:
        coefficients.append(torch.full_like(softmax.share, -hard.label_smoothing / vocab))
    target = torch.full_like(softmax.logprob, 1 - hard.label_smoothing)
    return GradientParts(coefficients, Target.of(labels, softmax.label_u, options, target))


def _process_top(
    hidden: Tensor,
    head: HeadOperands,
    rows: TokenRows,
    objective: Objective,
    workspace: LogitTiles,
    *,
    with_gradient: bool,
) -> GradientParts:
    """Fills `rows` with a coarse divergence, and leaves in the workspace the exponentials of the rest's logits."""
    options, width = objective.student, len(hidden)
    assert rows.top is not None
    ids = padded_ids(rows.top, width, len(head.weight))
    found, unit = hidden.new_full(ids.shape, MASKED), bits(options, hidden.dtype)
    labels = padded_labels(rows.labels, width, models=1)
    seen: list[TileSoftmax] = []
    for part, exponentials, logits, scratch in workspace.tiles(width):
        multiply(head.weight, hidden, part, logits)
        transform(logits, head.bias, part, options)
        take_out(logits, ids - part.start, found)
        seen.append(softmax_of(logits, exponentials, scratch, unit, None if labels is None else labels - part.start))
        if with_gradient and options.softcap is not None:
            apply_slope(slope_of(logits, seen[-1], unit, scratch).clamp_(min=0), exponentials)
    rest = WholeSoftmax(seen, labels, workspace.tile, unit)
    label_u = None if labels is None or rest.label_u is None else u_of_labels(labels, rest.label_u, ids, found)
    of = NATS * unit
    compared = compare_top(rows, objective, of * found.double(), rest.logsumexp, rest.entropy, len(head.weight))
    store_top(rows, objective, compared, None if label_u is None else of * label_u.double())
    return GradientParts([rest.share * compared.of_rest], Target.of(ids, found, options, -compared.of_entries.T))


def padded_ids(top: TopTokens, width: int, vocab: int) -> Tensor:
    """The ids of a chunk's columns, (K, width); columns that only fill up the chunk have none."""
    return torch.nn.functional.pad(top.ids.T, (0, width - len(top.ids)), value=vocab)


def compare_top(
    rows: TokenRows, objective: Objective, z: Tensor, rest_logsumexp: Tensor, rest_entropy: Tensor, vocab: int
) -> Compared:
    """Of a chunk's columns, from z at the teacher's entries, (K, width), and the softmax over the rest, (width,)."""
    assert rows.top is not None and objective.coarse is not None
    missing = len(rest_entropy) - len(rows.loss)
    teacher = torch.nn.functional.pad(rows.top.logprobs.double(), (0, 0, 0, missing), value=-torch.inf)
    tail = torch.nn.functional.pad(rows.top.tail, (0, missing))
    masked = MASKED / 2 * objective.student.factor
    return compare(objective.coarse, z.T, rest_logsumexp, rest_entropy, teacher, tail, masked=masked, vocab=vocab)


def store_top(rows: TokenRows, objective: Objective, compared: Compared, label_z: Tensor | None) -> None:
    """A chunk's values into `rows`, from what was compared and the labels' z, (width,)."""
    logprob = None if label_z is None else label_z - compared.logsumexp
    store_rows(rows, objective, compared.loss, compared.entropy, logprob)
    if rows.top is not None:
        rows.top.student_tail.copy_(compared.tail_logprob[: len(rows.loss)])


def store_rows(
    rows: TokenRows,
    objective: Objective,
    loss: Tensor,
    entropy: Tensor,
    logprob: Tensor | None,
    logsumexp: Tensor | None = None,
) -> None:
    """A chunk's values into `rows`, from (width,), or (2 width,) for the student and then the teacher."""
    tokens, width = len(rows.loss), len(loss)
    rows.loss.copy_(loss[:tokens])
    rows.student_entropy.copy_(entropy[:tokens])
    if rows.teacher_entropy is not None:
        rows.teacher_entropy.copy_(entropy[width:][:tokens])
    if rows.logsumexp is not None and logsumexp is not None:
        rows.logsumexp.copy_(logsumexp[:tokens])
    if logprob is None or rows.student_logprob is None:
        return
    rows.student_logprob.copy_(logprob[:tokens])
    if rows.teacher_logprob is not None:
        rows.teacher_logprob.copy_(logprob[width:][:tokens])
    if rows.old_logprobs is not None:
        rows.weight.mul_(importance_weight(rows.student_logprob, rows.old_logprobs, objective.importance_clip))


class _Columns:
    """The hidden states of a chunk, (width, H) for each model, which make the columns of its logits: first the
    student's, then the teacher's."""

    def __init__(self, student: Tensor, teacher: Tensor, head: HeadOperands, teacher_head: HeadOperands) -> None:
        self.student, self._teacher = student, teacher
        self.bias, self.teacher_bias = head.bias, teacher_head.bias
        self._weight, self._teacher_weight = head.weight, teacher_head.weight
        shared = head.weight is teacher_head.weight
        self._both = torch.cat((student, teacher)) if shared else None

    def multiply(self, part: slice, out: Tensor) -> None:
        """out ← both models' products of a tile of the vocabulary, (v, 2 width)."""
        if self._both is not None:
            multiply(self._weight, self._both, part, out)
        else:
            student, teacher = out.chunk(2, 1)
            multiply(self._weight, self.student, part, student)
            multiply(self._teacher_weight, self._teacher, part, teacher)


def _at_peak(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's logit minus the teacher's, (C,), at the entry of a tile where the student's is largest."""
    peak = student.amax(0)
    return peak - torch.where(student == peak, teacher, -torch.inf).amax(0)


def _stack(sums: list[Sums]) -> Sums:
    """The sums of all tiles stacked, (tiles, C) in float64."""

    def of(name: str) -> Tensor | None:
        values = [getattr(tile, name) for tile in sums]
        return None if values[0] is None else torch.stack(values).double()

    return Sums(**{field.name: of(field.name) for field in fields(Sums)})


def _tile(logits: Tensor, exponentials: Tensor, seen: TileSoftmax) -> Tile:
    (student, teacher), (p, q) = logits.chunk(2, 1), exponentials.chunk(2, 1)
    return Tile(student, teacher, p, q, seen.total[: p.shape[1]])


def scale(values: Tensor, factor: Tensor) -> None:
    """values ← values · factor in place. The values may have any shape; the factor has shape (1,)."""
    values.mul_(factor)


def scoring_held(dtypes: Dtypes) -> Held:
    """The bytes of scoring's workspace."""
    return Held(dtypes.wide.itemsize)


def scoring_workspace(like: Tensor, tokens: int, vocab: int, dtypes: Dtypes) -> LogitTiles:
    """A workspace for chunks of up to `tokens` tokens."""
    return LogitTiles(like, aligned(tokens), vocab, dtypes.wide, keep=False)


def score_chunk(
    hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions, workspace: LogitTiles
) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    width = aligned(len(hidden))
    hidden = padded(hidden, width, scores.entropy.dtype)
    labels = padded_labels(scores.labels, width, models=1)
    seen: list[TileSoftmax] = []
    unit = bits(options, hidden.dtype)
    for part, exponentials, logits, scratch in workspace.tiles(width):
        multiply(head.weight, hidden, part, logits)
        transform(logits, head.bias, part, options)
        seen.append(softmax_of(logits, exponentials, scratch, unit, None if labels is None else labels - part.start))
    softmax = WholeSoftmax(seen, labels, workspace.tile, unit)
    store_scores(scores, softmax.entropy, softmax.logsumexp, softmax.logprob, softmax.top1)


def store_scores(
    scores: TokenScores, entropy: Tensor, logsumexp: Tensor, logprob: Tensor | None, top1: Tensor | None
) -> None:
    """A chunk's values, (width,), into `scores`."""
    tokens = len(scores.entropy)
    scores.entropy.copy_(entropy[:tokens])
    scores.logsumexp.copy_(logsumexp[:tokens])
    if logprob is not None and top1 is not None:
        assert scores.logprob is not None and scores.top1 is not None
        scores.logprob.copy_(logprob[:tokens])
        scores.top1.copy_(top1[:tokens])


def importance_weight(logprob: Tensor, old_logprob: Tensor, clip: float | None) -> Tensor:
    """min(exp(logprob - old_logprob), clip): how much likelier the sampled token is now than when sampled."""
    ratio = torch.exp(logprob - old_logprob)
    return ratio if clip is None else ratio.clamp_(max=clip)
