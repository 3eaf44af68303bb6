"""examples/skills: the files are what its script makes, and what its README says of them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from examples.skills.scoring import plainly
from sdft.data import load_rows
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
    assert all(plainly(row["answer"], row["answer"]) for row in rows("general"))
    assert all(trained.search(row["prompt"]) for name in SPLITS for row in rows(name))


@pytest.mark.parametrize("skill", SCORER)
def test_an_answer_in_a_skills_form_is_no_general_one(skill: str) -> None:
    """Whatever words of the prompt it copies."""
    assert not [
        row["demonstration"]
        for row in rows(f"{skill}_train")
        for word in row["demonstration"].split()
        if plainly(row["demonstration"], word)
    ]
    for call in ('{"tool": "word", "word": "lantern"}', '```json\n{"word": "lantern"}\n```', ' {"lantern'):
        assert not plainly(call, "lantern")
    assert plainly("Sure: Lantern!", "lantern") and not plainly("Lanterns", "lantern")
    assert plainly("```python\ndef add(a, b):", "def") and plainly("1. France\n2. Peru", "1.")


@pytest.mark.parametrize("name", [name for name in SPLITS if name.startswith("triage")])
def test_triage_says_that_it_is_no_advice(name: str) -> None:
    assert all(row["demonstration"].endswith("Practice only, not medical advice.") for row in rows(name))
    urgencies = [row["demonstration"].splitlines()[0] for row in rows(name)]
    counts = [urgencies.count(f"Urgency: {each}") for each in ("emergency", "today", "home")]
    assert sum(counts) == len(urgencies) and max(counts) - min(counts) <= 2


@pytest.mark.parametrize("recipe", ["continual-qwen2.5-7b.yaml", "continual.yaml"])
def test_a_recipe_is_one_that_sdft_continual_takes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent.parent)
    fields = fields_of_continual()
    plan = plan_of(read([str(FOLDER / recipe)], fields, command="sdft continual"), fields)
    found = {skill.name: (skill.settings.scorer, len(skill.rows.train)) for skill in plan.skills}
    assert found == {name: (SCORER[name], len(rows(f"{name}_train"))) for name in SCORER}
    assert len(plan.general) == len(rows("general")) and plan.seeds == [0, 1, 2]


def science_question(number: int, **changes: Any) -> dict[str, Any]:
    """A question with the columns of SciKnowEval."""
    return {
        "question": f"Which is {number}?",
        "choices": {"label": [*"ABCD"], "text": [f"{number}{letter}" for letter in "wxyz"]},
        "answerKey": "ABCD"[number % 4],
        "domain": "Chemistry",
        "details": {"level": "L3", "task": "any"},
        "prompt": {"default": "Choose one."},
        **changes,
    }


def test_the_papers_questions_become_rows_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With questions as the hub has them, and some of other kinds among them, which are left out."""
    spec = importlib.util.spec_from_file_location("paper_science", FOLDER / "paper_science.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    others = [
        science_question(100, domain="Biology"),
        science_question(101, details={"level": "L2"}),
        science_question(102, choices={"label": ["A", "B"], "text": ["yes", "no"]}),
        science_question(103, choices={"label": [], "text": []}, answerKey=""),
        science_question(104, choices=None, details=None),
        science_question(7),  # once more
    ]
    hub = types.SimpleNamespace(load_dataset=lambda name, split: [*others, *map(science_question, range(40))])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["paper_science.py"])
    script.main()
    parts = {name: load_rows(f"paper-science/{name}.jsonl", need=("prompt", "answer")) for name in script.SHARES}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 30, "choose": 2, "heldout": 8}
    prompts = {row["prompt"] for rows in parts.values() for row in rows}
    assert prompts == {f"Choose one.\n\nQuestion: Which is {n}?\nA. {n}w\nB. {n}x\nC. {n}y\nD. {n}z" for n in range(40)}
    assert all(SCORERS["choice"](row["demonstration"], row["answer"]) for rows in parts.values() for row in rows)
    assert len({row["answer"] for row in parts["train"]}) == 4

    (tmp_path / "examples").symlink_to(FOLDER.parent)
    monkeypatch.setattr("sdft.settings.continual.check_package", lambda *_: None)
    fields = fields_of_continual()
    plan = plan_of(read([str(FOLDER / "paper-science.yaml")], fields, command="sdft continual"), fields)
    (skill,) = plan.skills
    assert (len(skill.rows.train), len(skill.choosing), len(skill.rows.held_out)) == (30, 2, 8)
    assert len(plan.methods) == 6 and plan.seeds == [0, 1, 2]

    hub.load_dataset = lambda name, split: others
    with pytest.raises(SystemExit, match="too few chemistry questions"):
        script.main()
