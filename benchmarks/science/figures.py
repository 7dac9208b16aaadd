"""What the figures share: colours that colour-blind readers can tell apart, curves with their spread, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from science.records import Content

# Okabe and Ito, "Color Universal Design", 2008.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666"
)  # fmt: skip
# One after the other, from the first on.
SEQUENCE = (GREEN, BLUE, ORANGE, VERMILION, PURPLE, SKY)
DPI = 90
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
}


def panels(rows: int, columns: int, width: float, height: float, title: str, **options: Any) -> tuple[Any, Any]:
    """A figure under a title and its axes as an array of ``rows`` by ``columns``; inches."""
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, axes


def with_spread(
    axes: Any,
    x: Sequence[float],
    curves: Sequence[Sequence[float]],
    colour: str,
    middle: Callable[[Sequence[float]], float] = mean,
    **options: Any,
) -> None:
    """The ``middle`` of several seeds' curves, and from the least to the greatest as a band."""
    columns = list(zip(*curves, strict=True))
    axes.plot(x, [middle(column) for column in columns], color=colour, **options)
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0)


def label(axes: Any, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """``text`` beside a point of a curve, in its colour."""
    options = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", **options}
    axes.annotate(text, (x, y), color=colour, annotation_clip=False, **options)


def save(figure: Any, folder: Path, name: str) -> Path:
    """``<folder>/<name>.png``"""
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def draw_agreement(axes: Any, agreements: Sequence[Content]) -> None:
    """How far the fused runs and the reference's own runs have come apart, step by step, in both precisions."""
    for dtype, colour in (("float32", VERMILION), ("float64", BLUE)):
        runs = [a for a in agreements if a["dtype"] == dtype]
        for run in runs:
            steps = range(1, len(run["fused"]) + 1)
            # Where two runs are equal to the bit there is nothing to draw on a logarithmic axis.
            spread, difference = ([value or float("nan") for value in run[key]] for key in ("spread", "nearest"))
            axes.plot(steps, spread, color=colour, alpha=0.3, linewidth=4, solid_capstyle="round")
            axes.plot(steps, difference, color=colour, linewidth=1.3)
        if runs:
            label(axes, steps[-1], max(run["spread"][-1] for run in runs), dtype, colour)
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 1e2)
    axes.set_title("the same training, fused and reference")
    axes.set_xlabel("training step")
    axes.set_ylabel("largest difference of the loss so far")
    axes.plot([], [], color=GREY, linewidth=1.3, label=f"fused on {agreements[0]['kernels']} - nearest reference run")
    axes.plot([], [], color=GREY, linewidth=4, alpha=0.3, label="reference - reference, sums in other orders")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
