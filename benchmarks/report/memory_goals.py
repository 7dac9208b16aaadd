"""What training steps are held to in memory, and in time for it, on a CPU with two threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from measure.network_timing import AGAIN_IN_THE_BACKWARD, EAGER, FLOAT, OURS
from measure.step_memory import DENSENET, EFFICIENTNET, FASTER_RCNN, MOBILENET, RESNET50
from record.results import Results, StepMemory

from report.goals import Goal, Reached

BATCH, PIXELS = 16, 160


class _Held(NamedTuple):
    """The most of eager's live bytes by way, and of another way's time."""

    network: str
    live: dict[str, float]
    time: tuple[str, float, str]
    """Of a way, how many times that of another."""


_HELD = (
    _Held(RESNET50, {OURS: 1.0, AGAIN_IN_THE_BACKWARD: 0.8}, (AGAIN_IN_THE_BACKWARD, 1.05, OURS)),
    _Held(MOBILENET, {OURS: 0.69, AGAIN_IN_THE_BACKWARD: 0.37}, (AGAIN_IN_THE_BACKWARD, 1.0, EAGER)),
    _Held(EFFICIENTNET, {OURS: 0.72, AGAIN_IN_THE_BACKWARD: 0.45}, (AGAIN_IN_THE_BACKWARD, 1.05, EAGER)),
    _Held(DENSENET, {OURS: 1.0, AGAIN_IN_THE_BACKWARD: 0.5}, (AGAIN_IN_THE_BACKWARD, 1.0, EAGER)),
    _Held(FASTER_RCNN, {OURS: 0.9}, (OURS, 1.0, EAGER)),
)


class _Figure(NamedTuple):
    of: Callable[[StepMemory], float]
    unit: str


_LIVE, _TIME = _Figure(lambda t: t.live_bytes / 1e6, "MB"), _Figure(lambda t: t.milliseconds, "ms")


def _ratio(network: str, way: str, other: str, figure: _Figure) -> Callable[[Results], Reached | None]:
    """Of the smallest images that were measured."""

    def measure(results: Results) -> Reached | None:
        steps = [t for t in results.of(StepMemory) if (t.network, t.batch, t.dtype) == (network, BATCH, FLOAT)]
        size = min((t.image_size for t in steps if t.image_size >= PIXELS), default=None)
        by_way = {t.variant: figure.of(t) for t in steps if t.image_size == size}
        if not {way, other} <= by_way.keys():
            return None
        ours, others = by_way[way], by_way[other]
        return Reached(ours / others, f"{ours:,.1f} of {others:,.1f} {figure.unit}, {size}x{size}")

    return measure


def _goals(held: _Held) -> list[Goal]:
    setting = f"{held.network} training step, {FLOAT}, batch {BATCH}"
    way, factor, other = held.time
    return [
        *(
            Goal(
                f"{setting}: bytes alive after the forward of {kept} over eager's", most,
                _ratio(held.network, kept, EAGER, _LIVE), at_most=True,
            )
            for kept, most in held.live.items()
        ),
        Goal(
            f"{setting}: time of {way} over that of {other}", factor,
            _ratio(held.network, way, other, _TIME), at_most=True,
        ),
    ]  # fmt: skip


GOALS = tuple(goal for held in _HELD for goal in _goals(held))
