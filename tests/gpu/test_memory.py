"""Long samples on a GPU: what is kept on the host comes back, tiles change nothing, and both take less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdft.memory.offload import OnHost, keeping
from sdft.memory.tiles import tile
from tests import tiny


@pytest.fixture(autouse=True)
def _on_a_gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("on a CPU all is on the host")


def step(device: str, *, on_host: bool, tokens: int | None) -> tuple[dict[str, Tensor], int]:
    """A checkpointed model's gradients, and the bytes that are allocated when its backward pass begins."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 8192}
    # In float64: a product of a tile is summed up in another order than the whole one's.
    model = tiny.tiny_model(**sizes).to(device, torch.float64).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tile(model, tokens)
    ids = torch.randint(2, 101, (1, 8192), generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.cuda.memory_allocated(device)
    with keeping(torch.device(device), on_host):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    # Not the mean of squares, of which the last norm leaves nothing but rounding to train.
    torch.manual_seed(1)
    (hidden * torch.randn_like(hidden)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("tokens", [None, 1000])
def test_what_is_kept_on_the_host_comes_back(device: str, tokens: int | None) -> None:
    expected, kept = step(device, on_host=False, tokens=None)
    found, kept_with = step(device, on_host=True, tokens=tokens)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name
    assert kept_with < 0.7 * kept


def test_copies_have_a_stream_of_their_own(device: str) -> None:
    on_host = OnHost(torch.device(device), least_bytes=1)
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    with on_host:
        loss = (weight @ weight).tanh().sum()
    loss.backward()
    expected = torch.autograd.grad((weight @ weight).tanh().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)
