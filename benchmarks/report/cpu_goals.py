"""What the library is held to on a CPU with two threads, and what was reached."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from measure import network_timing as networks
from measure.node_timing import FLOAT, HALF, TINY
from measure.variants import COMPILED, EAGER, OURS
from record.results import ITEM_BYTES, BuildTime, NodeTime, Results
from workloads.nodes import NORM_ADD_RELU
from workloads.passes import BACKWARD, BOTH, FORWARD

from report import memory_goals
from report.goals import Goal, Reached, geometric_mean, of_resnet50, ratios, step_speedup

MACHINE = "a CPU, two threads"
BATCH, STEP_BATCH = 32, 16
# Bytes of an activation between what caches hold and what is mapped anew whatever one does.
MIDDLE = (6 * 2**20, 50 * 2**20)
# By dtype and layout: the least against eager and against torch.compile.
MEANS = {
    (FLOAT, "channels_last"): (3.0, 5.0), (HALF, "channels_last"): (2.5, 4.0), (FLOAT, "contiguous"): (2.5, 4.0),
    (HALF, "contiguous"): (2.5, 4.0),
}  # fmt: skip
STEPS = {FLOAT: 1.2, HALF: 1.08}


def _nodes(results: Results, kept_mapped: bool) -> list[NodeTime]:
    return [
        t for t in results.of(NodeTime) if of_resnet50(t) and t.batch == BATCH and t.kept_mapped == kept_mapped
    ]  # fmt: skip


def _mean(dtype: str, layout: str, other: str) -> Callable[[Results], Reached | None]:
    """With the C library's default; the detail has that with memory kept mapped."""

    def measure(results: Results) -> Reached | None:
        by_memory = [
            ratios((t for t in _nodes(results, kept) if (t.dtype, t.layout, t.phase) == (dtype, layout, BOTH)), other)
            for kept in (False, True)
        ]
        mean, kept_mean = (geometric_mean(found.values()) for found in by_memory)
        if mean is None:
            return None
        kept = f"; memory kept mapped {kept_mean:.3g}x" if kept_mean is not None else ""
        return Reached(mean, f"{len(by_memory[0])} nodes{kept}")

    return measure


def _slowest(results: Results) -> Reached | None:
    """Of all dtypes, layouts and memories where both others were timed."""
    found = []
    for dtype, layout, kept in product((FLOAT, HALF), ("channels_last", "contiguous"), (False, True)):
        times = [t for t in _nodes(results, kept) if (t.dtype, t.layout) == (dtype, layout)]
        eager, compiled = ratios(times, EAGER), ratios(times, COMPILED)
        where = f"{dtype} {layout}{', memory kept mapped' if kept else ''}"
        found += [
            Reached(min(eager[key], compiled[key]), f"{phase} of {form} {shape}, {where}")
            for key in eager
            if key in compiled
            for form, shape, _, phase in [key]
        ]
    return min(found, default=None)


def _passes(phase: str) -> Callable[[Results], Reached | None]:
    """The most."""

    def measure(results: Results) -> Reached | None:
        found = [
            Reached(t.passes, f"the most of {{}}, {t.shape} {t.dtype} {t.layout}")
            for t in _nodes(results, kept_mapped=True)
            if (t.form, t.phase, t.variant) == (NORM_ADD_RELU, phase, OURS)
            and MIDDLE[0] <= t.elements * ITEM_BYTES[t.dtype] <= MIDDLE[1]
        ]
        most = max(found, default=None)
        return most and most._replace(detail=most.detail.format(len(found)))

    return measure


def _tiny(results: Results) -> Reached | None:
    times = {
        t.variant: t.milliseconds * 1e3
        for t in results.of(NodeTime)
        if (t.form, t.channels, t.height, t.width) == (TINY.form, TINY.channels, TINY.height, TINY.width)
        and (t.dtype, t.layout, t.phase, t.kept_mapped) == (FLOAT, "channels_last", BOTH, False)
    }
    if not {OURS, EAGER} <= times.keys():
        return None
    return Reached(times[OURS] / times[EAGER], f"{times[OURS]:.0f} us, eager {times[EAGER]:.0f} us")


def _build(results: Results) -> Reached | None:
    return next((Reached(t.milliseconds / 1e3) for t in results.of(BuildTime)), None)


GOALS = (
    *(
        Goal(
            f"nodes of ResNet-50, forward + backward, batch {BATCH}, {dtype} {layout}, geometric mean against {other}",
            bound, _mean(dtype, layout, other),
        )
        for (dtype, layout), bounds in MEANS.items()
        for other, bound in zip((EAGER, COMPILED), bounds, strict=True)
    ),
    Goal("the slowest single node and phase of those against the better of the two", 1.3, _slowest),
    *(
        Goal(
            f"norm + add + ReLU, {phase}, in passes of a copy, tensors of 6 to 50 MB, memory kept mapped", bound,
            _passes(phase), unit="", at_most=True,
        )
        for phase, bound in ((FORWARD, 2.6), (BACKWARD, 4.0))
    ),
    *(
        Goal(
            f"ResNet-50 training step, {dtype}, batch {STEP_BATCH}, against {other}", bound,
            step_speedup(other, batch=STEP_BATCH, dtype=dtype),
        )
        for dtype, bound in STEPS.items()
        for other in (networks.EAGER, networks.COMPILED)
    ),
    Goal("a tiny node, forward + backward, over eager's three operators", 2.0, _tiny, at_most=True),
    Goal("first build", 10, _build, unit=" s", at_most=True),
    *memory_goals.GOALS,
)  # fmt: skip
