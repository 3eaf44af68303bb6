"""What runs in the worker of a vLLM server that writes rollouts: it takes the student's weights from a folder.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs \\
        --worker-extension-cls sdft.rollouts.vllm_worker.StudentWeights

vLLM makes the class a base of its worker's, and `/collective_rpc` calls its methods. On a CPU vLLM packs copies of the
weights, which new ones would not reach; it is kept from that when this is imported, which is before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.platforms import current_platform

from sdft import _compat
from sdft.rollouts.vllm import load_weights

if current_platform.device_type == "cpu":
    _compat.keep_vllm_from_packing_weights()


class StudentWeights:
    """Has the worker say what it serves, and load weights that a trainer has written."""

    model_config: Any
    get_model: Any
    student_version: str | None = None  # of the weights; a worker that has started again has none

    def describe_student(self) -> dict[str, Any]:
        """What a trainer has to know of the model that is served, and of the weights that it has."""
        config = self.model_config
        return {
            "vocabulary": config.get_vocab_size(),
            "longest": config.max_model_len,
            "dtype": str(config.dtype).removeprefix("torch."),
            "device": current_platform.device_type,
            "logprobs": config.logprobs_mode,
            "version": self.student_version,
        }

    def load_student(self, folder: str, version: str) -> dict[str, str]:
        """Load the weights in a folder; what went wrong is returned, for an error would come without its words."""
        try:
            load_weights(self.get_model(), weights_in(folder))
        except Exception as error:  # vLLM has no error of its own for weights that it cannot load
            return {"failed": " ".join(str(error).split()) or type(error).__name__}
        self.student_version = version
        return {}


def weights_in(folder: str) -> Iterator[tuple[str, Tensor]]:
    """The weights in a folder's files, one at a time."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no weights in {folder}, which the trainer writes and the server must see")
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no dictionary
                yield name, weights.get_tensor(name)
