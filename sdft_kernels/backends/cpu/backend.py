"""The loss of a chunk of tokens by compiled kernels on a CPU, in float32: what `interface.Backend` asks for.

Logits lie as in backends/torch.py, (V, C) with the teacher's columns after the student's, in one array, which is
written once and read once or twice. The matrix products are in kernels.c too: they take a few vocabulary entries at a
time, so that these entries' logits and gradient are still in the cache for the next operation on them. The vocabulary
is worked through in tiles where the kernels cannot read a head as it is, and for scoring, which keeps one tile's
logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from sdft_kernels.backends.cpu import library, pages
from sdft_kernels.backends.cpu.library import Carry, Constant, Model, Options
from sdft_kernels.backends.interface import ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.records import FIELDS, Field
from sdft_kernels.backends.tiles import Target, aligned, padded, padded_labels
from sdft_kernels.backends.torch import TEACHER_MAY_BE_ANYTHING as TEACHER_MAY_BE_ANYTHING
from sdft_kernels.backends.torch import scale as scale
from sdft_kernels.backends.torch import store_rows, store_scores
from sdft_kernels.chunking import Held
from sdft_kernels.divergences import (
    CROSS_ENTROPY,
    LARGEST_PEAK_RATIO,
    LogitOptions,
    Objective,
    cross_entropy,
    gradient_of_p,
    is_mixture,
    log_over_mixture,
    mixture_shares,
)
from sdft_kernels.tokens import TokenRows, TokenScores, is_plain

#: Bytes of logits in a tile, where the vocabulary is worked through in tiles.
TILE_BYTES = 12 << 20

#: Floats in a cache line; and a number of floats such that rows whose length is a multiple of it share a few sets of
#: the cache.
LINE, SETS = 16, 128

#: The places in a record that hold each model's softmax.
STUDENT, TEACHER = slice(Field.PEAK, Field.DOT + 1), slice(Field.TEACHER_PEAK, Field.TEACHER_DOT + 1)


def address(tensor: Tensor) -> int:
    """The address of a tensor's values, which C reads without asking what is there: so the tensor is checked."""
    if tensor.device.type != "cpu" or not is_plain(tensor):
        raise TypeError(f"a plain tensor on the CPU was expected, not a {type(tensor).__name__} on {tensor.device}")
    return tensor.data_ptr()


