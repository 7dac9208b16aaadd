"""What a launch is by its machine code, and what it and a ResNet-50's step are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workloads.nodes import FORMS, resnet50_nodes

from count.ceilings import KIB, Ceiling

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
BATCH = 256
RESNET50 = tuple(dict.fromkeys((BATCH, n.channels, n.height, n.width) for n in resnet50_nodes()))


@dataclass(frozen=True)
class Loop:
    """The inner loop of a streaming kernel on one multiprocessor. Instructions and bytes are an element's.

    ``loaded``: activations; ``programs``: that are resident; ``waves``: of the grid; ``fills``: whether there are as
    many programs as tiles, so that the last wave can be no fuller.
    ``in_flight``: bytes of loads before the first use of one; ``round_trips``: waits for memory, a step.
    """

    elements: float
    loaded: int
    instructions: float
    pipes: dict[str, float]
    moved: float
    programs: int
    waves: float
    last_wave: float
    fills: bool
    in_flight: int
    round_trips: float
    arithmetic: Ceiling
    ceilings: dict[str, Ceiling]


@dataclass(frozen=True)
class Row:
    """One launch. Widths are in bits; ``narrowest`` is that of the accesses to activations.

    ``available``: bytes of activations that there are to load, of a multiprocessor. ``loop``: of a streaming kernel.
    """

    architecture: str
    kernel: str
    form: str
    phase: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    hash: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    float_atomics: int
    float64: int
    narrowest: int
    least_width: int
    offset_bits: int
    available: int
    loop: Loop | None

    @property
    def place(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.architecture} {self.kernel} ({self.form}, {self.phase}, {self.dtype}, {self.layout}, {shape})"


class Budget(NamedTuple):
    """``figure``: of a row, None where the budget is not about it; ``most``: whether it may be at most the bound."""

    what: str
    figure: Callable[[Row], float | None]
    bound: float
    most: bool = True

    def keeps(self, figure: float) -> bool:
        return figure <= self.bound if self.most else figure >= self.bound

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.most else '>='} {self.bound:g}"


def _aimed_at(row: Row) -> bool:
    return row.architecture == "sm_90" and row.dtype == "bfloat16" and row.shape in RESNET50


def _goal(figure: Callable[[Row, Loop], float | None]) -> Callable[[Row], float | None]:
    """Of streaming kernels on ResNet-50's activations and with its ReLU, for which the figures are set."""

    def of(row: Row) -> float | None:
        return figure(row, row.loop) if _aimed_at(row) and row.form in FORMS and row.loop is not None else None

    return of


def _statistics(norms: int) -> Callable[[Row], float | None]:
    def instructions(row: Row, loop: Loop) -> float | None:
        two = "+add(norm)" in row.form
        return loop.instructions / loop.loaded if row.kernel == "statistics" and two == (norms == 2) else None

    return _goal(instructions)


def _in_flight(row: Row, loop: Loop) -> float | None:
    """A small tensor need not have more than there is of it."""
    return loop.in_flight / KIB if loop.in_flight < row.available else None


def _last_wave(row: Row, loop: Loop) -> float | None:
    return None if loop.fills and loop.waves < 1 else loop.last_wave


ALWAYS = (
    Budget("bytes or registers spilled", lambda row: row.spilled, 0),
    Budget("bits missing in the narrowest access to an activation", lambda row: row.least_width - row.narrowest, 0),
    Budget("floating-point atomics", lambda row: row.float_atomics, 0),
    Budget("float64 instructions for narrower activations", lambda row: row.float64 * (row.dtype != "float64"), 0),
    Budget("bits of the offsets of activations", lambda row: row.offset_bits, 64, most=False),
    Budget("blocks of the grid, of what there may be",
           lambda row: max(n / most for n, most in zip(row.grid, MOST_BLOCKS, strict=False)), 1),
)  # fmt: skip
GOALS = (
    Budget("statistics of one norm: instructions an element", _statistics(1), 6),
    Budget("statistics of two norms: instructions a norm's element", _statistics(2), 7),
    Budget("TB/s that issue and pipes allow", _goal(lambda row, loop: loop.arithmetic.bandwidth), 8, most=False),
    Budget("KiB in flight a multiprocessor before the first use", _goal(_in_flight), 48, most=False),
    Budget("registers of a thread", _goal(lambda row, loop: row.registers), 128),
    Budget("how full the last wave is", _goal(_last_wave), 0.9, most=False),
)  # fmt: skip
# With another activation: the registers of a thread and the instructions of an element, as they are.
OTHERS = {
    ("norm+silu", "normalise"): (48, 15), ("norm+silu", "reduce"): (96, 23), ("norm+silu", "apply"): (96, 23.5),
    ("norm+add+silu", "normalise"): (56, 18.5), ("norm+add+silu", "reduce"): (96, 27),
    ("norm+add+silu", "apply"): (64, 12),
    ("norm+add+relu6", "normalise"): (64, 20.5), ("norm+add+relu6", "reduce"): (72, 17),
    ("norm+add+relu6", "apply"): (64, 12),
    ("norm+add(norm)+identity", "normalise"): (80, 17.5), ("norm+add(norm)+identity", "reduce"): (96, 17),
    ("norm+add(norm)+identity", "apply"): (128, 21.5),
}  # fmt: skip


def _of_others(figure: Callable[[Row, Loop], float], which: int) -> Callable[[Row], float | None]:
    """Of what ``OTHERS`` allows."""

    def of(row: Row) -> float | None:
        allowed = OTHERS.get((row.form, row.kernel))
        if allowed is None or row.loop is None or not _aimed_at(row):
            return None
        return figure(row, row.loop) / allowed[which]

    return of


OTHER_GOALS = (
    Budget("registers of a thread with another activation, of its own", _of_others(lambda row, _: row.registers, 0), 1),
    Budget("instructions an element with another activation, of its own",
           _of_others(lambda _, loop: loop.instructions, 1), 1),
)  # fmt: skip
BUDGETS = ALWAYS + GOALS + OTHER_GOALS
LAUNCHES, KERNELS = 196, 20


def violations(row: Row, budgets: Sequence[Budget] = BUDGETS) -> list[str]:
    """The budgets that a launch breaks."""
    figures = [(b, b.figure(row)) for b in budgets]
    return [f"{b.what}: {n:.3g}, not {b.wanted}" for b, n in figures if n is not None and not b.keeps(n)]


def worst(budget: Budget, rows: list[Row]) -> tuple[float, Row] | None:
    """The figure that is furthest on the wrong side, and whose it is."""
    figures = [(figure, row) for row in rows if (figure := budget.figure(row)) is not None]
    return (max if budget.most else min)(figures, key=lambda pair: pair[0], default=None)


class StepCount(NamedTuple):
    """What a training step of ResNet-50 at batch 256 launches, and compiles before."""

    architecture: str
    layout: str
    launches: int
    kernels: int

    @property
    def counts(self) -> list[tuple[str, int, int]]:
        """(what, how many, at most)"""
        return [("launches", self.launches, LAUNCHES), ("kernels compiled", self.kernels, KERNELS)]


def full(waves: float) -> float:
    """How full the last of so many waves is."""
    return waves - math.ceil(waves) + 1
