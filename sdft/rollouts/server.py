"""A vLLM server as a rollout back-end: token ids there and back over HTTP, weights through a folder that both see.

The server is vLLM's own, with a class of ours in its workers (`sdft.rollouts.vllm_worker`), which `/collective_rpc` has
load the weights. Of several processes, which have the same weights, the first one pushes. Each push has a version. A
worker that has started again has none, so that the same weights are loaded once more; and requests are salted with it,
so that the cache of prefixes has nothing of older weights for them.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.errors import TrainingError, UsageError
from sdft.processes import is_first, of_first, wait_for_all
from sdft.rollouts.engine import Engine, translated, weights_of
from sdft.rollouts.interface import Completion, Request, Sampling
from sdft.rollouts.server_calls import Away, Refused, ask, call, describe, name_of_model

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 300.0  # seconds that a server which was there may be away
PAUSE = 2.0  # seconds between two attempts
AT_ONCE = 256  # requests that are under way; the server decides itself how many of them it serves at a time
FILE = 2**30  # bytes of weights in a file, about: what is copied at a time


class ServerRollouts(Engine):
    """The vLLM server at `url`, which is given the weights of `model`, for requests of at most `longest` tokens.

    Raises UsageError where the server is not there, or not one for this model.
    """

    def __init__(self, url: str, model: PreTrainedModel, *, longest: int, probe: Sequence[int]) -> None:
        self.url = url
        about = describe(url)
        self._check_fits(about, model, longest)
        dtype, device = getattr(torch, about["dtype"]), torch.device(about["device"])
        super().__init__(longest=longest, dtype=dtype, device=device, probe=probe)
        self.name = name_of_model(url)
        self._folder = tempfile.TemporaryDirectory(prefix="sdft-weights-") if is_first() else None
        self.run, self.folder = of_first((uuid.uuid4().hex, getattr(self._folder, "name", "")))
        self.version = ""
        with self.serving(model):
            pass

    def _check_fits(self, about: dict[str, Any], model: PreTrainedModel, longest: int) -> None:
        tokens = model.config.get_text_config().vocab_size
        if about["vocabulary"] != tokens:
            raise self._unfit(
                f"serves a model of {about['vocabulary']} tokens, and {type(model).__name__} has {tokens}"
            )
        if about["longest"] < longest:
            raise self._unfit(
                f"takes {about['longest']} tokens, and the longest prompt has {longest} with its completion; "
                f"--max-model-len {longest} would do"
            )
        if about["logprobs"] != "processed_logprobs":
            raise self._unfit(f"gives {about['logprobs']}; start it with --logprobs-mode processed_logprobs")

    def _unfit(self, reason: str) -> UsageError:
        return UsageError(f"rollout_server is {self.url!r}, which {reason}")

    def load(self, model: PreTrainedModel) -> None:
        before, self.version = self._weights, f"{self.run}-{self.pushes}"
        wait_for_all()  # until the last weights have served
        if is_first():
            self._weights.mkdir()
            write_weights(self._weights, weights_of(model), self.dtype)
            self._patiently(self._have_loaded)
            if before.exists():
                shutil.rmtree(before)
        wait_for_all()

    @property
    def _weights(self) -> Path:
        """The folder of the weights that were pushed last."""
        return Path(self.folder, self.version or "none")

    def _have_loaded(self) -> None:
        """Have the server load the weights that were written last."""
        for worker in call(self.url, "load_student", str(self._weights), self.version):
            if "failed" in worker:
                raise self._unfit(f"cannot load the student's weights: {worker['failed']}")

    def answer(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Completion]:
        bodies = [self._translated(request, sampling) for request in requests]
        return self._patiently(lambda: self._answered(bodies, sampling.logprobs))

    def _answered(self, bodies: list[dict[str, Any]], with_logprobs: bool) -> list[Completion]:
        """A completion for each of these requests, all by the weights that were pushed last."""
        if not self._is_up_to_date():
            self._have_loaded()
        with ThreadPoolExecutor(min(AT_ONCE, len(bodies))) as pool:
            answers = list(pool.map(lambda body: ask(f"{self.url}/v1/completions", body), bodies))
        if not self._is_up_to_date():
            raise Away("it has started again")
        return [self._completion(answer["choices"][0], with_logprobs) for answer in answers]

    def _is_up_to_date(self) -> bool:
        """Whether each worker has the weights that were pushed last: one that has started again has none of ours."""
        versions = {worker["version"] for worker in call(self.url, "describe_student")}
        others = [version for version in versions if version and not version.startswith(self.run)]
        if others:
            raise TrainingError(
                f"rollout_server is {self.url!r}, which was given weights by another run meanwhile; it must serve one"
            )
        return versions == {self.version}

    def _completion(self, choice: dict[str, Any], with_logprobs: bool) -> Completion:
        tokens, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if tokens is None or (with_logprobs and (logprobs is None or None in logprobs)):
            missing = "token ids" if tokens is None else "log-probabilities"
            raise self._unfit(f"gives no {missing} with its completions; it must be vLLM 0.32 or later")
        return Completion(tokens, logprobs if with_logprobs else None)

    def _translated(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """The request in the server's words."""
        return {
            "model": self.name,
            "prompt": list(request.prompt),
            **translated(request, sampling),
            "repetition_penalty": 1.0,  # where the server has read others in the model's generation_config.json
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "return_token_ids": True,
            "cache_salt": self.version,
        }

    def _patiently(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, which is repeated while the server is away; TrainingError once that is too long."""
        until: float | None = None
        while True:
            try:
                return attempt()
            except Refused as error:
                raise self._unfit(f"refuses a request: {error}") from error
            except Away as error:
                if until is None:
                    until = time.monotonic() + PATIENCE
                    logger.warning(
                        "rollout_server %r is away (%s): waiting for it, up to %d seconds", self.url, error, PATIENCE
                    )
                if time.monotonic() > until:
                    raise TrainingError(
                        f"rollout_server is {self.url!r}, which has been away for {PATIENCE:g} seconds: {error}"
                    ) from error
                time.sleep(PAUSE)


def write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write weights of this type into files of about `FILE` bytes each."""
    part: dict[str, Tensor] = {}
    files = size = 0
    for name, weight in weights:
        part[name] = weight.detach().to("cpu", dtype if weight.is_floating_point() else None).contiguous()
        size += part[name].nbytes
        if size >= FILE:
            save_file(part, folder / f"{files:05}.safetensors")
            part, files, size = {}, files + 1, 0
    if part:
        save_file(part, folder / f"{files:05}.safetensors")
