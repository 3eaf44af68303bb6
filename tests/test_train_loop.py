"""examples/train_loop.py is the trainer's step, without the trainer."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.test_sdft_trainer import Gradients, trainer

PATH = Path(__file__).parent.parent / "examples" / "train_loop.py"


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("train_loop", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_its_loss_and_gradients_are_the_trainers_on_the_same_answers(divergence, loop, tmp_path):
    gradients = Gradients()
    options = {"max_steps": 1, "max_grad_norm": 0, "teacher_template": "turn", "divergence": divergence}
    run = trainer(tmp_path, model=tiny.tiny_model(), callbacks=[gradients], **options)
    seen, sample = [], run.samples
    run.samples = lambda rows: seen.extend(sample(rows)) or seen
    run.train()
    student, teacher = tiny.tiny_model(), tiny.tiny_model()
    loss = loop.loss_of(student, teacher, seen, divergence)
    loss.backward()
    assert loss.item() == pytest.approx(run.state.log_history[0]["loss"], rel=1e-5)
    for name, parameter in student.named_parameters():
        assert (gradients.kept[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    prompts = [loop.prompts_of(row, tiny.tiny_tokenizer()) for row in tiny.rows()]
    assert prompts == [(row["prompt_ids"], row["teacher_prompt_ids"]) for row in run.train_dataset]


def test_it_trains_and_saves(loop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "STEPS", 3)
    monkeypatch.setattr(loop, "LONGEST_ANSWER", 6)
    monkeypatch.setattr(loop, "LEARNING_RATE", 1e-2)
    name = tiny.saved(tmp_path / "model", tiny.tiny_model())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows()))
    loop.main(name, str(tmp_path / "rows.jsonl"), str(tmp_path / "out"))
    assert capsys.readouterr().out.startswith("step 1 of 3: loss ")
    saved = loop.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(saved.lm_head.weight, tiny.tiny_model().lm_head.weight)


def test_it_draws_from_the_students_own_distribution(loop):
    model, prompt, drawn = tiny.tiny_model(), [5, 6, 7], []
    for options in ({}, {"temperature": 0.01, "repetition_penalty": 5.0, "min_p": 0.9}):
        model.generation_config.update(**options)
        own = model.generation_config.to_dict()
        torch.manual_seed(0)
        drawn.append(loop.answer(model, prompt))
        assert model.generation_config.to_dict() == own
    assert drawn[0] == drawn[1]


def test_it_says_what_it_takes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_loop.py"])
    with pytest.raises(SystemExit, match=r"train_loop\.py MODEL ROWS\.jsonl OUTPUT_FOLDER"):
        runpy.run_path(str(PATH), run_name="__main__")
