"""A training step on a GPU: the loss of a batch against float64 full logits, and the trainer's own steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sdft.batch import lay_out
from sdft.loss import completion_logprobs, distillation_loss
from sdft.settings.config import SDFTConfig
from sdft.teacher import Teacher
from sdft.trainer import SDFTTrainer
from tests import tiny
from tests.test_sdft_loss import SAMPLES, full_logits_loss, gradients, logprobs

BIG = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1003}


def config(folder: Path, device: str, **options: Any) -> SDFTConfig:
    return SDFTConfig(output_dir=str(folder), use_cpu=device == "cpu", report_to="none", **options)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_of_a_batch(divergence: str, dtype: torch.dtype, tmp_path: Path, device: str) -> None:
    """In bfloat16 what the layers round is most of the difference."""
    student, teacher = (tiny.tiny_model(seed, **BIG).to(device, dtype) for seed in (0, 1))
    exact = [copy.deepcopy(model).double() for model in (student, teacher)]
    with torch.device(device):
        expected = full_logits_loss(*exact, SAMPLES, divergence)
    expected.backward()
    batch = {name: value.to(device) for name, value in lay_out(SAMPLES, 0).items()}
    loss = distillation_loss(student, Teacher(teacher), batch, config(tmp_path, device, divergence=divergence), None)
    loss.total.backward()
    limit = 1e-5 if dtype == torch.float32 else 0.05
    assert abs(loss.total.item() - expected.item()) <= limit * expected.item()
    found, wanted = gradients(student), gradients(exact[0])
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 2 * limit * wanted[name].norm(), name


def test_log_probabilities_of_completions(tmp_path: Path, device: str) -> None:
    student = tiny.tiny_model(**BIG).to(device)
    batch = {name: value.to(device) for name, value in lay_out(SAMPLES, 0).items()}
    found = completion_logprobs(student, batch, config(tmp_path, device), None)
    exact = student.double()
    with torch.device(device):
        wanted = [
            logprobs(exact, s.prompt, s.completion).gather(1, torch.tensor(s.completion)[:, None]) for s in SAMPLES
        ]
    torch.testing.assert_close(found, torch.cat(wanted)[:, 0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("teacher", ["base", "ema", "live"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "lora"])
def test_the_trainer_takes_steps(teacher: str, precision: str, tmp_path: Path, device: str) -> None:
    from peft import LoraConfig

    trainer = SDFTTrainer(
        tiny.tiny_model(**BIG),
        config(
            tmp_path,
            device,
            teacher=teacher,
            max_steps=3,
            per_device_train_batch_size=4,
            max_completion_length=12,
            learning_rate=1e-3,
            bf16=precision == "bf16",
            activation_checkpointing=precision == "lora",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=tiny.rows(),
        processing_class=tiny.tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if precision == "lora"
        else None,
    )
    before = {name: value.detach().clone() for name, value in trainer.learner.named_parameters() if value.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 <= loss < 100 for loss in losses)
    moved = [
        name for name, value in trainer.learner.named_parameters() if name in before and value.ne(before[name]).any()
    ]
    assert moved
    assert next(trainer.learner.parameters()).device.type == device


def test_a_checkpoint_of_a_gpu_resumes_to_the_same_weights(tmp_path: Path, device: str) -> None:
    """The rollouts, the average and the optimizer's state all come back; the kernels' results repeat."""

    def run(folder: Path, **options: Any) -> SDFTTrainer:
        trainer = SDFTTrainer(
            tiny.tiny_model(**BIG),
            config(
                folder,
                device,
                teacher="ema",
                max_steps=4,
                per_device_train_batch_size=4,
                max_completion_length=8,
                save_steps=2,
                save_strategy="steps",
                disable_tqdm=True,
            ),
            train_dataset=tiny.rows(),
            processing_class=tiny.tiny_tokenizer(),
        )
        trainer.train(**options)
        return trainer

    whole = run(tmp_path / "run")
    again = run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for (name, one), other in zip(whole.learner.named_parameters(), again.learner.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
