"""When an answer to a general prompt is right: it has the answer as words of their own, and is in no skill's form.

A model that answers every prompt by a call of a tool, with words of the prompt as arguments, has lost what it could do.
Recipes name this as `general_scorer: examples.skills.scoring:plainly`, from the root of the repository.
"""

from __future__ import annotations

import re

#: What tells the answers that the skills teach: a call of a tool, in JSON; a triage form; science's last two sentences.
FORMS = re.compile(
    r"\A\s*(?:`{3}(?:json)?\s*)?\{|\A\s*urgency\b|\bof the four\b|\bthe answer is [A-D]\b", re.IGNORECASE
)


def plainly(completion: str, answer: str) -> bool:
    """The answer stands in the completion as words of their own, in upper or lower case, and not in a skill's form."""
    words = rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
    return not FORMS.search(completion) and re.search(words, completion, re.IGNORECASE) is not None