class LogitRows:
    """A row of `width` logits for each vocabulary entry, or without `keep` for each entry of one tile."""

    def __init__(self, width: int, vocab: int, *, keep: bool) -> None:
        self.vocab, self.keep = vocab, keep
        stride = width + (LINE if width % SETS == 0 else 0)
        self.tile = min(vocab, max(64, TILE_BYTES // (4 * stride) // 16 * 16))
        self._rows = pages.kept((vocab if keep else self.tile, stride), torch.float32)
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")

    def tiles(self, width: int, *, whole: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Each tile's part of the vocabulary, and its rows, (v, width); where all are kept, `whole` makes it one."""
        tile = self.vocab if whole and self.keep else self.tile
        for start in range(0, self.vocab, tile):
            part = slice(start, min(start + tile, self.vocab))
            first = start if self.keep else 0
            yield part, self._rows[first : first + part.stop - part.start, :width]

    def scratch(self, sizes: list[int]) -> list[Tensor]:
        """Uninitialised float32 arrays of the given lengths beside the logits, the same memory at every call."""
        if len(self._scratch) < sum(sizes):
            self._scratch = self._scratch.new_empty(sum(sizes))
        return list(self._scratch[: sum(sizes)].split(sizes))


def held(dtypes: Dtypes, objective: Objective, *, with_gradient: bool) -> Held:
    """Of the loss's workspace: the models' logits, of which the gradient is made."""
    return Held(8 if objective.has_teacher else 4)


def loss_workspace(
    like: Tensor, tokens: int, vocab: int, dtypes: Dtypes, objective: Objective, *, with_gradient: bool
) -> LogitRows:
    """For chunks of up to `tokens` tokens, the models side by side."""
    width = (2 if objective.has_teacher else 1) * aligned(tokens)
    return LogitRows(width, vocab, keep=with_gradient or is_mixture(objective.divergence))


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    student: HeadOperands,
    teacher: HeadOperands | None,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: LogitRows,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    chunk = _Chunk(len(rows.loss), student, teacher, objective, workspace)
    hidden = padded(student_hidden, chunk.width, torch.float32)
    if teacher_hidden is None or teacher is None:
        columns = [_Columns(hidden, student.weight)]
    else:
        columns = _columns(hidden, padded(teacher_hidden, chunk.width, torch.float32), student, teacher)
    labels = padded_labels(rows.labels, chunk.width, models=chunk.models)
    label_logits = hidden.new_zeros(chunk.models * chunk.width)
    hard_labels, hard_u = padded_labels(rows.hard_labels, chunk.width, models=1), hidden.new_zeros(chunk.width)
    records = _new_records(label_logits, chunk.width)
    for part, logits in chunk.tiles():
        models = (Model * len(columns))(*(some.model(part) for some in columns))
        chunk.run("fold", part, logits, models, len(models), address(records))
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
        if hard_labels is not None:
            _look_up(hard_labels, logits[:, : chunk.width], part, hard_u)
    p = _MergedSoftmax(records[:, STUDENT], objective.student)
    if objective.has_teacher:
        q = _MergedSoftmax(records[:, TEACHER], objective.teacher)
        own = records[:, [Field.PEAK, Field.CROSS, Field.TEACHER_AT_PEAK]].unbind(1)
        loss, constants = _combine(chunk, p, q, *own)
        logprob = None
        if labels is not None:
            of_models = zip((p, q), label_logits.chunk(2), strict=True)
            logprob = torch.cat([of.logprob(labelled) for of, labelled in of_models])
        store_rows(rows, objective, loss, torch.cat((p.entropy, q.entropy)), logprob)
        labels, label_logits = hard_labels, hard_u
        target = _add_hard_term(rows, p, records[:, Field.HARD_SUM], hard_u, objective, constants)
    else:
        logprob = p.logprob(label_logits)
        loss, constants = _combine_labels(p, records[:, Field.CROSS].sum(0), logprob, objective, len(student.weight))
        store_rows(rows, objective, loss, p.entropy, logprob, p.logsumexp)
        target = torch.ones_like(loss) - objective.hard.label_smoothing if objective.hard is not None else None
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, chunk.width - len(rows.weight)))
        factor *= objective.student.scale / objective.student.temperature
        constants[[Constant.P_FACTOR, Constant.Q_FACTOR, Constant.UNIFORM, Constant.HARD_FACTOR]] *= factor
        missing = None
        if target is not None and labels is not None:
            missing = Target.of(labels, label_logits, objective.student, factor * target)
        _carry_back(hidden, chunk, constants.float(), missing, gradients)


class _Columns:
    """Some columns of a chunk's logits, from column `first` on: their hidden states, (tokens, H), and a head."""

    def __init__(self, hidden: Tensor, weight: Tensor, first: int = 0) -> None:
        (tokens, self._size), columns = hidden.shape, kernels().panel_columns()
        whole = torch.nn.functional.pad(hidden, (0, 0, 0, -tokens % columns))
        self._panels = whole.view(-1, columns, self._size).transpose(1, 2).contiguous()
        self._weight, self._first, self._tokens = weight, first, tokens

    def model(self, part: slice) -> Model:
        """For a tile of the vocabulary, until the next one is asked for."""
        self._head = rows_of(self._weight, part)
        return Model(
            address(self._panels),
            address(self._head),
            self._first,
            self._tokens,
            self._size,
            self._head.stride(0),
        )


def _columns(
    student_hidden: Tensor, teacher_hidden: Tensor, student: HeadOperands, teacher: HeadOperands
) -> list[_Columns]:
    """Both models' columns of logits: one product's, where they share a head."""
    if student.weight is teacher.weight:
        return [_Columns(torch.cat((student_hidden, teacher_hidden)), student.weight)]
    first = len(student_hidden)
    return [_Columns(student_hidden, student.weight), _Columns(teacher_hidden, teacher.weight, first)]


def is_read_as_it_is(weight: Tensor) -> bool:
    """Whether kernels can read this head: in float32, the numbers of each row side by side."""
    return weight.dtype == torch.float32 and weight.stride(1) == 1


def rows_of(weight: Tensor, part: slice) -> Tensor:
    """A head's rows for a tile of the vocabulary, as kernels read them."""
    rows = weight[part]
    return rows if is_read_as_it_is(rows) else rows.float().contiguous()


def _combine(
    chunk: _Chunk, p: _MergedSoftmax, q: _MergedSoftmax, peaks: Tensor, own: Tensor, teacher_at_peaks: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens' divergence, (width,), and what their gradient needs, of tokens of weight 1, (constants, width).

    From the models' softmax, and each thread's largest student's logit, the divergence's own sum, and the teacher's
    logit where the student's is largest, (threads, width).
    """
    objective = chunk.objective
    at_peak = teacher_at_peaks.gather(0, peaks.argmax(0, keepdim=True)).squeeze(0)
    teacher_factor = objective.teacher.factor
    if is_mixture(objective.divergence):
        at_peak = at_peak.maximum(q.peak - LARGEST_PEAK_RATIO / teacher_factor)
    # log p - log q where p is largest
    peak_ratio = teacher_factor * (q.peak - at_peak) + q.log_sum - p.log_sum
    constants = peak_ratio.new_zeros(len(Constant), chunk.width)
    for row, values in zip(constants, (p.peak, q.peak, at_peak, 1 / p.total, 1 / q.total), strict=False):
        row.copy_(values)
    if objective.divergence == "reverse_kl":
        centre = p.mean_of(own, p.shift - teacher_factor * (teacher_at_peaks - at_peak))
        constants[Constant.CENTRE] = centre
        return centre + peak_ratio, constants
    if objective.divergence == "forward_kl":
        return q.mean_of(own, q.shift - p.shift) - q.log_sum + p.log_sum, constants
    at_peak_values = (peak_ratio, *mixture_shares(peak_ratio, objective.beta))
    for row, values in zip(constants[Constant.PEAK_RATIO :], at_peak_values, strict=False):
        row.copy_(values)
    sums, narrow = peak_ratio.new_zeros(torch.get_num_threads(), 2, chunk.width), constants.float()
    for part, logits in chunk.tiles():
        chunk.run("fold_mixture", part, logits, address(narrow), address(sums))
    scores, losses = sums.sum(0)
    centre = scores / p.total
    constants[Constant.CENTRE] = centre
    loss = losses / (p.total if objective.divergence == "skew_reverse_kl" else q.total)
    if objective.divergence == "jsd":
        at_peak_score = (1 - objective.beta) * log_over_mixture(-peak_ratio, objective.beta)
        loss = centre + at_peak_score + objective.beta * loss
    return loss, constants


def _combine_labels(
    p: _MergedSoftmax, total: Tensor, logprob: Tensor, objective: Objective, vocab: int
) -> tuple[Tensor, Tensor]:
    """The same of cross-entropy, from the softmax, the sum of all u, and the labels' log-probabilities."""
    hard = objective.hard
    assert hard is not None
    loss = cross_entropy(hard, logprob, objective.student.factor * total / vocab - p.logsumexp, p.logsumexp, p.entropy)
    constants = loss.new_zeros(len(Constant), len(loss))
    constants[Constant.A], constants[Constant.P_FACTOR] = p.peak, 1 / p.total
    constants[Constant.CENTRE] = -gradient_of_p(hard, p.logsumexp, p.entropy, -p.log_sum)
    constants[Constant.SLOPE], constants[Constant.UNIFORM] = hard.entropy_weight, hard.label_smoothing / vocab
    return loss, constants


def _add_hard_term(
    rows: TokenRows, p: _MergedSoftmax, sums: Tensor, u: Tensor, objective: Objective, constants: Tensor
) -> Tensor | None:
    """Fills the rows' hard loss and adds the hard term to a divergence's constants, from each thread's sum of its
    exponentials, (threads, width), if they are apart, and the labels' u. Returns what the labels' gradients lack."""
    if rows.hard_weight is None or rows.hard_loss is None:
        return None
    ratio, factor = objective.hard_ratio, objective.hard_logits.factor
    total = ((ratio * p.shift).exp() * sums).sum(0) if objective.hard_apart else p.total
    rows.hard_loss.copy_((total.log() - factor * (u.double() - p.peak))[: len(rows.hard_loss)])
    weight = ratio * torch.nn.functional.pad(rows.hard_weight.double(), (0, len(u) - len(rows.hard_weight)))
    if objective.hard_apart:
        constants[Constant.HARD_FACTOR] = weight / total
    elif objective.divergence == "forward_kl":
        constants[Constant.P_FACTOR] *= 1 + weight
    else:
        constants[Constant.CENTRE] -= weight
    return weight


def _carry_back(
    hidden: Tensor, chunk: _Chunk, constants: Tensor, target: Target | None, gradients: ChunkGradients
) -> None:
    """The gradient of the student's logits, a few vocabulary entries at a time, times hidden states and head."""
    threads, size, width = torch.get_num_threads(), hidden.shape[1], chunk.width
    columns = kernels().panel_columns()
    if target is not None:
        target = Target(target.labels, target.weight.float())
    panels = torch.nn.functional.pad(hidden, (0, -size % columns)).view(width, -1, columns).transpose(0, 1).contiguous()
    scratch, sums = chunk.scratch(threads, kernels().carry_back_scratch(width), width * len(panels) * columns)
    for number, (part, logits) in enumerate(chunk.tiles()):
        head = rows_of(chunk.head.weight, part)
        weight = None if gradients.weight is None else gradients.weight[part]
        labels = None if target is None else target.labels - part.start
        carry = Carry(
            address(panels),
            address(head),
            None if weight is None else address(weight),
            None if gradients.bias is None else address(gradients.bias[part]),
            None if gradients.hidden is None else address(sums),
            None if labels is None else address(labels),
            None if target is None else address(target.weight),
            size,
            head.stride(0),
            0 if weight is None else weight.stride(0),
            not gradients.first,
            number == 0,
        )
        chunk.run("carry_back", part, logits, address(constants), carry, address(scratch))
    if gradients.hidden is not None:
        total = sums.view(threads, *panels.shape).sum(0).transpose(0, 1).reshape(width, -1)
        gradients.hidden.copy_(total[: len(gradients.hidden), :size])


class _Chunk:
    """The logits of a chunk, and what the kernels need beside them: heads, options and the workspace."""

    def __init__(
        self, tokens: int, head: HeadOperands, teacher: HeadOperands | None, objective: Objective, workspace: LogitRows
    ) -> None:
        self.width, self.head, self.objective = aligned(tokens), head, objective
        self.models = 1 if teacher is None else 2
        self._workspace, self._teacher_bias = workspace, None if teacher is None else teacher.bias
        heads = [head] if teacher is None else [head, teacher]
        self._as_they_are = all(is_read_as_it_is(each.weight) for each in heads)

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Each tile's part of the vocabulary, and the models' logits, (v, models · width); one tile, unless heads have
        to be laid out for the kernels a tile at a time."""
        return self._workspace.tiles(self.models * self.width, whole=self._as_they_are)

    def scratch(self, threads: int, *floats: int) -> list[Tensor]:
        """Uninitialised arrays of the given numbers of floats for each thread, the same for every chunk of a call."""
        return self._workspace.scratch([threads * count for count in floats])

    def run(self, kernel: str, part: slice, logits: Tensor, *arguments: object) -> None:
        """A kernel on a tile's logits, with `arguments` as it takes them, on as many threads as torch takes."""
        getattr(kernels(), kernel)(
            *(address(logits), len(logits), logits.stride(0), self.width),
            _options(self.objective.student, self.head.bias, part, self.objective),
            _options(self.objective.teacher, self._teacher_bias, part),
            library.divergence_codes()[self.objective.divergence],
            self.objective.beta,
            *arguments,
            torch.get_num_threads(),
        )


def kernels() -> ctypes.CDLL:
    """The compiled kernels, where they were built."""
    found = library.find()
    assert found is not None, "the compiled kernels were not built"
    return found


def _new_records(like: Tensor, width: int) -> Tensor:
    """Records as they are before any logits, (threads, FIELDS, width) in float64."""
    records = like.new_zeros((torch.get_num_threads(), FIELDS, width), dtype=torch.float64)
    records[:, [Field.PEAK, Field.TEACHER_PEAK]] = -torch.inf
    return records


class _MergedSoftmax:
    """One model's softmax from the peak, sum and dot of each thread's records, (threads, 3, width)."""

    def __init__(self, records: Tensor, options: LogitOptions) -> None:
        peaks, self._sums, dots = records.unbind(1)
        self._factor = options.factor
        self.peak = peaks.amax(0)
        #: A thread's largest logit minus the chunk's largest. It is 0, as the sums are, for a thread that had no rows.
        self.shift = torch.where(peaks == -torch.inf, 0, self._factor * (peaks - self.peak))
        self.total = (self.shift.exp() * self._sums).sum(0)
        self.log_sum = self.total.log()
        self.logsumexp = self._factor * self.peak + self.log_sum
        self.entropy = self.log_sum - self.mean_of(dots, self.shift)

    def mean_of(self, moments: Tensor, offset: Tensor) -> Tensor:
        """The mean of a score g under this softmax, from each thread's Σ e g and the offset to add to its g."""
        return (self.shift.exp() * (moments + offset * self._sums)).sum(0) / self.total

    def logprob(self, labelled: Tensor) -> Tensor:
        """The log-probabilities of labels, (width,), from their u."""
        return self._factor * (labelled.double() - self.peak) - self.log_sum


def scoring_held(dtypes: Dtypes) -> Held:
    """The bytes of scoring's workspace."""
    return Held(4)


def scoring_workspace(like: Tensor, tokens: int, vocab: int, dtypes: Dtypes) -> LogitRows:
    """A workspace for chunks of up to `tokens` tokens."""
    return LogitRows(aligned(tokens), vocab, keep=False)


def score_chunk(
    hidden: Tensor, head: HeadOperands, scores: TokenScores, options: LogitOptions, workspace: LogitRows
) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    chunk = _Chunk(len(hidden), head, None, Objective(CROSS_ENTROPY, student=options), workspace)
    hidden = padded(hidden, chunk.width, torch.float32)
    labels = padded_labels(scores.labels, chunk.width, models=1)
    label_logits = hidden.new_zeros(chunk.width)
    records = _new_records(hidden, chunk.width)
    columns = _Columns(hidden, head.weight)
    for part, logits in workspace.tiles(chunk.width):
        chunk.run("fold", part, logits, columns.model(part), 1, address(records))
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
    softmax = _MergedSoftmax(records[:, STUDENT], options)
    logprob, top1 = None, None
    if labels is not None:
        logprob, top1 = softmax.logprob(label_logits), label_logits >= softmax.peak
    store_scores(scores, softmax.entropy, softmax.logsumexp, logprob, top1)


def _look_up(labels: Tensor, logits: Tensor, part: slice, found: Tensor) -> None:
    """Writes the u of labels, (columns,), into `found` where the labels lie in this tile."""
    here = (labels >= part.start) & (labels < part.stop)
    rows = (labels - part.start).clamp(0, len(logits) - 1)
    found.copy_(torch.where(here, logits.gather(0, rows.unsqueeze(0)).squeeze(0), found))


def _options(options: LogitOptions, bias: Tensor | None, part: slice, objective: Objective | None = None) -> Options:
    """The options of a tile of the vocabulary, as the kernels take them; `bias` is the whole head's, and of the student
    an objective may have a hard term apart."""
    return Options(
        None if bias is None else address(bias[part]),
        options.factor,
        options.inner,
        objective.hard_ratio if objective is not None and objective.hard_apart else 0.0,
        options.softcap is not None,
    )
