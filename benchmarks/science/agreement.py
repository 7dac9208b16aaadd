"""Whole trainings of one network with reference blocks and with fused ones: do they go the same way?

Training is chaotic: two runs that differ in a rounding drift apart step by step, and part where a ReLU's input falls to
the one side of zero or to the other. What a fused run may differ by is therefore what runs of the reference differ by
among themselves when only the order of summation changes: the images of each batch are shuffled, which changes no sum
but its order. And it is held against the reference run that parted the same way, the one nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training.images import Images

import resfused
from science import figures
from science.records import Content, rounded
from science.session import INTERPRETED, KERNELS, SHORT, Session, Source, placed
from science.training import Curve, Recipe, as_it_is, reordered, train

Make = Callable[[Images], nn.Module]
SAME_TRAINING = "same_training"

# Runs of the reference with shuffled batches, beside the one in the order that the fused run takes; and where a
# training is long.
SHUFFLED_RUNS, SHUFFLED_LONG_RUNS = 16, 4
DTYPES = (torch.float64, torch.float32)
# A whole training that Triton's interpreter gets through.
QUICK = Recipe(1, 4, 0.1, warm_up=4, steps=16)
TINY = replace(QUICK, batch_size=2, steps=2)


@dataclass(frozen=True)
class Comparison:
    """``reference`` and ``fused`` make the same network, always with the same weights."""

    network: str
    reference: Make
    fused: Make
    recipe: Recipe
    source: Source
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Agreement:
    """One training's losses, of the fused network and of the reference in several orders of summation.

    ``reference[0]`` has taken the batches as ``fused`` has. ``kernels``: a GPU's, or interpreted ones, whose time says
    nothing about their speed.
    """

    network: str
    dtype: str
    batch_size: int
    kernels: str
    reference: list[list[float]]
    fused: list[float]
    reference_ms: float
    fused_ms: float

    @property
    def difference(self) -> list[float]:
        """|fused - reference[0]|: the largest up to each step."""
        return self._distance_to(self.reference[0])

    @property
    def nearest(self) -> list[float]:
        """The same for the reference run from which the fused one differs least over the whole training."""
        return min(map(self._distance_to, self.reference), key=lambda distance: distance[-1])

    @property
    def spread(self) -> list[float]:
        """The largest difference of any two reference runs up to each step."""
        return _largest_so_far([max(losses) - min(losses) for losses in zip(*self.reference, strict=True)])

    @property
    def allowed(self) -> float:
        """What ``nearest`` may be: the spread, and the last bit of the loss itself."""
        last_bit = torch.finfo(getattr(torch, self.dtype)).eps * max(map(abs, self.reference[0]))
        return self.spread[-1] + last_bit

    @property
    def within(self) -> bool:
        """Over the whole training."""
        return self.nearest[-1] <= self.allowed

    def _distance_to(self, losses: list[float]) -> list[float]:
        return _largest_so_far([abs(a - b) for a, b in zip(self.fused, losses, strict=True)])


def comparisons(networks: Mapping[str, tuple[Make, ...]], recipe: Recipe, session: Session) -> list[Comparison]:
    """Of networks by name, (reference, fused), in both precisions; a short session has one."""
    return [
        Comparison(name, reference, fused, recipe, session.source, session.device, dtype)
        for dtype in (DTYPES[:1] if session.size == SHORT else DTYPES)
        for name, (reference, fused) in networks.items()
    ]


def compare(c: Comparison) -> Agreement:
    """Trains the reference several times and the fused network once, from the same weights, on seed 0's images."""
    images = c.source.load(0)

    def reference(shuffle: int) -> Curve:
        network = placed(c.reference(images), c.device, c.dtype)
        return train(network, images, c.recipe, c.device, c.dtype, reordered(shuffle) if shuffle else as_it_is)

    shuffled = SHUFFLED_LONG_RUNS if c.recipe.steps is None else SHUFFLED_RUNS
    references = [reference(shuffle) for shuffle in range(1 + shuffled)]
    network = c.fused(images)
    network.load_state_dict(c.reference(images).state_dict())
    with resfused.use_backend("triton"):
        curve = train(placed(network, c.device, c.dtype), images, c.recipe, c.device, c.dtype)
    return Agreement(
        c.network,
        str(c.dtype).removeprefix("torch."),
        c.recipe.batch_size,
        KERNELS if c.device.type == "cuda" else INTERPRETED,
        [each.losses for each in references],
        curve.losses,
        references[0].milliseconds_per_step,
        curve.milliseconds_per_step,
    )


