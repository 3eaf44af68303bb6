"""Tests of the vLLM back-end with vLLM itself, which has an environment of its own: `make test-vllm`.

They are skipped where vLLM is not installed, and on purpose not a part of the environment that `make test` uses.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vllm is not installed here: make test-vllm"))
