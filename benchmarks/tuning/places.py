"""Where a launch table can be changed: a number of an entry, the size up to which one launch pays, a switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resfused.kernels.gpu.launch_file import LAYOUTS, Entry

from tuning.directions import Case
from tuning.search import Comparison, Step

NUMBERS = ("elements", "warps", "inner", "stages", "programs")
VALUES: dict[str, tuple[int, ...]] = {
    "elements": (512, 1024, 2048, 4096),
    "warps": (2, 4, 8),
    "inner": (32, 64, 128, 256),
    "stages": (1, 2, 3, 4),
}
# As many as a multiprocessor holds is right for the registers that the present tile takes: searched beside it.
PROGRAMS = (0.5, 2)
SWITCHES = ("second_phase_reversed", "second_phase_evicts_first", "channel_major")
ONE_LAUNCH = "one launch"


def neighbours(entry: Entry, number: str) -> dict[str, Entry]:
    """Entries with another value of one number, by that value."""
    present = getattr(entry, number)
    values = [int(present * factor) for factor in PROGRAMS] if number == "programs" else VALUES[number]
    varied = [entry._replace(**{number: value}) for value in values if value not in (present, 0)]
    return {str(getattr(each, number)): each for each in varied if each.inner <= each.elements}


@dataclass(frozen=True)
class Number(Step):
    """One number of an entry: a streaming kernel's, for a class of sizes, or (``index`` None) a one-launch kernel's."""

    kernel: str
    layout: str
    index: int | None
    number: str
    cases: Sequence[Case]
    repeated: bool = False

    @property
    def entry(self) -> str:
        if self.index is None:
            return f"ticketed.{self.kernel}.{self.layout}"
        return f"streaming.{self.kernel}.{self.layout}[{self.index}]"

    @property
    def name(self) -> str:
        return f"{self.entry}.{self.number}"

    def vary(self, table: Any) -> dict[str, Any]:
        return {name: self._with(table, entry) for name, entry in neighbours(self._entry(table), self.number).items()}

    def value(self, table: Any) -> str:
        return str(getattr(self._entry(table), self.number))

    def timed(self, table: Any) -> Any:
        """With the launches forced that the kernel belongs to."""
        return table._replace(one_launch_elements=dict.fromkeys(table.ticketed, None if self.index is None else 0))

    @property
    def _key(self) -> tuple[str, bool]:
        return self.kernel, LAYOUTS[self.layout]

    def _entry(self, table: Any) -> Entry:
        return table.ticketed[self._key] if self.index is None else table.streaming[self._key][self.index][1]

    def _with(self, table: Any, entry: Entry) -> Any:
        if self.index is None:
            return table._replace(ticketed={**table.ticketed, self._key: entry})
        classes = list(table.streaming[self._key])
        classes[self.index] = classes[self.index][0], entry
        return table._replace(streaming={**table.streaming, self._key: tuple(classes)})


@dataclass(frozen=True)
class OneLaunchLimit(Step):
    """The largest node of a direction and a layout that one launch serves faster than two."""

    direction: str
    layout: str
    cases: Sequence[Case]

    @property
    def entry(self) -> str:
        return f"one_launch_elements.{self.direction}.{self.layout}"

    @property
    def name(self) -> str:
        return self.entry

    def vary(self, table: Any) -> dict[str, Any]:
        return {ONE_LAUNCH: self._with(table, None)}

    def value(self, table: Any) -> str:
        return str(table.one_launch_elements[self._key])

    def variants(self, table: Any) -> dict[str, Any]:
        """Two launches, twice, and one, whatever the table says."""
        found = super().variants(table)
        return {name: each if name == ONE_LAUNCH else self._with(each, 0) for name, each in found.items()}

    def choose(self, table: Any, comparison: Comparison) -> tuple[Any, float] | None:
        """The limit that makes the least of the mean of all cases, each served as it says."""
        if ONE_LAUNCH not in comparison.medians:
            return None
        sizes = [case.geometry.numel for case in self.cases]
        present = table.one_launch_elements[self._key]
        # No limit lies above what was measured, unless it already did.
        limits = [present, 0, *sorted(set(sizes))]
        best = min(limits, key=lambda limit: self._cost(limit, sizes, comparison))
        costs = (self._cost(limit, sizes, comparison) for limit in (present, best))
        gain = math.exp(next(costs) - next(costs)) - 1
        return None if gain <= comparison.noise else (self._with(table, best), gain)

    def _cost(self, limit: int | None, sizes: Sequence[int], comparison: Comparison) -> float:
        """The mean of the logarithms of the times."""
        one, separate = comparison.medians[ONE_LAUNCH], comparison.present
        served = [one[i] if limit is None or size <= limit else separate[i] for i, size in enumerate(sizes)]
        weighted = sum(w * math.log(time) for w, time in zip(comparison.weights, served, strict=True))
        return weighted / sum(comparison.weights)

    @property
    def _key(self) -> tuple[str, bool]:
        return self.direction, LAYOUTS[self.layout]

    def _with(self, table: Any, limit: int | None) -> Any:
        return table._replace(one_launch_elements={**table.one_launch_elements, self._key: limit})


@dataclass(frozen=True)
class Switch(Step):
    """On and off."""

    switch: str
    cases: Sequence[Case]

    @property
    def entry(self) -> str:
        return self.switch

    @property
    def name(self) -> str:
        return self.switch

    def vary(self, table: Any) -> dict[str, Any]:
        other = table._replace(**{self.switch: not getattr(table, self.switch)})
        return {self.value(other): other}

    def value(self, table: Any) -> str:
        return "on" if getattr(table, self.switch) else "off"
