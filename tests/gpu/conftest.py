"""Tests of the compiled kernels on a CUDA GPU: `make gpu` runs them, or

    SDFT_TEST_DEVICE=cuda python -m pytest tests/gpu

With SDFT_TEST_DEVICE=cpu the same tests run through Triton's interpreter, at small shapes, where they need no GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

CHOSEN = os.environ.get("SDFT_TEST_DEVICE", "")
HERE = Path(__file__).parent


def _reason() -> str | None:
    """Why nothing here is to run, if so."""
    if CHOSEN in ("cpu", "cuda"):
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and torch sees none here"
    return "needs compiled kernels: `make gpu`, or SDFT_TEST_DEVICE=cuda pytest tests/gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A GPU that was asked for and is not there is a failure: skipped tests would prove nothing and say nothing."""
    if CHOSEN == "cuda" and HERE in item.path.parents and not torch.cuda.is_available():
        pytest.fail("SDFT_TEST_DEVICE is cuda, and torch sees no CUDA GPU here", pytrace=False)


@pytest.fixture
def device() -> str:
    """Where the case under test lies."""
    return CHOSEN or "cpu"


@pytest.fixture
def cuda() -> str:
    """The same for what only a GPU can show."""
    if CHOSEN != "cuda":
        pytest.skip("is about a GPU itself")
    return "cuda"


def give_back() -> None:
    """The memory that is no longer in use, for other processes that share the GPU: references take gigabytes."""
    if CHOSEN == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _no_memory_left_behind() -> Iterator[None]:
    yield
    give_back()
