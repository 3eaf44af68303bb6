"""A file of answers that has each as soon as it is made, so that a crash or Ctrl-C keeps those there are.

Prompts are answered in batches of similar length, so the lines come in another order than the rows; when all are there
the file is put into the rows' order.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sdft.checkpoints.files import write_text
from sdft.errors import TrainingError


class AnswersFile:
    """JSONL at `path`, to be used in a `with`: replaces what is there once the first answer comes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines: dict[Any, str] = {}
        self._file: TextIO | None = None

    def add(self, place: Any, record: dict[str, Any]) -> None:
        """Write an answer; `place` is where it belongs among the others, by Python's order."""
        self.lines[place] = json.dumps(record, ensure_ascii=False, default=str) + "\n"  # Parquet has dates
        try:
            self._file = self._file or self.path.open("w", encoding="utf-8")
            self._file.write(self.lines[place])
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written: {error.strerror}") from error

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and list(self.lines) != sorted(self.lines):
            write_text(self.path, "".join(self.lines[place] for place in sorted(self.lines)))
