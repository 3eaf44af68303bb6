"""Sample rollouts for the report: prompts that were answered twice first, then others from all over the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sdft.errors import counted
from sdft.report.run_folder import RunFolder, is_number, json_lines
from sdft.run_files import COMPLETIONS_FILE

#: How many prompts are shown with an early and a late answer, and how many with one.
TWICE, ONCE = 4, 4
#: The most characters of a prompt, and tokens of a rollout, that the page shows.
MOST_CHARACTERS, MOST_TOKENS = 4000, 320


def samples(run: RunFolder, share: float = 1.0) -> list[dict[str, Any]]:
    """Prompts with one rollout, or two, the first and the last that were written to it, as the page shows them.

    `share` of the usual number are taken, where several runs share a page.
    """
    path = run.path / COMPLETIONS_FILE
    if not path.is_file():
        return []
    prompts: dict[str, list[tuple[int, int]]] = {}  # the step of each rollout, and its place in the file
    cut = 0
    for place, line in json_lines(path):
        if line is None or not isinstance(line.get("prompt"), str):
            cut += 1
            continue
        prompts.setdefault(line["prompt"], []).append((line["step"], place))
    if cut:
        run.notes.append(f"The page leaves out {counted(cut, 'line')} of {COMPLETIONS_FILE} that could not be read.")
    chosen = choose(list(prompts.values()), *(max(1, round(number * share)) for number in (TWICE, ONCE)))
    with path.open("rb") as file:

        def at(place: int) -> dict[str, Any]:
            file.seek(place)
            return dict(json.loads(file.readline()))

        return [_shown([at(place) for place in places]) for places in chosen]


def choose(written: Sequence[list[tuple[int, int]]], twice: int, once: int) -> list[list[int]]:
    """The places of the rollouts to show, of one prompt in each list; `written` are steps and places by prompt."""
    pairs = [(each[0], each[-1]) for each in written if each[-1][0] > each[0][0]]
    pairs.sort(key=lambda pair: pair[0][0] - pair[1][0])  # the longest apart first; otherwise as they came
    chosen = [[first[1], last[1]] for first, last in pairs[:twice]]
    others = [each[0] for each in written if each[-1][0] == each[0][0]]
    others.sort()
    spread = range(min(once, len(others)))
    picked = {(n * (len(others) - 1)) // max(1, len(spread) - 1) for n in spread}
    return chosen + [[others[n][1]] for n in sorted(picked)]


def _shown(lines: list[dict[str, Any]]) -> dict[str, Any]:
    first = lines[0]
    return {
        "prompt": _beginning(first["prompt"]),
        "teacher_prompt": _beginning(str(first.get("teacher_prompt") or "")),
        "rollouts": [_rollout(line) for line in lines],
    }


def _beginning(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]}… ({more} more characters)"


def _rollout(line: dict[str, Any]) -> dict[str, Any]:
    """A rollout as the page has it: `tokens` are [text, divergence, log-probs of student and teacher, their tops]."""
    texts = line.get("tokens")
    found: dict[str, Any] = {"step": line["step"], "completion": _beginning(str(line.get("completion", "")))}
    if not isinstance(texts, list):  # a file from before they were written
        return found
    names = ("divergence", "student_logprob", "teacher_logprob")
    columns = [[str(text) for text in texts], *(_column(line, name, len(texts)) for name in names)]
    columns += [_tops(line, name, len(texts)) for name in ("student_top", "teacher_top")]
    found["tokens"] = [list(token) for token in zip(*columns, strict=True)][:MOST_TOKENS]
    found["left_out"] = max(0, len(texts) - MOST_TOKENS)
    return found


def _column(line: dict[str, Any], name: str, length: int) -> list[Any]:
    values = line.get(name)
    if not isinstance(values, list) or len(values) != length:
        return [None] * length
    return [round(value, 3) if is_number(value) else None for value in values]


def _tops(line: dict[str, Any], name: str, length: int) -> list[Any]:
    values = line.get(name)
    if not isinstance(values, list) or len(values) != length:
        return [None] * length
    return [[_pair(*pair) for pair in pairs] if pairs else None for pairs in values]


def _pair(text: Any, logprob: Any) -> list[Any]:
    return [str(text), round(logprob, 2) if is_number(logprob) else None]
