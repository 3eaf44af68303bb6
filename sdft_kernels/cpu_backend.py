"""The loss of a chunk of tokens by compiled kernels on a CPU, in float32: the same names as in `torch_backend`.

Logits lie as there, (V, C) with the teacher's columns after the student's, in one array that the products write, the
kernels of cpu_kernels.c read twice, and the gradient overwrites. Between products and kernels a tile of the vocabulary
stays in the cache.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from sdft_kernels import pages
from sdft_kernels.chunk import ChunkGradients, Head
from sdft_kernels.divergences import DIVERGENCES, LogitOptions, Objective, bounded, is_mixture, log_over_mixture
from sdft_kernels.tokens import TokenRows, TokenScores
from sdft_kernels.torch_backend import Columns, aligned, multiply, padded, padded_labels, store_rows, store_scores

#: Bytes of both models' logits in a tile: more make faster products, until tile and head leave the cache. On two cores
#: SmolLM2's head took 1.20 × the bare products with 3 MiB, 1.14 × with 6, 1.14 × with 12, 1.13 × with 24.
TILE_BYTES = 12 << 20

#: Floats in a cache line, and in what makes rows share a few sets of the cache where it divides their length.
LINE, SETS = 16, 128

#: As in cpu_kernels.c: float64s of a token's record, and places among its constants.
FIELDS = 8
P_FACTOR, Q_FACTOR, CENTRE = 3, 4, 5


class _Options(ctypes.Structure):
    """How logits come from products, as the kernels read it: `struct options`."""

    _fields_ = (
        ("bias", ctypes.c_void_p),
        ("factor", ctypes.c_float),
        ("inner", ctypes.c_float),
        ("capped", ctypes.c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or have no OpenMP to run on."""
    spec = importlib.util.find_spec("sdft_kernels._cpu_kernels")
    if spec is None or spec.origin is None:
        return None
    try:
        kernels = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    logits, options = (pointer, size, size, size), ctypes.POINTER(_Options)
    pair = (*logits, options, options, number, ctypes.c_float)
    kernels.fold.argtypes = (*logits, options, pointer, number)
    kernels.fold_pair.argtypes = kernels.gradient.argtypes = (*pair, pointer, number)
    kernels.fold_mixture.argtypes = (*pair, pointer, pointer, number)
    for kernel in (kernels.fold, kernels.fold_pair, kernels.fold_mixture, kernels.gradient):
        kernel.restype = None
    return kernels


