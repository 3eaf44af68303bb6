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
from sdft_kernels.backends.cpu.library import Carry, Constant, Labels, Model, Options
from sdft_kernels.backends.cpu.sums import (
    STUDENT,
    TEACHER,
    MergedSoftmax,
    add_hard_term,
    combine_labels,
    constants_of,
    new_records,
)
from sdft_kernels.backends.interface import ChunkGradients, HeadOperands
from sdft_kernels.backends.products import Dtypes
from sdft_kernels.backends.records import Field
from sdft_kernels.backends.tiles import Target, aligned, padded, padded_labels, u_of_labels
from sdft_kernels.backends.torch import TEACHER_MAY_BE_ANYTHING as TEACHER_MAY_BE_ANYTHING
from sdft_kernels.backends.torch import compare_top, padded_ids, store_rows, store_scores, store_top
from sdft_kernels.backends.torch import scale as scale
from sdft_kernels.chunking import Held
from sdft_kernels.divergences import (
    CROSS_ENTROPY,
    LARGEST_PEAK_RATIO,
    MASKED,
    LogitOptions,
    Objective,
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
    records, out = new_records(label_logits, chunk.width), None
    if rows.top is not None:
        ids = padded_ids(rows.top, chunk.width, len(student.weight)).T.contiguous()
        out = _Labels(ids, hidden.new_full(ids.shape, MASKED))
    for part, logits in chunk.tiles():
        models = (Model * len(columns))(*(some.model(part) for some in columns))
        taken = Labels() if out is None else out.of(part)
        chunk.run("fold", part, logits, models, len(models), taken, address(records))
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
        if hard_labels is not None:
            _look_up(hard_labels, logits[:, : chunk.width], part, hard_u)
    p = MergedSoftmax(records[:, STUDENT], objective.student)
    if objective.has_teacher:
        q = MergedSoftmax(records[:, TEACHER], objective.teacher)
        own = records[:, [Field.PEAK, Field.CROSS, Field.TEACHER_AT_PEAK]].unbind(1)
        loss, constants = _combine(chunk, p, q, *own)
        logprob = None
        if labels is not None:
            of_models = zip((p, q), label_logits.chunk(2), strict=True)
            logprob = torch.cat([of.logprob(labelled) for of, labelled in of_models])
        store_rows(rows, objective, loss, torch.cat((p.entropy, q.entropy)), logprob)
        labels, label_logits = hard_labels, hard_u
        target = add_hard_term(rows, p, records[:, Field.HARD_SUM], hard_u, objective, constants)
    elif out is not None:
        ids, found, of = out.labels.T, out.values.T, objective.student.factor
        compared = compare_top(rows, objective, of * found.double(), p.logsumexp, p.entropy, len(student.weight))
        label_z = None if labels is None else of * u_of_labels(labels, label_logits, ids, found).double()
        store_top(rows, objective, compared, label_z)
        constants = constants_of(p, -compared.of_rest)
        labels, label_logits, target = ids, found, -compared.of_entries.T
    else:
        logprob = p.logprob(label_logits)
        loss, constants = combine_labels(p, records[:, Field.CROSS].sum(0), logprob, objective, len(student.weight))
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


class _Labels:
    """Labels of a chunk's columns, (width, each) in rising order, and as many numbers, which kernels read or write."""

    def __init__(self, labels: Tensor, values: Tensor) -> None:
        self.labels, self.values = labels, values

    def of(self, part: slice) -> Labels:
        """For a tile of the vocabulary, until the next one is asked for."""
        self._of_tile = self.labels - part.start
        return Labels(address(self._of_tile), address(self.values), self.labels.shape[1])


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
    chunk: _Chunk, p: MergedSoftmax, q: MergedSoftmax, peaks: Tensor, own: Tensor, teacher_at_peaks: Tensor
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


def _carry_back(
    hidden: Tensor, chunk: _Chunk, constants: Tensor, target: Target | None, gradients: ChunkGradients
) -> None:
    """The gradient of the student's logits, a few vocabulary entries at a time, times hidden states and head."""
    threads, size, width = torch.get_num_threads(), hidden.shape[1], chunk.width
    columns = kernels().panel_columns()
    lacking = None if target is None else _Labels(target.labels.T.contiguous(), target.weight.float().T.contiguous())
    panels = torch.nn.functional.pad(hidden, (0, -size % columns)).view(width, -1, columns).transpose(0, 1).contiguous()
    scratch, sums = chunk.scratch(threads, kernels().carry_back_scratch(width), width * len(panels) * columns)
    for number, (part, logits) in enumerate(chunk.tiles()):
        head = rows_of(chunk.head.weight, part)
        weight = None if gradients.weight is None else gradients.weight[part]
        carry = Carry(
            address(panels),
            address(head),
            None if weight is None else address(weight),
            None if gradients.bias is None else address(gradients.bias[part]),
            None if gradients.hidden is None else address(sums),
            Labels() if lacking is None else lacking.of(part),
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
    records = new_records(hidden, chunk.width)
    columns = _Columns(hidden, head.weight)
    for part, logits in workspace.tiles(chunk.width):
        chunk.run("fold", part, logits, columns.model(part), 1, Labels(), address(records))
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
    softmax = MergedSoftmax(records[:, STUDENT], options)
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
