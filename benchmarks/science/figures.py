"""What the figures share: colours that colour-blind readers can tell apart, curves with their spread, files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito, "Color Universal Design", 2008.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
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


def label_ends(axes: Any, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """(y, text, colour) of curves that end at ``x``: each beside its end, apart from each other, within the axes.

    The axes' limits and scale must have been set.
    """
    left, _ = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= x]
    axes.figure.draw_without_rendering()
    texts = [axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, va="center")
             for y, text, colour in sorted(labels)]  # fmt: skip
    extents = [text.get_window_extent() for text in texts]
    points = 72 / axes.figure.dpi
    lowest = -float("inf")
    for text, extent in zip(texts, extents, strict=True):
        raised = max(0.0, lowest - extent.y0)
        text.xyann = (5, raised * points)
        lowest = extent.y1 + raised
    # So much of the width is theirs.
    share = (max(extent.width for extent in extents) + 16 / points) / axes.get_window_extent().width
    axes.set_xlim(left, left + (x - left) / (1 - share))
    axes.set_xticks(ticks)


def save(figure: Any, folder: Path, name: str) -> Path:
    """``<folder>/<name>.png``"""
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
