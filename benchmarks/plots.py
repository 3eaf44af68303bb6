"""What the plots of all benchmarks share: a colour for each method, panels of grouped bars, and the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Ours blue, its floor grey, peers in colours of their own, on every plot; then the phases of a training step.
COLOURS = {
    "sdft-kernels": "#2a6fbb",
    "ours, options": "#74a9dd",
    "TRL": "#e07b39",
    "Liger compiled": "#8a8f98",
    "Liger eager": "#c9ccd1",
    "plain torch": "#b05aa0",
    "Liger Triton": "#5d6b7a",
    "bare products": "#e3e5e8",
    "predicted": "#b9d3ee",
    "teacher": "#8c6bb1",
    "forward": "#41ae76",
    "loss": "#2a6fbb",
    "backward": "#e07b39",
    "optimizer": "#c2b280",
    "rest": "#8a8f98",
}


@contextmanager
def panels(path: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """The axes of a figure that is written to `path` (PNG or SVG) in the end, with one legend for all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    named: dict[str, Any] = {}
    for axis in axes.flat:  # what the first panel lacks another may have
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def bars(axis: Any, groups: Sequence[str], heights: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for each method in each group: `heights` by method, then by group; one that is missing has no bar."""
    for number, (method, of_group) in enumerate(heights.items()):
        if not of_group:
            continue
        shift = (number - (len(heights) - 1) / 2) * 0.8 / len(heights)
        places = [groups.index(group) + shift for group in of_group]
        axis.bar(
            places, list(of_group.values()), 0.8 / len(heights), color=COLOURS.get(method, f"C{number}"), label=method
        )
    axis.set_xticks(range(len(groups)), list(groups))
