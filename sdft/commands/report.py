"""`sdft report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdft.report.page import page


def report(folders: Sequence[Path], output: Path) -> None:
    """`sdft report`: write the page of one run or of several."""
    text = page(folders)
    output.write_text(text, encoding="utf-8")
    print(f"{output} shows {', '.join(map(str, folders))} ({len(text.encode()) / 2**20:.1f} MiB)")
