"""The ledger's arithmetic, on operations that can be counted by hand and against the kernels themselves; and the bars
of our own ledger and of the roofline drawn from it."""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import knobs

from benchmarks import ledger, roofline
from benchmarks.ledger import COMPARED, OURS, TRAFFIC, count
from benchmarks.methods import Shape
from benchmarks.recorder import Op, Record, Touch, Traffic, record
from sdft_kernels import fused_linear_divergence
from sdft_kernels.backends.gpu.backend import empty_logits
from sdft_kernels.backends.gpu.divergence import process_rows, split_rows
from sdft_kernels.chunking import BLOCK_TOKENS, ENOUGH_TOKENS
from sdft_kernels.divergences import DIVERGENCES, Objective
from sdft_kernels.tokens import TokenRows

HEADS = (True, False)


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def recorded(call: Callable[[], object]) -> Record:
    return record(call, {}, {})


def traffic(op: Op) -> tuple[int, int]:
    return sum(touch.nbytes for touch in op.reads), sum(touch.nbytes for touch in op.writes)


def test_a_product() -> None:
    a, b, out = meta(3, 5), meta(7, 5), meta(3, 7)
    (op,) = recorded(lambda: torch.mm(a, b.T, out=out)).ops
    assert op.flops == 2 * 3 * 5 * 7
    assert traffic(op) == (4 * (15 + 35), 4 * 21)


@pytest.mark.parametrize(("beta", "read"), [(0, 0), (1, 4 * 21)])
def test_an_accumulating_product_reads_what_it_adds_to(beta: int, read: int) -> None:
    a, b, total = meta(3, 5, dtype=torch.bfloat16), meta(5, 7, dtype=torch.bfloat16), meta(3, 7)
    (op,) = recorded(lambda: torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)).ops
    assert op.flops == 2 * 3 * 5 * 7
    assert traffic(op) == (2 * (15 + 35) + read, 4 * 21)
    if beta:
        (same,) = recorded(lambda: total.addmm_(a.float(), b.float())).ops[2:]
        assert same.flops == op.flops and traffic(same) == (4 * (15 + 35 + 21), 4 * 21)


def test_views_are_free_and_in_place_operations_read_and_write() -> None:
    x = meta(4, 6)

    def call() -> None:
        x[:2].T.mul_(2)  # reads and writes half
        x.zero_()  # writes
        x.new_ones(3)  # writes 3
        x[:0].zero_()  # nothing
        x.copy_(meta(1, 6).expand(4, 6))  # reads a row once

    assert [traffic(op) for op in recorded(call).ops] == [(48, 48), (0, 96), (0, 12), (24, 96)]


def test_the_hosts_waits_and_the_path_taken() -> None:
    x = meta(4)

    def call() -> None:
        assert x.device.type == "cuda" and x.is_cuda
        if torch.zeros((), device=x.device).item() == 0:
            x.add_(1)

    assert [(op.name, op.waits) for op in recorded(call).ops] == [
        ("aten.zeros", False),
        ("aten._local_scalar_dense", True),
        ("aten.add_", False),
    ]


def test_the_most_memory_held_and_backward_passes() -> None:
    x = meta(1000).requires_grad_()

    def call() -> None:
        temporary = x.detach() * 2  # 4000 bytes
        del temporary
        (x * 3 * 4).sum().backward()  # two products of 4000 bytes at once; backward gives two again

    noted = recorded(call)
    assert 8000 <= noted.peak <= 8000 + 4 * 8
    assert Counter(op.name for op in noted.ops)["aten.mul"] == 5


def test_an_unknown_kernel_is_refused() -> None:
    student = empty_logits(meta(1), 2, 64, torch.float32)
    values = meta(5, 2).unbind()
    rows = TokenRows(values[0], None, None, *values[1:4], None, None)
    with pytest.raises(KeyError, match="partials_kernel reads and writes is not stated"):
        recorded(lambda: process_rows(student, student, rows, Objective(), student))


