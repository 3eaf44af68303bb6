"""A model's configuration, from which it can be made without its weights: from a folder, or a preset that ships."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sdft.errors import UsageError
from sdft.models.files import BUILT_IN, local_path
from sdft.settings.checks import matching

FOLDER = Path(__file__).parent / "models"

#: Ends of hub names whose models have the same shape: fine-tunings, and releases of a month.
_SAME_SHAPE = re.compile(r"-(instruct|it|pt|base|instruct-2507|thinking-2507|2507|v0\.1|v0\.2)$", re.IGNORECASE)


def presets() -> list[str]:
    """The names of the models that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def preset_of(name: str) -> str | None:
    """The preset that has the shape of the model called `name`, an instruct model or not."""
    if matching(name, (BUILT_IN,)):
        return "SmolLM2-135M"
    stem = _SAME_SHAPE.sub("", name.rsplit("/", 1)[-1])
    return next((each for each in presets() if each.lower() == stem.lower()), None)


def config_of(name: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model called `name`; UsageError where there is none on this machine."""
    from transformers import AutoConfig

    path = local_path(name)
    folder = path.parent if path.name == "config.json" else path
    if (folder / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(f"model is {name!r}, whose config.json cannot be read: {reason}") from error
    if (preset := preset_of(name)) is not None:
        values = json.loads((FOLDER / f"{preset}.json").read_text(encoding="utf-8"))
        return AutoConfig.for_model(**values)
    if not path.exists():
        try:  # one that was downloaded before
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, ValueError):
            pass
    raise UsageError(
        f"model is {name!r}, whose config.json is not on this machine; it may be a folder with one, a hub name that "
        f"was downloaded before, or one of {', '.join(presets())}"
    )
