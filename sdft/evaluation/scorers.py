"""When an answer counts as right: the named scorers, each a function of the model's answer and the row's `answer`.

- "exact": the answer itself, apart from white space around it.
- "contains": the answer is somewhere in it, in upper or lower case.
- "choice": a multiple-choice letter. What the model says its answer is counts ("The answer is B", "**Answer:** (b)",
  "\\boxed{B}", "B is correct"), the last time that it says so. Without that, a letter counts that stands on a line of
  its own, at the start of one ("B) Paris", "B. Paris", "B, because"), or marked ("(B)"); several different ones are no
  choice. A letter before another word is none ("A dog ...", "The answer is a dog"), unless the word only goes on to
  give reasons ("The answer is B because").
- "json": equal as data. Key order and white space do not matter, the order of a list does; numbers are equal by value
  (1 and 1.0 are), and are not their text ("1") and not true or false. A Markdown fence or <tool_call> tags around the
  JSON are set aside. Any other text, a second value, or a key given twice is wrong: what calls the tool could not tell.

For "choice" and "json" what comes before `</think>` is not part of the answer.

A scorer of a user's own is a function of the same two texts, which returns True or False, named as module:function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from sdft.data import WHERE, Row
from sdft.errors import UsageError, shown
from sdft.named_functions import imported

Scorer = Callable[[str, str], bool]


def exact(completion: str, answer: str) -> bool:
    """The completion is the answer, apart from white space around it."""
    return completion.strip() == answer.strip()


def contains(completion: str, answer: str) -> bool:
    """The answer is somewhere in the completion, in upper or lower case."""
    return answer.strip().lower() in completion.lower()


def choice(completion: str, answer: str) -> bool:
    """The completion chooses the answer's letter, and no other."""
    return find_choice(answer) is not None and find_choice(completion) == find_choice(answer)


def same_json(completion: str, answer: str) -> bool:
    """The completion is the same JSON value as the answer."""
    try:
        return _same(_read_json(completion), _read_json(answer))
    except (ValueError, ArithmeticError, RecursionError):
        return False


SCORERS: dict[str, Scorer] = {"exact": exact, "contains": contains, "choice": choice, "json": same_json}


def scorer_of(name: str, setting: str = "scorer") -> Scorer:
    """The scorer that a setting names: one of those here, or module:function. UsageError where that cannot be had."""
    return SCORERS[name] if name in SCORERS else _checked(imported(setting, name, name), name, setting)


def _checked(function: Callable[..., Any], name: str, setting: str) -> Scorer:
    """A user's function, with a UsageError for what it raises, and for what is neither True nor False."""

    def scorer(completion: str, answer: str) -> bool:
        try:
            right = function(completion, answer)
        except Exception as error:  # a function is a user's code, and may raise anything
            raise UsageError(f"{setting} is {name!r}, which raised {type(error).__name__}: {error}") from error
        if not isinstance(right, bool):
            raise UsageError(f"{setting} is {name!r}, which returned {shown(right)}; it must be True or False")
        return right

    return scorer


def check_answers(rows: Sequence[Row], scorer: str, setting: str = "scorer") -> None:
    """Refuse rows whose `answer` the named scorer could never find in a completion, and one that cannot be had."""
    if scorer not in SCORERS:
        scorer_of(scorer, setting)
        return
    for row in rows:
        answer = row.get("answer")
        if answer and not SCORERS[scorer](answer, answer):
            kind = {"choice": "the letter of a choice", "json": "JSON"}[scorer]
            raise UsageError(f"{row[WHERE]}: answer is {answer!r}; under scorer {scorer!r} it must be {kind}")


