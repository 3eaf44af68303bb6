"""A plan as a picture: the parts of the peak, beside those of the same step with other losses."""

from __future__ import annotations

from sdft.planning.devices import GIB, RESERVED
from sdft.planning.report import Plan

#: Parts in the order in which they are stacked, each with its colour; any others come last, in grey.
COLOURS = {
    "CUDA context": "#bbbbbb",
    "weights": "#2d5f8b",
    "adapter": "#5b8fb9",
    "teacher": "#8fb8d8",
    "optimizer": "#3d7d5a",
    "gradients": "#7fb894",
    "keys and values": "#8a6bb1",
    "activations": "#e0a43b",
    "loss": "#c8553d",
    "backward": "#e3906f",
}
OTHERS = "#777777"


def draw(plan: Plan, path: str) -> None:
    """Write a PNG to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peaks = {"this step": plan.measured.peak, **{f"with {other.name}": other.peak for other in plan.other_losses}}
    bars = {name: {"CUDA context": RESERVED, **peak.parts} for name, peak in peaks.items()}
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.6 * len(bars)), layout="constrained")
    starts = dict.fromkeys(bars, 0.0)
    unknown = sorted({part for parts in bars.values() for part in parts} - COLOURS.keys())
    for part in (*COLOURS, *unknown):
        sizes = [parts.get(part, 0) / GIB for parts in bars.values()]
        if max(sizes) >= 0.005:
            colour = COLOURS.get(part, OTHERS)
            axes.barh(list(bars), sizes, left=list(starts.values()), color=colour, height=0.6, label=part)
        starts = {name: start + size for (name, start), size in zip(starts.items(), sizes, strict=True)}
    axes.axvline(plan.memory / GIB, color="black", linestyle="--", linewidth=1.2, label=plan.gpu)
    axes.invert_yaxis()
    axes.set_xlabel("GiB at the peak of a step, planned")
    axes.set_title(f"{plan.model}: a rollout of {plan.lengths.rollout} tokens", fontsize=11)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)
    pyplot.close(figure)
