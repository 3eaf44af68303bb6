"""The science questions of arXiv 2601.19897 as files of rows: chemistry of level 3 in SciKnowEval, with four choices.

`python examples/skills/paper_science.py` (pip install datasets) reads `hicai-zju/SciKnowEval` from the hub and writes
`paper-science/train.jsonl`, `choose.jsonl` and `heldout.jsonl`, 75, 5 and 20 % of the questions in an order drawn by
`--seed`, for examples/skills/paper-science.yaml. The paper had another model write the demonstrations; these are the
right choice alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DATASET, SPLIT = "hicai-zju/SciKnowEval", "test"
SHARES = {"train": 0.75, "choose": 0.05, "heldout": 0.20}
LETTERS = ("A", "B", "C", "D")


def row_of(found: Mapping[str, Any]) -> dict[str, str] | None:
    """A row of ours; None for one of another subject or level, or without four choices."""
    choices, letter = found.get("choices") or {}, found.get("answerKey")
    labels, texts = tuple(choices.get("label") or ()), tuple(choices.get("text") or ())
    chemistry = found.get("domain") == "Chemistry" and (found.get("details") or {}).get("level") == "L3"
    whole = found.get("question") and labels == LETTERS and len(texts) == len(LETTERS) and letter in LETTERS
    if not chemistry or not whole:
        return None
    asked = (found.get("prompt") or {}).get("default") or ""
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return {
        "prompt": f"{asked}\n\nQuestion: {found['question']}\n{options}".strip(),
        "demonstration": f"The correct answer is {letter}. {texts[LETTERS.index(letter)]}",
        "answer": str(letter),
    }


def split(found: Iterable[Mapping[str, Any]], seed: int) -> dict[str, list[dict[str, str]]]:
    """The rows by the file that they go to; a question that comes again, with whatever choices, is left out."""
    rows = list({each["question"]: row for each in found if (row := row_of(each)) is not None}.values())
    random.Random(seed).shuffle(rows)
    parts, start = {}, 0
    for number, (name, share) in enumerate(SHARES.items(), start=1):
        end = len(rows) if number == len(SHARES) else start + round(share * len(rows))
        parts[name], start = rows[start:end], end
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("paper-science"), help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from datasets import load_dataset

    parts = split(load_dataset(DATASET, split=SPLIT), given.seed)
    if not all(parts.values()):
        raise SystemExit(
            f"{DATASET} has too few chemistry questions of level 3 with four choices: its columns may have changed"
        )
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path = given.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} questions")


if __name__ == "__main__":
    main()