# A letter that may be a choice, and the rest of its line. "A-frame", "A's", "C++" and "U.S." are not letters.
_LETTER = r"(?P<open>[(\[{]*)[ \t]*(?P<letter>[A-Za-z])(?![+#]|['’.-]?\w)(?P<close>[)\]}]*)(?=(?P<rest>[^\n]*))"
_SAID = re.compile(
    r"(?:"
    r"\b(?i:(?:answer|choice|option)(?:(?:\s[^.,;:\n]{0,60}?)??\s(?:is|was|would be|should be|must be))?)\s*[:=>]?\s*"
    r"(?<=[\s:=>])(?i:(?:(?:most )?likely|probably|definitely|clearly|actually|indeed|therefore|thus|still)\s+)?"
    r"|(?<!\S)A(?i:ns)?[ \t]*:\s*"  # as in "Q: ... A: B"
    r"|\bI(?:['’]d|['’]ll| would| will)? (?i:choose|pick|select|go with)\s+"
    r"|\\boxed\s*(?={)"
    r")(?i:(?:option|choice|answer|letter)\s+)?" + _LETTER,
)
_CALLED_RIGHT = re.compile(
    r"(?<!\w)[(\[]?(?P<letter>[A-Z])[)\].]? is (?:the |most |only |my )*(?:correct|right|best|answer)"
    r"(?=\s*(?:$|[.,;:!)]|(?:because|since|answer|option|choice|one)\b))"
)
# Emphasis, code, headings, quotation marks, TeX: what may stand around a letter and says nothing.
_DECORATION = re.compile(
    r"[*`$\"“”]|(?<![^\W_])_+|_+(?![^\W_])|^[ \t]*#+[ \t]|\\(?:text|textbf|mathrm|mathbf)\s*(?=\{)"
    r"|(?<!\w)['‘](?=[A-Za-z]['’](?!\w))|(?<=(?<!\w)['‘][A-Za-z])['’](?!\w)",
    re.MULTILINE,
)
_OPENS_LINE = re.compile(r"^[ \t]*(?:[>•-][ \t]*)?(?i:(?:option|choice)[ \t]+)?" + _LETTER, re.MULTILINE)
_MARKED = re.compile(r"(?<!\w)[(\[](?P<both>[A-Za-z])[)\]](?!\w)|(?<!\S)(?P<right>[A-Z])\)(?!\w)")
_REASONS = r"because|since|as|given|due|for|so|which|but|and|though|here|based"
_GOES_ON = re.compile(rf"\s*(?:$|[.,:;!?)\]}}]|[-–—(]|</|(?:{_REASONS})\b)")
_ANOTHER = re.compile(r"\s*(?:,|/|&|,?\s*(?:and|or)\b)\s*[(\[]?[A-Z](?![\w'’])")


def find_choice(text: str) -> str | None:
    """The letter (upper case) that an answer to a multiple-choice question chooses, or None where it chooses none."""
    text = _DECORATION.sub("", _without_thinking(text))
    said = [m for m in _SAID.finditer(text) if _stands_as_a_letter(m) and not _is_cut_off(m)]
    said += _CALLED_RIGHT.finditer(text)
    if said:
        return max(said, key=lambda match: match.start("letter"))["letter"].upper()
    shown = {m["letter"] for m in _OPENS_LINE.finditer(text) if _stands_as_a_letter(m) and _opens_as_a_choice(m)}
    shown |= {m["both"] or m["right"] for m in _MARKED.finditer(text)}
    letters = {letter.upper() for letter in shown}
    return letters.pop() if len(letters) == 1 else None


def _stands_as_a_letter(match: re.Match[str]) -> bool:
    """Whether a letter is given as a choice: nothing but punctuation or a reason comes after it."""
    rest = match["rest"]
    if _ANOTHER.match(rest):
        return False  # "A or B", "A, B" choose neither
    if match["open"]:
        return bool(match["close"])
    return _GOES_ON.match(rest) is not None or bool(match["close"])


def _is_cut_off(match: re.Match[str]) -> bool:
    """Whether the letter may be the first word of what was never finished: "The answer is a"."""
    return match["letter"] in "ai" and not match["close"] and not match["rest"].strip()


def _opens_as_a_choice(match: re.Match[str]) -> bool:
    """Whether a letter at the start of a line is an option's: a small one only with a mark, or alone."""
    rest = match["rest"]
    return match["letter"].isupper() or bool(match["close"]) or not rest.strip() or rest[0] in ".:"


def _read_json(text: str) -> Any:
    text = _without_thinking(text).strip()
    for wrapping in (r"<tool_call>(.*)</tool_call>", r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```"):
        found = re.fullmatch(wrapping, text, re.DOTALL)
        text = found[1] if found else text
    return json.loads(text, object_pairs_hook=_object, parse_float=Decimal, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b  # in Python True == 1
    return bool(a == b)


def _without_thinking(text: str) -> str:
    return text.rpartition("</think>")[2]
