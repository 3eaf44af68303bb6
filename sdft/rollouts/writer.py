"""What writes the answers: a back-end by its name, or an engine that is made for a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from sdft.errors import UsageError
from sdft.rollouts.engine import Engine
from sdft.rollouts.interface import Backend
from sdft.rollouts.server import ServerRollouts
from sdft.rollouts.vllm import VllmRollouts
from sdft.settings.rollouts import VLLM, BackendSettings

PROBE = 16  # tokens


def make_engine(
    settings: BackendSettings, model: PreTrainedModel, *, longest: int, dtype: torch.dtype, probe: Sequence[int]
) -> Engine:
    """The engine that the settings ask for, in this process or a server, with the model's weights.

    `probe` is a prompt, by whose beginning the two are compared.
    """
    check_weights(model)
    probe = probe[:PROBE]
    if settings.rollout_server is not None:
        return ServerRollouts(settings.rollout_server, model, longest=longest, probe=probe)
    return VllmRollouts(model, longest=longest, dtype=dtype, memory_share=settings.vllm_memory_share, probe=probe)


def check_weights(model: PreTrainedModel) -> None:
    """UsageError for a model whose weights are not numbers that an engine could be given."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise UsageError("rollout_backend is 'vllm', and the model is quantised; it must be generate or continuous")


@contextlib.contextmanager
def writer_for(
    settings: BackendSettings, model: PreTrainedModel, *, longest: int, probe: Sequence[int]
) -> Iterator[str | Backend]:
    """What writes the answers of a model whose weights stay as they are."""
    if settings.rollout_backend != VLLM:
        yield settings.rollout_backend
        return
    engine = make_engine(settings, model, longest=longest, dtype=model.dtype, probe=probe)
    with engine.serving(model) as backend:
        yield backend
