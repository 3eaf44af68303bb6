"""Every Triton kernel compiles for GPUs that are not here, without spills and with 16-byte loads and stores; those that
multiply do in every tile that the tuner would try, on the target's tensor cores.

In a process of its own, since this one has chosen Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernel_calls import OF_ENTRIES
from sdft_kernels.backends.gpu.linear import PROCESS_TILES, SCORE_TILES

pytestmark = pytest.mark.slow

#: Shared memory that a program may have, in bytes.
TARGETS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
#: How the instructions begin that multiply on each target's tensor cores: a warp's, a warp group's with operands in
#: shared memory, tcgen05's with results in tensor memory, and a matrix core's.
MATRIX = {"sm_80": "HMMA.16816", "sm_90": "HGMMA.64x", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32_32x32x8_"}
#: Whose tiles each target has: Hopper's others are for heads with a bias.
KINDS = {"sm_80": ("cuda",), "sm_90": ("hopper", "cuda"), "sm_100": ("cuda",), "gfx942": ("hip",)}
TILES = {"score_hidden_kernel": SCORE_TILES, "process_hidden_kernel": PROCESS_TILES}


@pytest.fixture(scope="module")
def every_row(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    report = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--only", "kernels", "--quick", "--json", str(report)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())["kernels"]


@pytest.fixture(scope="module")
def rows(every_row: list[dict]) -> list[dict]:
    return [row for row in every_row if row["package"] == "sdft-kernels"]


def test_every_kernel_is_there_for_every_target(rows: list[dict]) -> None:
    kernels = {"partials_kernel", "mixture_kernel", "combine_kernel", "gradient_kernel", "score_kernel"}
    kernels |= {*TILES, *OF_ENTRIES, "combine_scores_kernel", "scale_kernel"}
    assert {(row["kernel"], row["target"]) for row in rows} == {(k, t) for k in kernels for t in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_no_stack(rows: list[dict], target: str) -> None:
    for row in rows:
        if row["target"] == target:
            assert row["spills"] == 0, row
            assert row["stack"] == 0, row


def reads_logits(row: dict) -> bool:
    others = (*TILES, *OF_ENTRIES, "scale_kernel")
    return not ("combine" in row["kernel"] or row["kernel"] in others)


def vectors_read(row: dict) -> int:
    """For each vocabulary entry, numbers of 4 bytes: two models' logits or one's, and as many biases if there are."""
    alone = row["kernel"] == "score_kernel" or row["divergence"] == "cross_entropy"
    return (1 if alone else 2) * (2 if row["bias"] else 1)


def test_rows_are_loaded_and_stored_16_bytes_at_a_time(rows: list[dict]) -> None:
    """Whatever touches a row is 16 bytes wide; the narrow accesses are a row's few constants."""
    for row in rows:
        if not reads_logits(row):
            continue
        widths = row["widths"]
        loads = vectors_read(row) * row["elements"] // 4  # of 4 numbers each, for a thread
        if row["target"] == "gfx942":
            assert widths["buffer_load_dwordx4"] >= loads, row
        else:
            assert widths["LDG.E.128"] == loads, row
        if row["kernel"] == "gradient_kernel":
            wide = "buffer_store_dwordx4" if row["target"] == "gfx942" else "STG.E.128"
            assert {name for name in widths if "STG" in name or "store" in name} == {wide}, row


def test_the_inner_loop_reaches_rows_16_bytes_at_a_time(rows: list[dict]) -> None:
    for row in rows:
        if not reads_logits(row):
            continue
        inner = row["inner"]
        assert row["narrow"] == 0, row
        assert inner["loops"] == (row["kernel"] != "gradient_kernel"), row
        wide = sum(n for name, n in inner["accesses"].items() if name in ("LDG.E.128", "buffer_load_dwordx4"))
        assert wide * 4 == vectors_read(row) * row["elements"], row
        assert inner["special"] >= row["elements"], row  # reverse KL's gradient has one exponential a logit: p


def test_a_gradient_is_scaled_16_bytes_at_a_time(rows: list[dict]) -> None:
    found = [row for row in rows if row["kernel"] == "scale_kernel"]
    assert {(row["target"], row["dtype"]) for row in found} >= {
        (t, d) for t in TARGETS for d in ("float32", "bfloat16")
    }
    for row in found:
        vectors = row["elements"] * (4 if row["dtype"] == "float32" else 2) // 16
        accesses = row["inner"]["accesses"]
        assert row["narrow"] == 0, row
        assert sum(n for name, n in accesses.items() if "LDG.E.128" in name or "load_dwordx4" in name) == vectors, row
        assert sum(n for name, n in accesses.items() if "STG.E.128" in name or "store_dwordx4" in name) == vectors, row


