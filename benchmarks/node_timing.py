"""Times of single nodes: ours, eager PyTorch and torch.compile, forward, backward and both.

Medians are reported. GB/s is of the least bytes that two-phase kernels must move, whatever was moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU, Node
from problems import Problem, problem
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import interleaved, rotation

from resfused import functional, reference

PHASES = ("forward", "backward", "both")
OURS, EAGER, COMPILED = "resfused", "eager", "torch.compile"
# Passes over an activation: x twice, s, y / dy and x twice, dx, ds; the mask is a bit an element.
LEAST_PASSES = {NORM_RELU: (3, 5), NORM_ADD_RELU: (4, 6), NORM_ADD_NORM_RELU: (5, 8)}
MASKED = (NORM_ADD_RELU,)


@dataclass(frozen=True)
class Timing:
    """One phase of one node: milliseconds of every repetition, by variant."""

    node: Node
    batch: int
    dtype: str
    layout: str
    phase: str
    samples: dict[str, list[float]] = field(hash=False)

    def milliseconds(self, variant: str) -> float:
        return median(self.samples[variant])

    def quantile(self, variant: str, percent: int) -> float:
        return quantiles(self.samples[variant], n=100, method="inclusive")[percent - 1]

    @property
    def least_bytes(self) -> float:
        forward, backward = LEAST_PASSES[self.node.form]
        passes = {"forward": forward, "backward": backward, "both": forward + backward}[self.phase]
        size = self.batch * self.node.elements
        # The mask is written once and read once.
        masks = 0 if self.node.form not in MASKED else 2 if self.phase == "both" else 1
        return size * (passes * getattr(torch, self.dtype).itemsize + masks / 8)

    def bandwidth(self, variant: str) -> float:
        """GB/s"""
        return self.least_bytes / self.milliseconds(variant) / 1e6


def compiled_library() -> object:
    """The composites, each compiled as it stands."""
    torch._functorch.config.donated_buffer = False  # a backward is timed many times over one graph

    class Compiled:
        batch_norm_relu = staticmethod(torch.compile(reference.batch_norm_relu, dynamic=False))
        batch_norm_add_relu = staticmethod(torch.compile(reference.batch_norm_add_relu, dynamic=False))
        batch_norm_add_batch_norm_relu = staticmethod(
            torch.compile(reference.batch_norm_add_batch_norm_relu, dynamic=False)
        )

    return Compiled


def libraries(compiled: bool) -> dict[str, object]:
    """The variants by name."""
    found: dict[str, object] = {OURS: functional, EAGER: reference}
    return {**found, COMPILED: compiled_library()} if compiled else found


def time_node(
    node: Node,
    batch: int,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    variants: dict[str, object],
    repetitions: int,
) -> list[Timing]:
    """Forward, backward and both of one node."""
    shape = (batch, node.channels, node.height, node.width)
    size = batch * node.elements * dtype.itemsize
    sets = rotation(3 * size, repetitions, device)
    problems = [problem(node.form, shape, dtype, layout, device) for _ in range(sets)]
    name = str(dtype).removeprefix("torch.")
    timings = []
    for phase in PHASES:
        calls = {variant: [_call(p, library, phase) for p in problems] for variant, library in variants.items()}
        samples = interleaved(calls, repetitions, device)
        timings.append(Timing(node, batch, name, layout, phase, samples))
    return timings


def _call(p: Problem, library: object, phase: str) -> Callable[[], object]:
    if phase == "forward":
        return lambda: p.forward(library)
    if phase == "both":
        return lambda: p.backward(p.forward(library))
    y = p.forward(library)
    return lambda: p.backward(y, retain_graph=True)


def time_nodes(
    nodes: list[Node],
    batches: list[int],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    variants: dict[str, object],
    repetitions: int,
    console: Console,
) -> list[Timing]:
    timings: list[Timing] = []
    with Progress(console=console) as progress:
        task = progress.add_task("Timing", total=len(nodes) * len(batches))
        for batch in batches:
            for node in nodes:
                progress.update(task, description=f"{node.form} {node.channels}x{node.height}x{node.width}, {batch}")
                timings += time_node(node, batch, dtype, layout, device, variants, repetitions)
                progress.advance(task)
    return timings


def table(timings: list[Timing], copy: float) -> Table:
    """ms, speed-up, GB/s of the least bytes, fraction of the copy."""
    others = [v for v in timings[0].samples if v != OURS]
    shown = Table(
        title=f"Nodes, {timings[0].dtype} {timings[0].layout}; a copy moves {copy:.0f} GB/s",
        caption="Medians. GB/s: least bytes of two-phase kernels over our time.",
    )
    for header in ("batch", "form", "C x H x W", "phase"):
        shown.add_column(header)
    headers = ["ours ms", *(f"{other} ms" for other in others), *(f"x {other}" for other in others)]
    for header in (*headers, "GB/s", "of copy"):
        shown.add_column(header, justify="right")
    for t in timings:
        ours = t.milliseconds(OURS)
        times = [t.milliseconds(other) for other in others]
        numbers = [f"{ours:.4f}", *(f"{time:.4f}" for time in times), *(f"{time / ours:.2f}" for time in times)]
        bandwidth = t.bandwidth(OURS)
        shape = f"{t.node.channels} x {t.node.height} x {t.node.width}"
        shown.add_row(
            str(t.batch), t.node.form, shape, t.phase, *numbers, f"{bandwidth:.0f}", f"{bandwidth / copy:.2f}"
        )
    return shown