def test_fusing_keeps_what_is_read_and_wanted_outside() -> None:
    def touch(storage: int, nbytes: int = 10) -> Touch:
        return Touch(storage, (nbytes,), nbytes)

    product = Op("mm", (touch(0),), (touch(1),), flops=1)
    chain = (Op("exp", (touch(1),), (touch(2),)), Op("mul", (touch(2), touch(1)), (touch(3),)))
    last = Op("mm", (touch(3),), (touch(4),), flops=1)
    fused = ledger.fused(Record([product, *chain, last])).ops
    assert fused == [product, Op("fused", (touch(1),), (touch(3),)), last]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_kernels_reach_what_the_ledger_says(divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every access that Triton's interpreter makes inside the logits and their gradient, against TRAFFIC."""
    from triton.runtime import interpreter

    tokens, vocab = 2, 4096 + 16
    student, teacher = (empty_logits(torch.empty(0), tokens, vocab, torch.float32).normal_() for _ in range(2))
    gradient = empty_logits(torch.empty(0), tokens, vocab, torch.bfloat16)
    buffers = {"student": student, "teacher": teacher, "gradient": gradient}
    reached: Counter[tuple[str, str]] = Counter()
    builder = interpreter.InterpreterBuilder

    def watch(name: str, kind: str) -> None:
        original = getattr(builder, name)

        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            mask = rest[0 if kind == "read" else 1].data if "masked" in name else np.ones_like(pointers.data, bool)
            places = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
            for buffer, tensor in buffers.items():
                first = tensor.data_ptr()
                inside = (places >= first) & (places < first + tensor.untyped_storage().nbytes())
                reached[buffer, kind] += int(inside.sum()) * tensor.element_size()
            return original(self, pointers, *rest)

        monkeypatch.setattr(builder, name, access)

    for name, kind in (("create_masked_load", "read"), ("create_masked_store", "write")):
        watch(name, kind)
    rows = TokenRows(torch.ones(tokens), None, None, *torch.empty(3, tokens).unbind(), None, None)

    def call() -> None:
        process_rows(student, teacher, rows, Objective(divergence), gradient)

    call()
    stated: Counter[tuple[str, str]] = Counter()
    for op in record(call, TRAFFIC, {}).ops:
        traffic = TRAFFIC[op.name]
        for kind, pointers in (("read", traffic.reads), ("write", traffic.writes)):
            for buffer, tensor in buffers.items():
                if f"{buffer}_pointer" in pointers:
                    stated[buffer, kind] += tensor.numel() * tensor.element_size()
    if divergence in ("reverse_kl", "forward_kl"):
        assert stated["student", "read"] == 2 * 4 * tokens * vocab
    assert {key: n for key, n in reached.items() if n} == dict(stated)


@pytest.mark.parametrize("trainable_head", HEADS)
@pytest.mark.parametrize("name", roofline.MODELS)
def test_our_ledger_keeps_to_the_bars(name: str, trainable_head: bool) -> None:
    entry = ledger.entry(OURS, roofline.MODELS[name].at(4096), trainable_head=trainable_head)
    assert entry.units == (4 if trainable_head else 3)
    assert entry.bytes_per_logit == (30 if trainable_head else 28)
    assert entry.launches_per_chunk <= 8
    assert entry.waits == 0
    assert ledger.broken_bars([entry]) == []
    assert len(ledger.broken_bars([replace(entry, bytes_per_logit=30.1, waits=1)])) == 2


def test_one_chunk_needs_no_float32_gradient_of_the_head() -> None:
    """Above the logits of a block, 8 bytes each, their gradient, 2, and what is returned, only vectors over tokens."""
    shape = roofline.MODELS["Llama-3.1-8B"].at(4096)
    entry = ledger.entry(OURS, shape, trainable_head=True)
    held = (8 * BLOCK_TOKENS + 2 * shape.tokens) * shape.vocab
    assert held < entry.workspace < 1.01 * held
    several_chunks = ledger.entry(OURS, replace(shape, tokens=32_768), trainable_head=True)
    assert several_chunks.workspace > 4 * shape.hidden * shape.vocab


@pytest.mark.parametrize("trainable_head", HEADS)
def test_weights_labels_and_biases_keep_to_the_bars(trainable_head: bool) -> None:
    shape = roofline.MODELS["Llama-3.1-8B"].at(4096)
    plain, entry = (
        ledger.entry(method, shape, trainable_head=trainable_head) for method in (OURS, ledger.EVERY_OPTION)
    )
    assert ledger.broken_bars([entry]) == []
    assert entry.bytes_per_logit == plain.bytes_per_logit
    # The student's hidden states of tokens with weight 0 are taken out, a chunk at a time.
    whole, plain_whole = (
        ledger.count(method, shape, trainable_head=trainable_head) for method in (ledger.EVERY_OPTION, OURS)
    )
    chunks = shape.tokens // ENOUGH_TOKENS[True]["trainable" if trainable_head else "frozen"]
    taken_out = [op for op in whole.ops if op.name == "aten.where" and len(op.writes[0].shape) == 2]
    assert len(taken_out) == chunks and whole.launches > plain_whole.launches
    assert len(ledger.broken_bars([replace(entry, bytes_per_logit=30.1, launches_per_chunk=9)])) == 2


@pytest.mark.parametrize("trainable_head", HEADS)
def test_a_mixture_reads_its_logits_once_more(trainable_head: bool) -> None:
    shape = roofline.MODELS["Llama-3.1-8B"].at(4096)
    plain, entry = (ledger.entry(method, shape, trainable_head=trainable_head) for method in (OURS, ledger.MIXTURE))
    assert entry.units == plain.units
    assert entry.bytes_per_logit == plain.bytes_per_logit + 8
    assert entry.launches_per_chunk == plain.launches_per_chunk + 1 <= 8


def test_a_bias_that_trains_takes_a_launch_that_reads_the_gradient() -> None:
    """A product with a column of ones."""
    shape = roofline.MODELS["Llama-3.1-8B"].at(4096)
    inputs = ledger.meta_inputs(shape, trainable_head=True)
    bias = inputs.student_hidden.new_empty(shape.vocab).requires_grad_()

    def call() -> None:
        hidden, weight = inputs.student_hidden, inputs.student_weight
        fused_linear_divergence(
            hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, student_bias=bias
        ).loss.backward()

    noted = record(call, TRAFFIC, ledger.IMPLEMENTATIONS)
    of_bias = [op for op in noted.ops if op.flops and op.writes[0].shape == (shape.vocab, 1)]
    assert len(of_bias) == shape.tokens // ENOUGH_TOKENS[True]["trainable"]
    read = sum(touch.nbytes for op in of_bias for touch in op.reads if 1 not in touch.shape)
    assert read == 2 * shape.tokens * shape.vocab


def test_without_a_gradient_no_logit_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products and, beside their operands, a few sums for each token and split of the vocabulary."""
    monkeypatch.setattr(knobs.runtime, "interpret", False)  # which widens the operands
    shape = roofline.MODELS["Llama-3.1-8B"].at(4096)
    entry = ledger.entry(ledger.NO_GRADIENT, shape, trainable_head=False)
    assert entry.units == 2
    assert entry.bytes_per_logit < 0.1
    assert entry.launches_per_chunk == 2
    assert entry.waits == 0
    assert entry.workspace < shape.tokens * shape.vocab / 100


def test_a_chunk_of_64_tokens_fills_132_multiprocessors() -> None:
    assert all(64 * split_rows(64, model.vocab) >= 132 for model in roofline.MODELS.values())


@pytest.mark.parametrize(("method", "trainable", "frozen"), [("TRL", 6, 5), ("Liger eager", 4, 4)])
def test_the_peers_products(method: str, trainable: int, frozen: int) -> None:
    shape = Shape("small", 8192, 128, 32_000)
    assert count(method, shape, trainable_head=True).units == trainable
    assert count(method, shape, trainable_head=False).units == frozen


@pytest.mark.parametrize("method", COMPARED[1:])
def test_the_peers_chunks_are_as_stated(method: str) -> None:
    chunk = ledger.PEER_CHUNK[method]
    rows = [
        op.writes[0].shape[0]
        for op in count(method, Shape("", 3 * chunk, 128, 32_000), trainable_head=False).ops
        if op.flops and op.writes[0].shape[1] == 32_000
    ]
    assert set(rows) == {chunk}


@pytest.mark.parametrize("name", roofline.MODELS)
def test_predicted_time_beside_trl(name: str) -> None:
    """Its longest and shortest runs, and one between: the ratio falls from one to the other."""
    for tokens in (1024, 4096, 32_768):
        for trainable_head in HEADS:
            predictions = roofline.predict(roofline.MODELS[name], tokens, trainable_head=trainable_head)
            assert roofline.broken_bars(predictions) == []
            ours = [p for p in predictions if p.method == OURS]
            assert max(p.waiting_for_memory for p in ours) < 1e-6, ours


def test_a_launch_takes_its_operations_or_its_bytes() -> None:
    gpu = roofline.Gpu("round", 1e12, 1e9)
    product = Op("mm", (Touch(0, (), 10**9),), (), flops=int(2 * 0.7e12))  # 2 s of operations, 1 s of bytes
    plain = Op("exp", (Touch(0, (), 10**9),), (Touch(1, (), 10**9),))  # 2 s of bytes
    entry = ledger.Ledger("", Shape("", 1, 1, 1), True, (product, plain), 0)
    assert roofline.seconds(entry, gpu) == pytest.approx(4)
    assert roofline.share_waiting_for_memory(entry, gpu) == 0
    assert roofline.seconds(replace(entry, ops=(Op("x", (), (Touch(0, (), 1),)),) * 1000), gpu) == pytest.approx(3e-3)


def test_traffic_names_pointers_that_kernels_have() -> None:
    for name, traffic in TRAFFIC.items():
        module, _, kernel = name.partition(".")
        if module in ("divergence", "linear", "statistics"):
            assert isinstance(traffic, Traffic)
            ours = importlib.import_module(f"sdft_kernels.backends.gpu.{module}")
            assert {*traffic.reads, *traffic.writes} <= set(getattr(ours, kernel).arg_names)
            assert {pointer for pair in traffic.products for pointer in pair} <= set(traffic.reads)
