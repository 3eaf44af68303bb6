"""docs/related.md: each recipe there trains, and its gradients are those of whole logits."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from sdft import SDFTConfig, SDFTTrainer
from tests import tiny
from tests.test_readme import FENCE
from tests.test_sdft_teacher_model import Gradients, distance, full_logits_gradients, large

PAGE = (Path(__file__).parent.parent / "docs" / "related.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))
RECIPES = [
    (name, number, yaml.safe_load(block))
    for name, text in SECTIONS.items()
    for number, (language, block) in enumerate(FENCE.findall(text))
    if language == "yaml"
]
#: What is in the teacher's prompt besides the student's, by method and recipe.
SEEN = {
    ("SDFT", 0): "This is an example for a response to the question:\na",
    ("OPSD", 0): "A solution of it:\na",
    ("SDPO", 0): "Correctly solve the original question.",
    ("OPCD", 0): "Answer in one word, and never say please.",
    ("OPCD", 1): "a\n\nsay a",
    ("GKD and DistiLLM", 0): "say a",
}


def student():
    """A model that hardly ever ends an answer, so that there are tokens after those that are skipped."""
    model = tiny.tiny_model(max_position_embeddings=400)
    with torch.no_grad():
        model.lm_head.weight[1] = 0
    return model


def test_every_method_of_the_family_has_a_recipe():
    assert [(name, number) for name, number, _ in RECIPES] == list(SEEN)


@pytest.mark.parametrize(("name", "number", "recipe"), RECIPES, ids=str)
def test_a_method_trains_and_its_gradients_are_those_of_whole_logits(name, number, recipe, tmp_path):
    larger = "teacher_model" in recipe
    settings = recipe | ({"teacher_model": tiny.saved(tmp_path / "teacher", large())} if larger else {})
    settings["rollouts_per_prompt"] = min(2, recipe.get("rollouts_per_prompt", 1))
    gradients = Gradients()
    # Neither a demonstration nor an answer where the method takes none.
    needed = {"SDPO": ["answer"], "GKD and DistiLLM": []}.get(name, [] if (name, number) == ("OPCD", 0) else None)
    columns = ["prompt", *(["demonstration"] if needed is None else needed)]
    run = SDFTTrainer(
        student(),
        SDFTConfig(
            output_dir=str(tmp_path / "run"),
            max_completion_length=12,
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=0.0,  # so that the second step's gradient is the starting model's, too
            max_grad_norm=0,
            use_cpu=True,
            save_strategy="no",
            **settings,
        ),
        train_dataset=[{column: row[column] for column in columns} for row in tiny.rows(1) * 4],
        processing_class=tiny.tiny_tokenizer(),
        callbacks=[gradients],
    )
    kept, sample = [], run.samples
    run.samples = lambda rows: (kept.clear(), kept.extend(sample(rows)))[0] or kept
    run.train()
    kept = [each for each in kept if each.weight]  # others are left out: right, and no sibling is
    assert kept and all(SEEN[name, number] in tiny.tiny_tokenizer().decode(each.teacher_prompt) for each in kept)
    teacher = large() if larger else student()
    if larger:
        assert run.teacher.model.dtype == torch.float32
    skipped = [each for each in kept if len(each.completion) > run.args.skip_tokens]
    expected = full_logits_gradients(
        student(),
        teacher,
        skipped,
        recipe["divergence"],
        recipe.get("beta", 0.5),
        run.args.skip_tokens,
    )
    assert gradients.kept.keys() == expected.keys()
    got, exact = (torch.cat([of[each].flatten() for each in expected]) for of in (gradients.kept, expected))
    assert distance(got, exact) < 1e-5
