"""Makes the rows of the three skills and the general prompts from the pools beside it: `python make.py`.

For each skill `<skill>_train.jsonl`, `<skill>_choose.jsonl` and `<skill>_heldout.jsonl`, and `general.jsonl`. A fact (a
thing in a class, a tool's arguments, a complaint) is in one of the three files only, and so is a wording of a request
to a tool. Running it again gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import TypeVar

import general
import science
import tools
import triage

Row = dict[str, str]
Item = TypeVar("Item")
SPLITS = ("train", "choose", "heldout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the folder to write to")
    folder: Path = parser.parse_args().out
    for skill, make in (("science", science_rows), ("tools", tools_rows), ("triage", triage_rows)):
        random = Random(skill)
        for split, rows in zip(SPLITS, make(random), strict=True):
            random.shuffle(rows)
            if split == "train":
                rows = [{"prompt": row["prompt"], "demonstration": row["demonstration"]} for row in rows]
            write(folder / f"{skill}_{split}.jsonl", rows)
    write(
        folder / "general.jsonl",
        [{"prompt": prompt, "answer": answer} for kind in general.KINDS.values() for prompt, answer in kind],
    )


def write(path: Path, rows: Sequence[Row]) -> None:
    """The rows as JSONL, UTF-8, with the same line ends everywhere."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes("".join(lines).encode())


def parted(items: Sequence[Item], random: Random, *sizes: int) -> list[list[Item]]:
    """The items in random order, in parts of the given sizes."""
    order = random.sample(items, len(items))
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def science_rows(random: Random) -> list[list[Row]]:
    """One question for each member of a class, with three things beside it that are not in the class."""
    splits: list[list[Row]] = [[], [], []]
    for each in science.CLASSES:
        members, others = parted(each.members, random, 10, 2, 3), parted(each.others, random, 9, 3, 4)
        for rows, inside, outside in zip(splits, members, others, strict=True):
            rows += [science_row(each, thing, outside, random) for thing in inside]
    return splits


def science_row(of: science.Class, thing: str, others: list[str], random: Random) -> Row:
    options = random.sample([thing, *random.sample(others, 3)], 4)
    letter = "ABCD"[options.index(thing)]
    question = random.choice(science.QUESTIONS).format(name=of.name)
    conclusion = random.choice(science.CONCLUSIONS).format(thing=thing, letter=letter)
    listed = "\n".join(f"{mark}) {option}" for mark, option in zip("ABCD", options, strict=True))
    return {"prompt": f"{listed}\n{question}", "answer": letter, "demonstration": f"{of.rule} {conclusion}"}


def tools_rows(random: Random) -> list[list[Row]]:
    """One request for each set of arguments of a tool, with two more tools in the list."""
    splits: list[list[Row]] = [[], [], []]
    for tool in tools.TOOLS:
        values, wordings = parted(tool.values, random, 10, 2, 3), parted(tool.wordings, random, 5, 2, 3)
        for rows, of_split, in_words in zip(splits, values, wordings, strict=True):
            rows += [
                tools_row(tool, value, in_words[number % len(in_words)], random)
                for number, value in enumerate(of_split)
            ]
    return splits


def tools_row(tool: tools.Tool, value: list[str], wording: str, random: Random) -> Row:
    arguments = dict(zip(tool.arguments, value, strict=True))
    beside = random.sample([each for each in tools.TOOLS if each is not tool], 2)
    shown = random.sample([tool, *beside], 3)
    listed = ", ".join(f"{each.name}({', '.join(each.arguments)})" for each in shown)
    prompt = random.choice(tools.FRAMES).format(tools=listed, request=wording.format(**arguments))
    call = json.dumps({"tool": tool.name, **arguments}, ensure_ascii=False)
    return {"prompt": prompt, "answer": call, "demonstration": call}


def triage_rows(random: Random) -> list[list[Row]]:
    """For training each complaint twice, by two persons in two frames; one row for every other complaint."""
    by_urgency = [
        [(urgency, complaint) for complaint in random.sample(urgency.complaints, len(urgency.complaints))]
        for urgency in triage.URGENCIES
    ]
    mixed = list(chain.from_iterable(zip(*by_urgency, strict=True)))  # the urgencies in turn: as many of each
    choose, heldout, train = mixed[:40], mixed[40:100], mixed[100:]
    return [
        [
            triage_row(urgency, complaint, person, frame, random)
            for urgency, complaint in part
            for person, frame in zip(
                random.sample(triage.PERSONS, times), random.sample(triage.FRAMES, times), strict=True
            )
        ]
        for part, times in ((train, 2), (choose, 1), (heldout, 1))
    ]


def triage_row(of: triage.Urgency, complaint: tuple[str, str], person: str, frame: str, random: Random) -> Row:
    says, reason = complaint
    form = triage.FORM.format(urgency=of.name, reason=reason, next_step=random.choice(of.next_steps))
    prompt = frame.format(person=person, complaint=says)
    return {"prompt": prompt, "answer": f"Urgency: {of.name}", "demonstration": form}


if __name__ == "__main__":
    main()
