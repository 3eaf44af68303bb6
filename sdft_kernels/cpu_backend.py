"""The loss of a chunk of tokens by compiled kernels on a CPU, in float32: the same names as in `torch_backend`.

Logits lie as there, (V, C) with the teacher's columns after the student's, in one array that the products write, the
kernels of cpu_kernels.c read twice, and the gradient overwrites. Between products and kernels a tile of the vocabulary
stays in the cache.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_kernels.chunk import ChunkGradients, Head
from sdft_kernels.divergences import DIVERGENCES, LogitOptions, Objective, bounded, is_mixture, log_over_mixture
from sdft_kernels.tokens import TokenRows, TokenScores
from sdft_kernels.torch_backend import Columns, aligned, multiply, padded, padded_labels, store_rows, store_scores

#: Bytes of both models' logits in a tile.
TILE_BYTES = 6 << 20

#: Floats in a cache line. Rows start at an odd number of lines, so that those of a column do not share a few sets.
LINE = 16

#: Float64s of a token's record, as in cpu_kernels.c.
FIELDS = 8


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
        stride = width if width < LINE else -(-width // LINE) * LINE
        stride += LINE if stride // LINE % 2 == 0 and stride >= LINE else 0
        self.tile = min(vocab, max(64, TILE_BYTES // (4 * stride) // 16 * 16))
        self._rows = like.new_empty((vocab if keep else self.tile, stride), dtype=torch.float32)

    def tiles(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Each tile's part of the vocabulary, and its rows, (v, width)."""
        for start in range(0, self.vocab, self.tile):
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
    label_logits = torch.zeros(2 * chunk.width)
    records = _new_records(chunk.width)
    for part, logits in workspace.tiles(2 * chunk.width):
        columns.multiply(part, logits)
        chunk.run("fold_pair", part, logits, records)
        if labels is not None:
            _look_up(labels, logits, part, label_logits)

    p, q = _Softmax(records[:, :3]), _Softmax(records[:, 3:6])
    own, teacher_at_peak = records[:, 6:].unbind(1)
    at_peak = teacher_at_peak.gather(0, records[:, 0].argmax(0, keepdim=True)).squeeze(0)
    peak_ratio = (q.peak - at_peak) + q.log_sum - p.log_sum  # log p - log q where p is largest
    constants = torch.stack((p.peak, q.peak, at_peak, *torch.zeros(3, chunk.width), peak_ratio)).float()
    centre = torch.zeros_like(peak_ratio)
    if objective.divergence == "reverse_kl":
        centre = p.mean_of(own, p.shift - (teacher_at_peak - at_peak))
        loss = centre + peak_ratio
    elif objective.divergence == "forward_kl":
        loss = q.mean_of(own, q.shift - p.shift) - q.log_sum + p.log_sum
    else:
        sums = torch.zeros(torch.get_num_threads(), 2, chunk.width, dtype=torch.float64)
        for part, logits in workspace.tiles(2 * chunk.width):
            chunk.run("fold_mixture", part, logits, constants, sums)
        scores, losses = sums.sum(0)
        centre = scores / p.total
        loss = losses / (p.total if objective.divergence == "skew_reverse_kl" else q.total)
        if objective.divergence == "jsd":
            share = objective.beta
            at_peak_score = (1 - share) * log_over_mixture(-bounded(peak_ratio), share)
            loss = centre + at_peak_score + share * loss

    entropy = torch.cat((p.entropy, q.entropy))
    logprob = None
    if labels is not None:
        factors = torch.tensor([_factor(objective.student), _factor(objective.teacher)])
        label_logits *= factors.repeat_interleave(chunk.width)
        logprob = label_logits.double() - torch.cat((p.logsumexp, q.logsumexp))
    store_rows(rows, objective, loss, entropy, logprob)
    if gradients.any:
        factor = torch.nn.functional.pad(rows.weight.double(), (0, chunk.width - len(rows.weight)))
        factor *= objective.student.scale / objective.student.temperature
        constants[3:6] = torch.stack((factor / p.total, factor / q.total, centre))
        _carry_back(columns.student, chunk, constants, gradients)


def _carry_back(hidden: Tensor, chunk: _Chunk, constants: Tensor, gradients: ChunkGradients) -> None:
    """The logits' gradient a tile at a time, over the student's logits, and its products with head and hidden states."""
    before = 0 if gradients.first else 1
    total = torch.zeros_like(hidden)
    for part, logits in chunk.workspace.tiles(2 * chunk.width):
        chunk.run("gradient", part, logits, constants)
        gradient = logits[:, : chunk.width]
        if gradients.hidden is not None:
            total.addmm_(gradient.T, chunk.student.weight[part].to(hidden.dtype))
        if gradients.weight is not None:
            gradients.weight[part].addmm_(gradient, hidden, beta=before)
        if gradients.bias is not None:
            gradients.bias[part] += gradient.sum(1)
    if gradients.hidden is not None:
        gradients.hidden.copy_(total[: len(gradients.hidden)])


class _Chunk:
    """What the kernels need to know of a chunk of tokens beside its logits."""

    def __init__(self, tokens: int, student: Head, teacher: Head, objective: Objective, workspace: Workspace) -> None:
        self.width, self.workspace = aligned(tokens), workspace
        self.student, self._teacher, self._objective = student, teacher, objective

    def run(self, kernel: str, part: slice, logits: Tensor, *arrays: Tensor) -> None:
        """A kernel of two models on a tile's logits, with `arrays` as it takes them."""
        objective = self._objective
        call(
            kernel,
            *(logits.data_ptr(), len(logits), logits.stride(0), self.width),
            _options(objective.student, self.student.bias, part),
            _options(objective.teacher, self._teacher.bias, part),
            DIVERGENCES.index(objective.divergence),
            objective.beta,
            *(array.data_ptr() for array in arrays),
        )


def call(kernel: str, *arguments: object) -> None:
    """One of the compiled kernels, on as many threads as torch takes."""
    kernels = library()
    assert kernels is not None, "the compiled kernels were not built"
    getattr(kernels, kernel)(*arguments, torch.get_num_threads())


def _new_records(width: int) -> Tensor:
    """Before any logits: (threads, FIELDS, width) in float64."""
    records = torch.zeros(torch.get_num_threads(), FIELDS, width, dtype=torch.float64)
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
    label_logits = torch.zeros(width)
    records = _new_records(width)
    for part, logits in workspace.tiles(width):
        multiply(head.weight, hidden, part, logits)
        of_head = _options(options, head.bias, part)
        call("fold", logits.data_ptr(), len(logits), logits.stride(0), width, of_head, records.data_ptr())
        if labels is not None:
            _look_up(labels, logits, part, label_logits)
    softmax = _Softmax(records[:, :3])
    label_logits *= torch.tensor(_factor(options))
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
