"""Coordinate descent over a launch table: one number of one entry at a time, taken where its gain exceeds the noise.

Every step compares some tables that differ from the present one in one place. The present one is measured twice; how
much the two differ is the noise. A gain is that of the geometric mean of the times of all cases, each as often as its
node occurs. What is measured is not known here: a ``Step`` has cases, and a function gives the times of tables.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

PRESENT, AGAIN = "present", "present again"


class OutOfTimeError(Exception):
    """A measurement was broken off."""


class PresentFailsError(Exception):
    """The table that others are compared with is wrong, or does not run."""


@dataclass(frozen=True)
class Comparison:
    """Medians by variant, one a case, and the candidates that were dropped, with the reason."""

    weights: Sequence[float]
    medians: dict[str, list[float]]
    dropped: dict[str, str] = field(default_factory=dict)

    def gain(self, variant: str, cases: Iterable[int] | None = None) -> float:
        """0.02: two hundredths faster than the present one, over the ``cases`` with these numbers, or all."""
        return math.exp(self._mean(self._logarithms(variant), cases)) - 1

    @property
    def noise(self) -> float:
        """How far apart the two measurements of the present table are: their mean or twice its standard error."""
        logarithms = [math.log(a / b) for a, b in zip(self.medians[PRESENT], self.medians[AGAIN], strict=True)]
        mean, total = self._mean(logarithms), sum(self.weights)
        squares = ((w / total * (x - mean)) ** 2 for w, x in zip(self.weights, logarithms, strict=True))
        return math.exp(max(abs(mean), 2 * math.sqrt(sum(squares)))) - 1

    @property
    def candidates(self) -> list[str]:
        return [variant for variant in self.medians if variant not in (PRESENT, AGAIN)]

    @property
    def present(self) -> list[float]:
        """Of each case, from both measurements."""
        return [math.sqrt(a * b) for a, b in zip(self.medians[PRESENT], self.medians[AGAIN], strict=True)]

    def _logarithms(self, variant: str) -> list[float]:
        return [math.log(a / b) for a, b in zip(self.present, self.medians[variant], strict=True)]

    def _mean(self, logarithms: Sequence[float], cases: Iterable[int] | None = None) -> float:
        chosen = range(len(logarithms)) if cases is None else list(cases)
        return sum(self.weights[i] * logarithms[i] for i in chosen) / sum(self.weights[i] for i in chosen)


class Step(ABC):
    """One comparison. ``name``: the place in the table. ``entry``: the part of the table that the place belongs to.

    ``repeated``: only taken where an earlier step has changed the entry.
    """

    cases: Sequence[Any]
    repeated: bool = False

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def entry(self) -> str: ...

    @abstractmethod
    def vary(self, table: Any) -> dict[str, Any]:
        """Tables to compare with this one, by what stands in the place."""

    @abstractmethod
    def value(self, table: Any) -> str:
        """What stands in the place."""

    def timed(self, table: Any) -> Any:
        """The table that is measured for one that may be kept."""
        return table

    def variants(self, table: Any) -> dict[str, Any]:
        """Every table that is measured; without candidates none is."""
        candidates = self.vary(table)
        tables = {PRESENT: table, AGAIN: table, **candidates} if candidates and self.cases else {}
        return {name: self.timed(each) for name, each in tables.items()}

    def choose(self, table: Any, comparison: Comparison) -> tuple[Any, float] | None:
        """The best candidate and its gain, where that exceeds the noise."""
        gains = {name: comparison.gain(name) for name in comparison.candidates}
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] <= comparison.noise:
            return None
        return self.vary(table)[best], gains[best]


@dataclass(frozen=True)
class Change:
    """An accepted one. ``gain`` and ``noise`` are fractions of the time."""

    place: str
    before: str
    after: str
    gain: float
    noise: float


@dataclass(frozen=True)
class Taken:
    """A step that was measured, and the change where there was one."""

    step: Step
    comparison: Comparison
    change: Change | None


@dataclass
class Search:
    """The table as far as it has come, the steps that were taken, and the names of those that time did not allow."""

    table: Any
    taken: list[Taken] = field(default_factory=list)
    not_searched: list[str] = field(default_factory=list)

    @property
    def changes(self) -> list[Change]:
        return [taken.change for taken in self.taken if taken.change is not None]

    def run(
        self,
        steps: Sequence[Step],
        compare: Callable[[Step, dict[str, Any]], Comparison],
        after_each: Callable[[Step], None] = lambda step: None,
    ) -> None:
        """Takes the steps in turn until one is out of time. Raises: PresentFailsError."""
        for number, step in enumerate(steps):
            if self.is_due(step):
                try:
                    self._take(step, compare)
                except OutOfTimeError:
                    self.not_searched += [
                        left.name + " again" * left.repeated for left in steps[number:] if self.is_due(left)
                    ]
                    return
            after_each(step)

    def _take(self, step: Step, compare: Callable[[Step, dict[str, Any]], Comparison]) -> None:
        variants = step.variants(self.table)
        if not variants:
            return
        comparison = compare(step, variants)
        change = None
        if chosen := step.choose(self.table, comparison):
            table, gain = chosen
            change = Change(step.name, step.value(self.table), step.value(table), gain, comparison.noise)
            self.table = table
        self.taken.append(Taken(step, comparison, change))

    def is_due(self, step: Step) -> bool:
        return not step.repeated or self.has_changed(step.entry)

    def has_changed(self, entry: str) -> bool:
        return any(taken.change is not None and taken.step.entry == entry for taken in self.taken)


def compare_cases(
    cases: Sequence[Any],
    weights: Sequence[float],
    variants: dict[str, Any],
    measure: Callable[[Any, dict[str, Any]], Any],
    seconds_left: Callable[[], float],
) -> Comparison:
    """Every case measured; a variant that one case drops is dropped.

    Raises: OutOfTimeError between two cases; PresentFailsError.
    """
    dropped: dict[str, str] = {}
    medians: dict[str, list[float]] = {name: [] for name in variants}
    for case in cases:
        if seconds_left() <= 0:
            raise OutOfTimeError
        measured = measure(case, {name: table for name, table in variants.items() if name not in dropped})
        dropped |= measured.dropped
        for name in (PRESENT, AGAIN):
            if name in dropped:
                raise PresentFailsError(f"the present table, {case}: {dropped[name]}")
        for name, milliseconds in measured.medians.items():
            medians[name].append(milliseconds)
    return Comparison(weights, {name: each for name, each in medians.items() if name not in dropped}, dropped)
