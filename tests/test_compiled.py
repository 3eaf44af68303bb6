"""Every Triton kernel compiles for GPUs that are not here, without spills and with 16-byte loads and stores.

In a process of its own, since this one has chosen Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    report = tmp_path_factory.mktemp("compiled") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_static", "--quick", "--json", str(report)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(report.read_text())


def test_every_kernel_is_there_for_every_target(rows: list[dict]) -> None:
    kernels = {"partials_kernel", "mixture_kernel", "combine_kernel", "gradient_kernel", "score_kernel"}
    assert {(row["kernel"], row["target"]) for row in rows} == {(k, t) for k in kernels for t in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_no_stack(rows: list[dict], target: str) -> None:
    for row in rows:
        if row["target"] == target:
            assert row["spills"] == 0, row
            assert row["stack"] == 0, row


def test_rows_are_loaded_and_stored_16_bytes_at_a_time(rows: list[dict]) -> None:
    """Whatever touches a row is 16 bytes wide; the narrow accesses are a row's few constants."""
    for row in rows:
        if row["kernel"] == "combine_kernel":
            continue
        widths = row["widths"]
        loads = {"score_kernel": 4, "mixture_kernel": 4}.get(row["kernel"], 8)  # a block of each model it reads
        if row["target"] == "gfx942":
            assert widths["buffer_load_dwordx4"] >= loads // 2, row
        else:
            assert widths["LDG.E.128"] == loads, row
        if row["kernel"] == "gradient_kernel":
            wide = "buffer_store_dwordx4" if row["target"] == "gfx942" else "STG.E.128"
            assert {name for name in widths if "STG" in name or "store" in name} == {wide}, row
