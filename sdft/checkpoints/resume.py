"""Going on from a checkpoint, which fits only a run with the settings that it was saved with."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import sort_checkpoints

from sdft.errors import TrainingError, UsageError
from sdft.run_files import RECORD

#: Files of a checkpoint's weights that can run code as they are loaded.
PICKLED = frozenset({"pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"})

#: What a checkpoint needs besides the weights, and how the names of its files begin.
NEEDED = {"optimizer": "optimizer", "scheduler": "scheduler", "random state": "rng_state"}

#: What loading a checkpoint raises that is of other settings, or damaged.
DOES_NOT_FIT = (ValueError, KeyError, RuntimeError, pickle.UnpicklingError)


def checkpoint_to_resume(wanted: str | bool | None, folder: str | Path, *, allow_pickle: bool = False) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names; "last", or True, is the newest of the run in `folder`."""
    if wanted is None or wanted is False:
        return None
    if wanted not in (True, "last"):
        found = str(wanted) if Path(str(wanted)).is_dir() else None
    else:
        found = last_checkpoint(folder)
    if found is None:
        raise UsageError(
            f"resume_from_checkpoint is {wanted!r}, and there is no such checkpoint (output_dir is {folder})"
        )
    _check_checkpoint(Path(found), allow_pickle=allow_pickle)
    return found


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in the folder of the run that has it; None if there is none."""
    run = run_of(folder)
    for found in reversed(sort_checkpoints(str(folder)) if Path(folder).is_dir() else []):
        if run is None or run_of(found) in (None, run):
            return str(found)
    return None


def read_record(folder: str | Path) -> dict[str, Any]:
    """What the folder's record says; nothing where there is none, or what is there is not whole."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((Path(folder) / RECORD).read_text("utf-8"))
        return record if isinstance(record, dict) else {}
    return {}


def run_of(folder: str | Path) -> str | None:
    """The run that a checkpoint or an output folder is of, where it says so."""
    return read_record(folder).get("run")


def _check_checkpoint(folder: Path, *, allow_pickle: bool) -> None:
    """Refuse a folder from which a run could not go on as it was, or only by loading pickled weights."""
    names = {path.name for path in folder.iterdir()}
    asked = f"resume_from_checkpoint is {str(folder)!r}"
    if TRAINER_STATE_NAME not in names:
        raise UsageError(f"{asked}, which has no {TRAINER_STATE_NAME}; it must be a checkpoint's folder, or last")
    for what, prefix in NEEDED.items():
        if not any(name.startswith(prefix) for name in names):
            raise UsageError(
                f"{asked}, which has no {what} in it (save_only_model); it must be a checkpoint that has, or the run "
                "would go on as another"
            )
    pickled = names & PICKLED
    if pickled and not allow_pickle and not any(fnmatch(name, "*model*.safetensors") for name in names):
        raise UsageError(f"{asked}, whose weights are pickled ({min(pickled)}); loading them takes allow_pickle: true")
    for path in sorted(folder.rglob("*")):
        reason = _damage(path)
        if reason is not None:
            name = path.relative_to(folder)
            raise UsageError(f"{asked}, whose {name} is damaged ({reason}); it must be a checkpoint that is whole")


def _damage(path: Path) -> str | None:
    """Why a file cannot be what its name says, by where its parts should be: a file that was cut is found so."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return "it has no end" if path.stat().st_size else "it is empty"
    except (ValueError, SafetensorError) as error:
        return " ".join(str(error).split())
    return None


def steps_done(checkpoint: str) -> int:
    return int(TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step)


class Resuming(TrainerCallback):
    """Within its `with` block, UsageError in one sentence if the checkpoint does not fit the run.

    What goes wrong once it is loaded is the training's own, and stays as it is. Without a checkpoint nothing is done.

    >>> with Resuming("runs/mine/checkpoint-20") as resuming:
    ...     trainer.add_callback(resuming)
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint, self._loading = checkpoint, checkpoint is not None

    def __enter__(self) -> Resuming:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_clear = isinstance(error, UsageError | TrainingError | torch.OutOfMemoryError)
        if self._loading and isinstance(error, DOES_NOT_FIT) and not is_clear:
            raise self._refusal(" ".join(str(error).strip().splitlines()[:2])) from error

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._loading:
            optimizer = kwargs["optimizer"]
            group = optimizer.param_groups[0]
            # An optimizer takes the state of another kind, and fails only when it steps. As it loads, torch itself adds
            # "differentiable" to the defaults.
            missing = set(getattr(optimizer, "defaults", ())) - {*group, "differentiable"}
            if missing:
                raise self._refusal(f"its optimizer has no {' and no '.join(sorted(missing))}")
            peak = float(group.get("initial_lr", args.learning_rate))
            # The schedule would go on from the checkpoint's, whatever the run says. Some optimizers keep it in float32.
            if not math.isclose(peak, args.learning_rate, rel_tol=1e-6):
                raise self._refusal(f"its learning_rate is {peak:g}, and the run's {args.learning_rate:g}")
        self._loading = False

    def _refusal(self, reason: str) -> UsageError:
        return UsageError(
            f"resume_from_checkpoint is {self.checkpoint!r}, which does not fit: {reason}; the settings of the model, "
            "what of it learns and the optimizer must be those that it was saved with"
        )
