"""A `transformers.Trainer` whose checkpoints and models are whole or not there, in one process or several."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer

from sdft.checkpoints import files as checkpoint
from sdft.launch import installed
from sdft.models.adapters import causal_lm, has_adapter
from sdft.models.files import local_path


class WholeSaves(Trainer):
    """Writes into a folder aside and gives what is finished its name; see `sdft.checkpoints.files`."""

    newest: str | None = None  # the checkpoint that was saved, or gone on from, last
    _saving_in: str | None = None

    def use_weights(self, mode: str) -> None:
        """Have an optimizer that keeps two sets of weights (schedule-free) give the model those of `mode`.

        "train": where gradients are taken. "eval": their average, which is what the run has learned.
        """
        switch = getattr(self.optimizer, mode, None)  # the Trainer's own loop has only "train" before each micro-batch
        if callable(switch):
            switch()

    def save_beside(self, folder: str) -> None:
        """Put into a checkpoint, on every process, what the Trainer does not know of."""

    def load_beside(self, folder: str) -> None:
        """Take that back."""

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with installed("push_to_hub is True"):
            super().init_hf_repo(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = super()._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        final = os.path.join(folder, name)
        self.use_weights("eval")
        with checkpoint.failing_clearly(name, folder), self._staging(folder) as staging:
            staged = os.path.join(staging, name)
            self._saving_in = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_in = None
            self.save_beside(staged)
            if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = final  # in every process: each loads it at the end
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(staged, "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.publish_folder(staged, final)
                checkpoint.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint, staging)
        self.newest = final
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_in is None:  # not before the checkpoint has its name
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _staging(self, folder: str) -> Iterator[str]:
        with checkpoint.staging(folder, owner=self.args.should_save) as path:
            self.accelerator.wait_for_everyone()
            yield path
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_beside(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.use_weights("eval")  # as they were saved
        super()._load_best_model()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with _asking_no_hub(cast(nn.Module, self.model)):
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it, each file in one move."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        folder = output_dir or str(self.args.output_dir)
        self.use_weights("eval")
        with checkpoint.failing_clearly("the model", folder), self._staging(folder) as staged:
            if self.is_fsdp_enabled:  # in one piece, however the checkpoints are kept
                self._save(staged, state_dict=self.accelerator.get_state_dict(self.model))
            else:
                super().save_model(staged, _internal_call=True)
            if self.args.should_save:
                checkpoint.publish_files(staged, folder)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


@contextlib.contextmanager
def _asking_no_hub(model: nn.Module) -> Iterator[None]:
    """Tell peft whether an adapter's embeddings are to be saved: it would ask a hub about the model it is for."""
    if not has_adapter(model):
        yield
        return
    needed = _needs_embeddings(causal_lm(model))
    vars(model)["save_pretrained"] = functools.partial(cast(Any, model).save_pretrained, save_embedding_layers=needed)
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def _needs_embeddings(model: PreTrainedModel) -> bool:
    """Whether an adapter needs embeddings beside it, by peft's own rule: it is in them, or they were resized."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            return True
    name = model.name_or_path
    if not name or local_path(name).is_file():  # a GGUF file
        return False
    try:
        origin = type(model.config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):  # a name of ours, or the folder of an adapter
        return False
    return origin.get_text_config().vocab_size != model.config.get_text_config().vocab_size
