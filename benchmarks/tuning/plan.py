"""What a search of the launch table compares, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resfused.kernels.gpu import launch_file
from workloads.nodes import FORMS, Node

from tuning.directions import Case
from tuning.places import NUMBERS, SWITCHES, Number, OneLaunchLimit, Switch
from tuning.search import Step

PARTS = TILES, ONE_LAUNCH, ORDER = ("tiles", "one-launch", "order")
DIRECTIONS = {"forward": ("normalise", "statistics"), "backward": ("reduce", "apply")}
# A one-launch kernel's rows follow the L2 cache where they must be short, and it compiles slowest.
TICKETED_NUMBERS = ("elements", "warps", "stages", "programs")
SHORT_NODES = [Node(form, 8, 4, 4, 1, forked=form == FORMS[1]) for form in FORMS]


@dataclass(frozen=True)
class Stage:
    """Steps whose first candidates are compiled together."""

    title: str
    steps: Sequence[Step]


def plan(
    table: Any, cases: Sequence[Case], layouts: Sequence[str], parts: Sequence[str], kernels: Sequence[str],
    numbers: Sequence[str] = NUMBERS,
) -> list[Stage]:  # fmt: skip
    """The stages, the largest expected gains first; entries that changed are searched a second time in the last."""

    def of(layout: str, direction: str) -> list[Case]:
        return [case for case in cases if (case.layout, case.direction) == (layout, direction)]

    stages = []
    for layout in layouts:
        for direction in DIRECTIONS:
            if TILES in parts:
                streaming = _streaming(table, of(layout, direction), layout, direction, kernels, numbers)
                stages.append(Stage(f"{direction}, {layout}", streaming))
        for direction in DIRECTIONS:
            steps: list[Step] = []
            if TILES in parts and direction in kernels:
                steps += [
                    Number(direction, layout, None, number, of(layout, direction))
                    for number in TICKETED_NUMBERS
                    if number in numbers
                ]
            if ONE_LAUNCH in parts:
                steps.append(OneLaunchLimit(direction, layout, of(layout, direction)))
            stages.append(Stage(f"{direction} in one launch, {layout}", steps))
        if ORDER in parts and layout == layouts[0]:
            stages.append(Stage("order and hints", _switches(cases)))
    again = [_repeated(step) for stage in stages for step in stage.steps if isinstance(step, Number)]
    return [stage for stage in (*stages, Stage("changed entries again", again)) if stage.steps]


def _streaming(
    table: Any, cases: Sequence[Case], layout: str, direction: str, kernels: Sequence[str], numbers: Sequence[str]
) -> list[Step]:
    """One step for each number of each entry that serves one of the cases."""
    steps: list[Step] = []
    for kernel in [kernel for kernel in DIRECTIONS[direction] if kernel in kernels]:
        limits = [limit for limit, _ in table.streaming[kernel, launch_file.LAYOUTS[layout]]]
        for index in reversed(range(len(limits))):
            served = [case for case in cases if _class_of(case, limits) == index]
            steps += [Number(kernel, layout, index, number, served) for number in numbers if served]
    return steps


def _class_of(case: Case, limits: Sequence[int | None]) -> int:
    return next(i for i, limit in enumerate(limits) if limit is None or case.geometry.numel <= limit)


def _switches(cases: Sequence[Case]) -> list[Step]:
    """Only channels_last tensors have an order of channel blocks to choose."""
    return [
        Switch(name, [case for case in cases if name != "channel_major" or case.layout == "channels_last"])
        for name in SWITCHES
    ]


def _repeated(step: Number) -> Number:
    return replace(step, repeated=True)


def cases_of(nodes: Iterable[Node], batches: Sequence[int], dtype: str, layouts: Sequence[str]) -> list[Case]:
    """Both directions of every node, without those that are walked by columns: they take the other layout's entries."""
    nodes = list(nodes)
    found = [
        Case(direction, node, batch, dtype, layout)
        for layout in layouts
        for direction in DIRECTIONS
        for batch in batches
        for node in nodes
    ]
    return [case for case in found if case.geometry.plane == 1]