class Workspace:
    """Rows of logits for each vocabulary entry, `width` of them; without `keep`, for the entries of one tile only."""

    def __init__(self, like: Tensor, width: int, vocab: int, *, keep: bool) -> None:
        self.vocab, self.keep = vocab, keep
        stride = width + (LINE if width % SETS == 0 else 0)
        self.tile = min(vocab, max(64, TILE_BYTES // (4 * stride) // 16 * 16))
        rows = vocab if keep else self.tile
        memory = pages.take(like, rows * stride, torch.float32)
        self._rows = memory[: rows * stride].view(rows, stride)
        self._backwards = True
        weakref.finalize(self, pages.give_back, memory).atexit = False

    def tiles(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Each tile's part of the vocabulary, and its rows, (v, width).

        A pass goes the other way than the one before it, and starts with what the cache still holds.
        """
        starts = range(0, self.vocab, self.tile)
        self._backwards = not self._backwards
        for start in reversed(starts) if self._backwards else starts:
            part = slice(start, min(start + self.tile, self.vocab))
            first = start if self.keep else 0
            yield part, self._rows[first : first + part.stop - part.start, :width]


def bytes_per_logit(dtype: torch.dtype, device: torch.device, objective: Objective, *, with_gradient: bool) -> int:
    """Of the loss's workspace: both models' logits, of which the gradient is made."""
    return 8


def loss_workspace(
    like: Tensor, tokens: int, vocab: int, dtype: torch.dtype, objective: Objective, *, with_gradient: bool
) -> Workspace:
    """For chunks of up to `tokens` tokens, both models side by side."""
    return Workspace(like, 2 * aligned(tokens), vocab, keep=with_gradient or is_mixture(objective.divergence))


def process_chunk(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Head,
    teacher: Head,
    rows: TokenRows,
    objective: Objective,
    gradients: ChunkGradients,
    workspace: Workspace,
) -> None:
    """Fills `rows` and `gradients` for C tokens' hidden states, (C, Hs) and (C, Ht)."""
    chunk = _Chunk(len(rows.loss), student, teacher, objective, workspace)
    columns = Columns(student_hidden, teacher_hidden, student, teacher, torch.float32)
    labels = padded_labels(rows.labels, chunk.width, models=2)
    label_logits = columns.student.new_zeros(2 * chunk.width)
    records = _new_records(label_logits, chunk.width)
    for part, logits in chunk.tiles():
        columns.multiply(part, logits)
        chunk.run("fold_pair", part, logits, records)
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
    p, q = _Softmax(records[:, :3]), _Softmax(records[:, 3:6])
    loss, constants = _combine(chunk, p, q, *records[:, [0, 6, 7]].unbind(1))
    logprob = None
    if labels is not None:
        label_logits[: chunk.width] *= _factor(objective.student)
        label_logits[chunk.width :] *= _factor(objective.teacher)
        logprob = label_logits.double() - torch.cat((p.logsumexp, q.logsumexp))
    store_rows(rows, objective, loss, torch.cat((p.entropy, q.entropy)), logprob)
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, chunk.width - len(rows.weight)))
        factor *= objective.student.scale / objective.student.temperature
        constants[P_FACTOR], constants[Q_FACTOR] = factor / p.total, factor / q.total
        _carry_back(columns.student, chunk, constants, gradients)


def _combine(
    chunk: _Chunk, p: _Softmax, q: _Softmax, peaks: Tensor, own: Tensor, teacher_at_peaks: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens' divergence, (width,), and what their gradient needs but for factors, (CONSTANTS, width).

    From the models' softmax, and each thread's largest student's logit, the divergence's own sum, and the teacher's
    logit where the student's is largest, (threads, width).
    """
    objective = chunk.objective
    at_peak = teacher_at_peaks.gather(0, peaks.argmax(0, keepdim=True)).squeeze(0)
    peak_ratio = (q.peak - at_peak) + q.log_sum - p.log_sum  # log p - log q where p is largest
    zero = torch.zeros_like(peak_ratio)
    constants = torch.stack((p.peak, q.peak, at_peak, zero, zero, zero, peak_ratio)).float()
    if objective.divergence == "reverse_kl":
        centre = p.mean_of(own, p.shift - (teacher_at_peaks - at_peak))
        constants[CENTRE] = centre
        return centre + peak_ratio, constants
    if objective.divergence == "forward_kl":
        return q.mean_of(own, q.shift - p.shift) - q.log_sum + p.log_sum, constants
    sums = peak_ratio.new_zeros(torch.get_num_threads(), 2, chunk.width)
    for part, logits in chunk.tiles():
        chunk.run("fold_mixture", part, logits, constants, sums)
    scores, losses = sums.sum(0)
    centre = scores / p.total
    constants[CENTRE] = centre
    loss = losses / (p.total if objective.divergence == "skew_reverse_kl" else q.total)
    if objective.divergence == "jsd":
        at_peak_score = (1 - objective.beta) * log_over_mixture(bounded(-peak_ratio), objective.beta)
        loss = centre + at_peak_score + objective.beta * loss
    return loss, constants


def _carry_back(hidden: Tensor, chunk: _Chunk, constants: Tensor, gradients: ChunkGradients) -> None:
    """The logits' gradient a tile at a time, over the student's logits, and its products with states and head."""
    before = 0 if gradients.first else 1
    total = torch.zeros_like(hidden)
    for part, logits in chunk.tiles():
        chunk.run("gradient", part, logits, constants)
        gradient = logits[:, : chunk.width]
        if gradients.hidden is not None:
            total.addmm_(gradient.T, chunk.head.weight[part].to(hidden.dtype))
        if gradients.weight is not None:
            gradients.weight[part].addmm_(gradient, hidden, beta=before)
        if gradients.bias is not None:
            gradients.bias[part] += gradient.sum(1)
    if gradients.hidden is not None:
        gradients.hidden.copy_(total[: len(gradients.hidden)])


class _Chunk:
    """A chunk's logits, and what the kernels need to know of it beside them."""

    def __init__(self, tokens: int, head: Head, teacher: Head, objective: Objective, workspace: Workspace) -> None:
        self.width, self.head, self.objective = aligned(tokens), head, objective
        self._teacher, self._workspace = teacher, workspace

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Each tile's part of the vocabulary, and both models' logits, (v, 2 width)."""
        return self._workspace.tiles(2 * self.width)

    def run(self, kernel: str, part: slice, logits: Tensor, *arrays: Tensor) -> None:
        """A kernel of two models on a tile's logits, with `arrays` as it takes them."""
        call(
            kernel,
            *(logits.data_ptr(), len(logits), logits.stride(0), self.width),
            _options(self.objective.student, self.head.bias, part),
            _options(self.objective.teacher, self._teacher.bias, part),
            DIVERGENCES.index(self.objective.divergence),
            self.objective.beta,
            *(array.data_ptr() for array in arrays),
        )


def call(kernel: str, *arguments: object) -> None:
    """One of the compiled kernels, on as many threads as torch takes."""
    kernels = library()
    assert kernels is not None, "the compiled kernels were not built"
    getattr(kernels, kernel)(*arguments, torch.get_num_threads())


def _new_records(like: Tensor, width: int) -> Tensor:
    """Before any logits: (threads, FIELDS, width) in float64."""
    records = like.new_zeros((torch.get_num_threads(), FIELDS, width), dtype=torch.float64)
    records[:, [0, 3]] = -torch.inf
    return records


class _Softmax:
    """One model's softmax from the peak, sum and dot of each thread's records, (threads, 3, width)."""

    def __init__(self, records: Tensor) -> None:
        peaks, self._sums, dots = records.unbind(1)
        self.peak = peaks.amax(0)
        #: How far a thread's peak lies above the chunk's; of one that had no rows 0, as all that it has is.
        self.shift = torch.where(peaks == -torch.inf, 0, peaks - self.peak)
        self.total = (self.shift.exp() * self._sums).sum(0)
        self.log_sum = self.total.log()
        self.logsumexp = self.peak + self.log_sum
        self.entropy = self.log_sum - self.mean_of(dots, self.shift)

    def mean_of(self, moments: Tensor, offset: Tensor) -> Tensor:
        """The mean of a score under this softmax, from each thread's Σ e g and what its g grows by."""
        return (self.shift.exp() * (moments + offset * self._sums)).sum(0) / self.total


def scoring_bytes_per_logit(dtype: torch.dtype) -> int:
    """Of scoring's workspace."""
    return 4


def scoring_workspace(like: Tensor, tokens: int, vocab: int, dtype: torch.dtype) -> Workspace:
    """For chunks of up to `tokens` tokens."""
    return Workspace(like, aligned(tokens), vocab, keep=False)


def score_chunk(hidden: Tensor, head: Head, scores: TokenScores, options: LogitOptions, workspace: Workspace) -> None:
    """Fills `scores` for C tokens' hidden states, (C, H)."""
    width = aligned(len(hidden))
    hidden = padded(hidden, width, torch.float32)
    labels = padded_labels(scores.labels, width, models=1)
    label_logits = hidden.new_zeros(width)
    records = _new_records(hidden, width)
    for part, logits in workspace.tiles(width):
        multiply(head.weight, hidden, part, logits)
        of_head = _options(options, head.bias, part)
        call("fold", logits.data_ptr(), len(logits), logits.stride(0), width, of_head, records.data_ptr())
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
    softmax = _Softmax(records[:, :3])
    label_logits *= _factor(options)
    logprob, top1 = None, None
    if labels is not None:
        logprob, top1 = label_logits.double() - softmax.logsumexp, label_logits >= softmax.peak
    store_scores(scores, softmax.entropy, softmax.logsumexp, logprob, top1)


def _look_up(labels: Tensor, logits: Tensor, part: slice, found: Tensor) -> None:
    """What the kernels have left of the labels' products, (columns,), where the labels lie in this tile."""
    here = (labels >= part.start) & (labels < part.stop)
    rows = (labels - part.start).clamp(0, len(logits) - 1)
    found.copy_(torch.where(here, logits.gather(0, rows.unsqueeze(0)).squeeze(0), found))


def _factor(options: LogitOptions) -> float:
    """What makes z of products, or of their tanh under a soft cap."""
    return (options.softcap or options.scale) / options.temperature


def _options(options: LogitOptions, bias: Tensor | None, part: slice) -> _Options:
    """For a tile of the vocabulary; `bias` is the whole head's."""
    return _Options(
        None if bias is None else bias[part].data_ptr(),
        _factor(options),
        options.scale / (options.softcap or 1.0),
        options.softcap is not None,
    )
