"""Goals, and what was reached of them: a row a goal, from measurements; and those for an H200."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from measure import network_timing as networks
from measure import variants as nodes
from measure.network_timing import RESNET50, TRAINING
from record.results import KernelTime, NetworkTime, NodeTime, OfANode, Results
from workloads.nodes import NETWORKS
from workloads.passes import BOTH

GPU = "NVIDIA H200"
BATCH, SMALL_BATCH = 256, 32
# Of ResNet-50 at 224x224; the stem's is before them.
STAGES_1_TO_3 = (56, 28, 14)
HALF = "bfloat16"


class Reached(NamedTuple):
    """``detail``: what the figure was reached by, or where."""

    figure: float
    detail: str = ""


@dataclass(frozen=True)
class Goal:
    """``bound``: the figure must be at least that or, with ``at_most``, at most."""

    what: str
    bound: float
    measure: Callable[[Results], Reached | None]
    unit: str = "x"
    at_most: bool = False

    def met(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:,g}{self.unit}"


def row(goal: Goal, results: Results | None) -> tuple[str, str, str, str]:
    """(figure, goal, reached, met) in words."""
    reached = goal.measure(results) if results is not None else None
    if reached is None:
        return goal.what, goal.wanted, "not measured yet", ""
    figure = f"{reached.figure:,.0f}" if reached.figure >= 100 else f"{reached.figure:.3g}"
    detail = f" ({reached.detail})" if reached.detail else ""
    return goal.what, goal.wanted, f"{figure}{goal.unit}{detail}", "yes" if goal.met(reached.figure) else "no"


def ratios(times: Iterable[NodeTime], other: str) -> dict[tuple[str, str, int, str], float]:
    """How many times as long ``other`` takes as ours, by (form, shape, batch, phase) where both were timed."""
    by_variant: dict[str, dict[tuple[str, str, int, str], float]] = {nodes.OURS: {}, other: {}}
    for t in times:
        if t.variant in by_variant:
            by_variant[t.variant][t.form, t.shape, t.batch, t.phase] = t.milliseconds
    ours, others = by_variant[nodes.OURS], by_variant[other]
    return {key: others[key] / ours[key] for key in ours if key in others}


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def of_resnet50(t: OfANode) -> bool:
    shapes = {(n.form, n.channels, n.height, n.width) for n in NETWORKS["resnet50"]().nodes}
    return (t.form, t.channels, t.height, t.width) in shapes


def _node_times(results: Results, batch: int, dtype: str, cuda_graph: bool = False) -> list[NodeTime]:
    return [
        t
        for t in results.of(NodeTime)
        if of_resnet50(t)
        and (t.layout, t.batch, t.dtype, t.cuda_graph, t.phase) == ("channels_last", batch, dtype, cuda_graph, BOTH)
    ]


def _slowest_kernel(results: Results) -> Reached | None:
    found = [
        t for t in results.of(KernelTime)
        if of_resnet50(t) and t.layout == "channels_last" and t.batch == BATCH and t.dtype == HALF
        and t.height in STAGES_1_TO_3
    ]  # fmt: skip
    if not found:
        return None
    slowest = min(found, key=lambda t: t.of_copy)
    return Reached(slowest.of_copy, f"{slowest.kernel} of {slowest.form} {slowest.shape}")


def _node_mean(*others: str, dtype: str = HALF) -> Callable[[Results], Reached | None]:
    """Against the fastest of ``others`` by their own means."""

    def measure(results: Results) -> Reached | None:
        times = _node_times(results, BATCH, dtype)
        means = {other: geometric_mean(ratios(times, other).values()) for other in others}
        found = [(mean, other) for other, mean in means.items() if mean is not None]
        if not found:
            return None
        mean, other = min(found)
        return Reached(mean, f"{len(ratios(times, other))} nodes, {other}")

    return measure


def _slower_than_eager(results: Results) -> Reached | None:
    found = ratios(_node_times(results, SMALL_BATCH, HALF, cuda_graph=True), nodes.EAGER)
    if not found:
        return None
    form, shape, *_ = min(found, key=lambda key: found[key])
    worst = min(found.values())
    return Reached(sum(ratio < 1 for ratio in found.values()), f"of {len(found)}; least {worst:.2f}x, {form} {shape}")


def _training(results: Results, batch: int, dtype: str) -> dict[str, NetworkTime]:
    """ResNet-50's training steps, by variant."""
    wanted = (RESNET50, TRAINING, batch, dtype)
    return {t.variant: t for t in results.of(NetworkTime) if t.workload == wanted}


def _fastest(steps: dict[str, NetworkTime], ways: Iterable[str]) -> NetworkTime | None:
    return min((steps[way] for way in ways if way in steps), key=lambda t: t.milliseconds, default=None)


_OURS = (networks.OURS, networks.OURS_GRAPH, networks.OURS_COMPILED)
_COMPILED = (networks.COMPILED, networks.AUTOTUNED)


def step_speedup(*others: str, batch: int = BATCH, dtype: str = HALF) -> Callable[[Results], Reached | None]:
    """Of the fastest of ours over the fastest of ``others``."""

    def measure(results: Results) -> Reached | None:
        steps = _training(results, batch, dtype)
        ours, other = _fastest(steps, _OURS), _fastest(steps, others)
        if ours is None or other is None:
            return None
        return Reached(other.milliseconds / ours.milliseconds, f"{ours.variant} against {other.variant}")

    return measure


def _images(results: Results) -> Reached | None:
    ours = _fastest(_training(results, BATCH, HALF), _OURS)
    return None if ours is None else Reached(ours.images_s, ours.variant)


def _memory(results: Results) -> Reached | None:
    steps = _training(results, BATCH, HALF)
    ours, eager = steps.get(networks.OURS), steps.get(networks.EAGER)
    if ours is None or eager is None or ours.peak_bytes is None or eager.peak_bytes is None:
        return None
    return Reached(ours.peak_bytes / eager.peak_bytes, f"{ours.peak_bytes / 1e9:.1f} GB")


GOALS = (
    Goal("achieved / copy bandwidth, the slowest streaming kernel of ResNet-50's stages 1 to 3, batch 256", 0.92,
         _slowest_kernel, unit=""),
    Goal("nodes of ResNet-50, forward + backward, batch 256, bfloat16, geometric mean against eager", 2.5,
         _node_mean(nodes.EAGER)),
    Goal("the same against torch.compile, the better of its modes", 1.4,
         _node_mean(nodes.COMPILED, nodes.AUTOTUNED)),
    Goal("the same in float16 against cuDNN's fused graph", 1.1, _node_mean("cuDNN graph", dtype="float16")),
    Goal("ResNet-50 training step, batch 256, against eager", 1.6, step_speedup(networks.EAGER)),
    Goal("the same against torch.compile, the better of its modes", 1.2, step_speedup(*_COMPILED)),
    Goal("ResNet-50 training, batch 256, images per second", 6900, _images, unit=""),
    Goal("peak memory of that step / eager's", 1.02, _memory, at_most=True),
    Goal("nodes of ResNet-50 at batch 32 in a CUDA graph that are slower than eager", 0,
         _slower_than_eager, unit="", at_most=True),
)  # fmt: skip