@pytest.mark.parametrize("kernel", TILES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_multiplied_on_the_tensor_cores(rows: list[dict], kernel: str, target: str) -> None:
    found = [row for row in rows if row["kernel"] == kernel and row["target"] == target]
    assert {tuple(row["tile"]) for row in found} == {tile for kind in KINDS[target] for tile in TILES[kernel][kind]}
    for row in found:
        assert row["matrix"] and all(kind.startswith(MATRIX[target]) for kind in row["matrix"]), row
        assert row["shared"] <= TARGETS[target], row
        # In the loop over the vocabulary: an exponential for each logit of each model, and the rows' maxima and sums.
        models = 2 if kernel == "process_hidden_kernel" else 1
        assert row["around"]["special"] >= models * row["elements"], row
        assert row["around"]["shuffles"] > 0, row
        # Operands come 16 bytes at a time, on NVIDIA past the registers, and on Hopper by an engine of their own.
        if target == "sm_90" and not row["bias"]:
            assert not any("LDGSTS" in name for name in row["widths"]), row
        elif target == "gfx942":
            assert row["widths"]["buffer_load_dwordx4"] > 0, row
        else:
            assert {name for name in row["widths"] if "LDGSTS" in name} == {"LDGSTS.E.BYPASS.128"}, row


def test_a_loop_in_a_loop() -> None:
    """By hand: what the outer one does is counted without the inner one's part."""
    from benchmarks.inner_loop import kernel_loops

    nested = """
        /*0000*/                   LDG.E R9, [R2] ;
.L_x_0:
        /*0010*/                   MUFU.EX2 R1, R2 ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/                   SHFL.BFLY PT, R3, R4 ;
        /*0050*/                   STG.E.128 [R2], R4 ;
        /*0060*/              @P1  BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""
    inner, around = kernel_loops(nested, "cuda")
    assert (inner.loops, inner.instructions, inner.special, inner.shuffles) == (True, 2, 0, 0)
    assert inner.accesses == {"LDG.E.128": 1} and inner.narrow == 0
    assert around is not None
    assert (around.instructions, around.special, around.shuffles) == (4, 1, 1)
    assert around.accesses == {"STG.E.128": 1}
    alone, nothing = kernel_loops(nested.replace("@P1  BRA `(.L_x_0)", "EXIT"), "cuda")
    assert alone == inner and nothing is None
    wait = """
.L_x_2:
        /*0021*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR67], R4 ;
        /*0022*/              @!P3 BRA `(.L_x_2) ;
        /*0030*/              @P0"""
    waiting, around = kernel_loops(nested.replace("\n        /*0030*/              @P0", wait), "cuda")
    assert (waiting.loops, waiting.instructions, waiting.accesses) == (True, 4, inner.accesses)
    assert around is not None and around.accesses == {"STG.E.128": 1}
    behind = """
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR67], R4 ;
        /*0090*/              @!P3 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_1) ;
"""
    assert kernel_loops(nested + behind, "cuda") == kernel_loops(nested, "cuda")
    whole, nothing = kernel_loops(nested.replace("BRA", "EXIT"), "cuda")
    assert (whole.loops, whole.instructions, nothing) == (False, 8, None)


def test_occupancy() -> None:
    """By hand: 128 threads of 202 registers, in warps of 208 · 32; and what shared memory and places allow."""
    from benchmarks.compiled import TARGETS as targets
    from benchmarks.compiled import occupancy

    assert occupancy(202, 16, 4, targets["sm_90"]) == 8 / 64
    assert occupancy(32, 16, 4, targets["sm_90"]) == 1
    assert occupancy(32, 100 << 10, 4, targets["sm_90"]) == 8 / 64
    assert occupancy(16, 0, 1, targets["sm_80"]) == 32 / 64
    assert occupancy(126, 16, 4, targets["gfx942"]) == 16 / 32


def test_peers_kernels_are_compiled_too(every_row: list[dict]) -> None:
    peers = {(row["package"], row["kernel"]) for row in every_row if row["package"] != "sdft-kernels"}
    assert peers == {
        ("TRL", "_stats_kernel"),
        ("TRL", "_jsd_kernel"),
        ("TRL", "_backward_kernel"),
        ("TRL, whole logits", "_forward_kernel"),
        ("TRL, whole logits", "_backward_kernel"),
        ("Liger", "_jsd_kernel"),
    }
