"""examples/skills: the files are what its script makes, and what its README says of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from sdft.evaluation.scorers import SCORERS
from sdft.models.files import BUILT_IN
from sdft.models.tokenizer import load_tokenizer
from sdft.settings.continual import fields_of_continual, plan_of
from sdft.settings.recipe import read

FOLDER = Path(__file__).parent.parent / "examples" / "skills"
SCORER = {"science": "choice", "tools": "json", "triage": "contains"}
MOST_TOKENS = {"science": 80, "tools": 60, "triage": 80}
COUNTS = {"train": 200, "choose": 40, "heldout": 60}
SPLITS = [f"{skill}_{split}" for skill in SCORER for split in COUNTS]


@cache
def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_script_makes_the_files_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "make.py", "--out", tmp_path], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}
    assert sorted(made) == sorted(f"{name}.jsonl" for name in [*SPLITS, "general"])


@pytest.mark.parametrize("name", SPLITS)
def test_a_skill_has_its_rows(name: str) -> None:
    skill, split = name.split("_")
    fields = {"prompt", "demonstration"} | ({"answer"} if split != "train" else set())
    assert all(set(row) == fields for row in rows(name))
    assert len(rows(name)) >= COUNTS[split] if split == "train" else len(rows(name)) == COUNTS[split]
    assert all(SCORERS[SCORER[skill]](row["demonstration"], row["answer"]) for row in rows(name) if split != "train")


def test_demonstrations_are_short() -> None:
    tokenizer = load_tokenizer(BUILT_IN).tokenizer
    for skill, most in MOST_TOKENS.items():
        texts = [row["demonstration"] for split in COUNTS for row in rows(f"{skill}_{split}")]
        assert max(map(len, tokenizer(texts)["input_ids"])) <= most


def test_every_prompt_is_there_once() -> None:
    prompts = [row["prompt"] for name in [*SPLITS, "general"] for row in rows(name)]
    assert len(set(prompts)) == len(prompts)


def facts(skill: str, split: str) -> set[str]:
    """What a row is about: a thing and its class, a tool and its arguments, a complaint."""
    found = set()
    for row in rows(f"{skill}_{split}"):
        if skill == "science":
            rule = row["demonstration"].partition(".")[0]
            found |= {f"{rule}: {option}" for option in re.findall(r"^[A-D]\) (.*)$", row["prompt"], re.MULTILINE)}
        elif skill == "tools":
            found.add(row["demonstration"])
        else:
            found |= set(re.findall('"(.*)"', row["prompt"]))
    return found


@pytest.mark.parametrize("skill", SCORER)
def test_no_fact_is_in_two_files(skill: str) -> None:
    for one, other in combinations(COUNTS, 2):
        assert facts(skill, one) and not facts(skill, one) & facts(skill, other)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("skill", SCORER)
def test_no_prompt_nearly_repeats_one_of_another_file(skill: str) -> None:
    """Of the words that two prompts have, at most nine in ten are in both."""
    parts = {split: [words(row["prompt"]) for row in rows(f"{skill}_{split}")] for split in COUNTS}
    for one, other in combinations(COUNTS, 2):
        assert max(len(a & b) / len(a | b) for a in parts[one] for b in parts[other]) < 0.9


def test_general_prompts_can_be_scored_and_are_of_other_kinds() -> None:
    assert len(rows("general")) >= 100
    assert all(set(row) == {"prompt", "answer"} and row["answer"] for row in rows("general"))
    trained = re.compile(r"^[A-D]\) |one call|triage|patient", re.IGNORECASE | re.MULTILINE)
    assert not [row["prompt"] for row in rows("general") if trained.search(row["prompt"])]
    assert all(trained.search(row["prompt"]) for name in SPLITS for row in rows(name))


@pytest.mark.parametrize("name", [name for name in SPLITS if name.startswith("triage")])
def test_triage_says_that_it_is_no_advice(name: str) -> None:
    assert all(row["demonstration"].endswith("Practice only, not medical advice.") for row in rows(name))
    urgencies = [row["demonstration"].splitlines()[0] for row in rows(name)]
    counts = [urgencies.count(f"Urgency: {each}") for each in ("emergency", "today", "home")]
    assert sum(counts) == len(urgencies) and max(counts) - min(counts) <= 2


@pytest.mark.parametrize("recipe", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_a_recipe_is_one_that_sdft_continual_takes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent.parent)
    fields = fields_of_continual()
    plan = plan_of(read([str(FOLDER / recipe)], fields, command="sdft continual"), fields)
    found = {skill.name: (skill.settings.scorer, len(skill.rows.train)) for skill in plan.skills}
    assert found == {name: (SCORER[name], len(rows(f"{name}_train"))) for name in SCORER}
    assert len(plan.general) == len(rows("general")) and plan.seeds == [0, 1, 2]