def _largest_so_far(values: list[float]) -> list[float]:
    return list(accumulate(values, max))


def as_record(a: Agreement) -> Content:
    """Everything raw, with what follows from it, for a result file."""
    derived = {key: rounded(getattr(a, key), 3) for key in ("difference", "nearest", "spread")}
    return {**asdict(a), **derived, "allowed": a.allowed, "within": a.within}


HEADINGS = ("network", "precision", "steps", "fused - same order", "fused - nearest",
            "reference - reference",
            "ms a step, fused / reference", "")  # fmt: skip


def summary(records: list[Content]) -> list[list[str]]:
    """Rows of the table: the largest differences of the loss over the whole training."""
    return [
        [
            f"{a['network']}, batches of {a['batch_size']}", a["dtype"], str(len(a["fused"])),
            f"{a['difference'][-1]:.1e}", f"{a['nearest'][-1]:.1e}", f"{a['spread'][-1]:.1e}",
            f"{a['fused_ms']:.1f} / {a['reference_ms']:.1f}",
            "within" if a["within"] else "OUTSIDE",
        ]
        for a in records
    ]  # fmt: skip


def title(records: list[Content]) -> str:
    where = records[0]["kernels"]
    note = "" if where == KERNELS else " (whose time says nothing about their speed)"
    return f"Differences of the loss over a whole training, fused blocks on {where}{note}"


def draw(by_experiment: Mapping[str, Content], folder: Path) -> Path:
    """Every training that was compared: how far runs have come apart, step by step, a panel a network."""
    runs = [(name, run) for name, content in by_experiment.items() for run in content["agreements"]]
    networks = list(dict.fromkeys((name, run["network"]) for name, run in runs))
    within = sum(run["within"] for _, run in runs)
    title = (
        f"{within} of {len(runs)} fused trainings stay as near to a reference training as such trainings stay to "
        "each other"
    )
    columns = min(4, len(networks))
    rows = -(-len(networks) // columns)
    figure, axes = figures.panels(rows, columns, 3.4 * columns, 3.4 * rows + 0.4, title, sharey=True)
    for panel, (name, network) in zip(axes.flat, networks, strict=False):
        for of, run in runs:
            if (of, run["network"]) == (name, network):
                _draw_run(panel, run)
        panel.set_yscale("log")
        panel.set_ylim(1e-17, 1)
        panel.set_title(f"{name.replace('_', ' ')}:\n{network}")
        panel.set_xlabel("training step")
    for row in axes:
        row[0].set_ylabel("largest difference of the loss so far")
    for panel in axes.flat[len(networks) :]:
        panel.axis("off")
    return figures.save(figure, folder, SAME_TRAINING)


def _draw_run(axes: Any, run: Content) -> None:
    """Of one network in one precision."""
    colour = figures.VERMILION if run["dtype"] == "float32" else figures.BLUE
    steps = range(1, len(run["fused"]) + 1)
    # Where two runs are equal to the bit there is nothing to draw on a logarithmic axis.
    spread, nearest = ([value or math.nan for value in run[key]] for key in ("spread", "nearest"))
    axes.plot(steps, spread, color=colour, alpha=0.3, linewidth=4, solid_capstyle="round")
    axes.plot(steps, nearest, color=colour, linewidth=1.3)
    texts = (run["spread"], f"{run['dtype']}: reference runs in other orders", 5, "bottom"), (
        run["nearest"], "fused", -5, "top",
    )  # fmt: skip
    for line, text, shift, side in texts:
        if line[-1]:
            axes.annotate(text, (steps[-1], line[-1]), xytext=(0, shift), textcoords="offset points", color=colour,
                          ha="right", va=side, fontsize=8.5)  # fmt: skip
