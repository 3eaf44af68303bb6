"""vLLM as a rollout back-end: an engine in the trainer's process, which is given the student's weights before rollouts.

The engine is made once, with weights of no meaning, from the model's configuration: no hub is asked, and models from
GGUF files are served too. Every `serving` then gives it all of the student's weights, an adapter merged into copies of
the layers that it is in. The names of those that it has loaded are compared with the names of those that it has.

vLLM ends a completion at its end-of-sequence tokens. Stop strings are found in the text afterwards
(`sdft.rollouts.interface.cut`), so that a completion with one is written to its full length first. Nothing is told to
`watch` before a batch is done. It raises temperatures below 0.01 to that.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft import _compat
from sdft.early_checks import check_package
from sdft.errors import TrainingError, UsageError
from sdft.forward import autocasting
from sdft.memory.free import free_memory, give_back
from sdft.rollouts.engine import Engine, is_untied_by_adapter, translated, weights_of
from sdft.rollouts.interface import Backend, Completion, Request, Sampling

#: What vLLM reads from the environment: an engine in this process, whose threads stay free and which reports to nobody.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmRollouts(Engine):
    """An engine for `model`, whose requests have at most `longest` tokens with their completions.

    `dtype` is the type of its weights and products, `memory_share` the share of the GPU's memory that it may take, or
    on a CPU of the free memory for its cache of keys and values, and `probe` the prompt of the comparison.
    Raises UsageError for a model that vLLM cannot serve, TrainingError where its log-probabilities are others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        longest: int,
        dtype: torch.dtype,
        memory_share: float,
        probe: Sequence[int],
    ) -> None:
        check_package("rollout_backend is 'vllm'", "vllm")
        super().__init__(longest=longest, dtype=dtype, device=model.device, probe=probe)
        try:
            with _undisturbed(model.device):
                self.llm = _engine(model, longest, dtype, memory_share)
            with self.serving(model):
                pass
        except (TrainingError, UsageError):
            raise
        except Exception as error:  # vLLM has no error of its own for a model that it cannot serve
            raise UsageError(
                f"rollout_backend is 'vllm', which cannot serve {type(model).__name__} in {dtype} on "
                f"{model.device.type}: {' '.join(str(error).split()) or type(error).__name__} (it may be generate, and "
                f"vllm_memory_share, vLLM's gpu_memory_utilization, is {memory_share:g})"
            ) from error

    @contextlib.contextmanager
    def serving(self, model: PreTrainedModel) -> Iterator[Backend]:
        """The engine with the weights that the model has now, as a back-end; afterwards it gives GPU memory back."""
        sleeps = model.device.type == "cuda"
        if sleeps and self.pushes:
            give_back(model.device)
            self.llm.wake_up()
        with super().serving(model) as backend:
            yield backend
        if sleeps:
            self.llm.sleep(level=1)

    def load(self, model: PreTrainedModel) -> None:
        self.llm.apply_model(lambda served: load_weights(served, weights_of(model)))
        self.llm.reset_prefix_cache()

    def answer(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Completion]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        settings = [SamplingParams(**translated(request, sampling), detokenize=False) for request in requests]
        with _undisturbed(model.device), autocasting(model.device, None):
            outputs = self.llm.generate(prompts, settings, use_tqdm=False)
        return [_completion(output.outputs[0], sampling) for output in outputs]


def load_weights(served: nn.Module, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Give one of vLLM's models these weights; TrainingError where it has others beside them."""
    loaded = served.load_weights(weights)  # type: ignore[operator]  # which each of vLLM's models has
    missing = {name for name, _ in served.named_parameters()} - set(loaded)
    if missing:
        raise TrainingError(f"vLLM has loaded the student's weights, but not {', '.join(sorted(missing)[:3])}")


def _engine(model: PreTrainedModel, longest: int, dtype: torch.dtype, memory_share: float) -> Any:
    """vLLM's engine for a model of this configuration; its weights have no meaning yet."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.platforms import current_platform

    if (built_for := current_platform.device_type) != model.device.type:
        raise UsageError(
            f"rollout_backend is 'vllm', which is installed for {built_for}, and the model is on {model.device.type}; "
            "it may be generate"
        )
    options: dict[str, Any] = {"gpu_memory_utilization": memory_share, "enable_sleep_mode": True}
    if model.device.type == "cpu":
        _compat.keep_vllm_from_packing_weights()
        options = {"kv_cache_memory_bytes": int(memory_share * (free_memory(model.device) or 2**32))}
        options["enforce_eager"] = True
        # vLLM takes back random numbers of a prompt that it has read in part, which a CPU's generator cannot do.
        options["enable_chunked_prefill"] = False
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if is_untied_by_adapter(model):
        config.tie_word_embeddings = False
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=longest,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            **options,
        )


def _completion(output: Any, sampling: Sampling) -> Completion:
    tokens = list(output.token_ids)
    if not sampling.logprobs:
        return Completion(tokens)
    return Completion(tokens, [of[token].logprob for token, of in zip(tokens, output.logprobs, strict=True)])


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random numbers and torch's number of threads, afterwards, as they were: vLLM seeds the one and sets the other.

    On a CPU it draws from torch's random numbers even for requests with seeds, and takes `torch.set_num_threads` away.
    The process group that it starts stays, for its engine uses it: a group of one process, which accelerate, whose
    launch is told by the environment, does not take for a distributed run.
    """
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # which vLLM seeds too
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        setattr(torch, "set_num_threads", set_threads)  # noqa: B010  # which mypy does not let a program assign
        set_threads(threads)
