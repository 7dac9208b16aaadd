"""Times of single nodes on a GPU: ours, eager PyTorch and torch.compile, forward, backward and both.

The variants take turns within a repetition, so that they meet the same clocks; a node's inputs rotate where they would
stay in the L2 cache; work is queued behind a wait on the GPU, so that it is the GPU that is timed and not the host that
launches. Medians are reported. GB/s is of the least bytes that two-phase kernels must move, whatever was moved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter

import torch
from nodes import NORM_ADD_NORM_RELU, NORM_ADD_RELU, NORM_RELU, Node
from problems import Problem, problem
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from resfused import functional, reference

PHASES = ("forward", "backward", "both")
OURS, EAGER, COMPILED = "resfused", "eager", "torch.compile"
# Passes over an activation: x twice, s, y / dy and x twice, dx, ds; the mask is a bit an element.
LEAST_PASSES = {NORM_RELU: (3, 5), NORM_ADD_RELU: (4, 6), NORM_ADD_NORM_RELU: (5, 8)}
MASKED = (NORM_ADD_RELU,)
# Input sets of a node together exceed any L2 cache.
ROTATED_BYTES = 2**29
# Long enough for the host to queue a node behind it.
WAIT_CYCLES = 1_000_000


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
    rotation = max(1, ROTATED_BYTES // (3 * size)) if device.type == "cuda" else 1
    problems = [problem(node.form, shape, dtype, layout, device) for _ in range(min(rotation, repetitions))]
    name = str(dtype).removeprefix("torch.")
    timings = []
    for phase in PHASES:
        calls = {variant: [_call(p, library, phase) for p in problems] for variant, library in variants.items()}
        samples = _interleaved(calls, repetitions, device)
        timings.append(Timing(node, batch, name, layout, phase, samples))
    return timings


def _call(p: Problem, library: object, phase: str) -> Callable[[], object]:
    if phase == "forward":
        return lambda: p.forward(library)
    if phase == "both":
        return lambda: p.backward(p.forward(library))
    y = p.forward(library)
    return lambda: p.backward(y, retain_graph=True)


def _interleaved(
    calls: dict[str, list[Callable[[], object]]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of every repetition; the first three of each variant warm up and are dropped."""
    warm_up = 3
    timed: dict[str, list[Callable[[], float]]] = {variant: [] for variant in calls}
    for repetition in range(warm_up + repetitions):
        for variant, rotated in calls.items():
            elapsed = _timed(rotated[repetition % len(rotated)], device)
            if repetition >= warm_up:
                timed[variant].append(elapsed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {variant: [elapsed() for elapsed in each] for variant, each in timed.items()}


def _timed(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Runs the call; what is returned tells its milliseconds once the device has caught up."""
    if device.type != "cuda":
        start = perf_counter()
        call()
        milliseconds = (perf_counter() - start) * 1e3
        return lambda: milliseconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT_CYCLES)
    first.record()
    call()
    last.record()
    return lambda: first.elapsed_time(last)


def copy_bandwidth(device: torch.device, repetitions: int = 20) -> float:
    """GB/s of a device-to-device copy of 1 GiB (16 MiB on a CPU), bytes read and written."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    samples = _interleaved({"copy": [lambda: target.copy_(source)]}, repetitions, device)["copy"]
    return 2 * size / median(samples) / 1e6


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
