"""``launch_table.json``, the tuned part of the launch table: what it holds, read, checked and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).with_name("launch_table.json")
"""The file that the kernels read, once, when they are imported."""
STREAMING_KERNELS = ("statistics", "normalise", "reduce", "apply")
DIRECTIONS = ("forward", "backward")
LAYOUTS = {"channels_last": True, "contiguous": False}
MOST_WARPS = 32


class Entry(NamedTuple):
    """elements: of a tile. inner: those side by side in memory. programs: that a multiprocessor holds at a time.

    warps: of a program. stages: tiles of which one is worked on while the others are on their way.
    """

    elements: int
    inner: int
    programs: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Everything that ``python benchmarks/run.py tune`` searches, by (kernel or direction, channels_last)."""

    # Entries by the largest number of elements they serve; the last serves the rest. Chosen by the machine code: a tile
    # of as many elements a thread as its registers allow, at most 128, and stages with which the programs of a
    # multiprocessor have 48 KiB on their way. Short rows fit planes that are no power of two.
    streaming: dict[tuple[str, bool], tuple[tuple[int | None, Entry], ...]]
    # The tile of the one-launch kernels; programs: at most in one phase of a slice.
    ticketed: dict[tuple[str, bool], Entry]
    # A training node with at most so many elements takes one launch a direction, ordered by tickets, others two;
    # None: every node. None of them until a GPU has run the one.
    one_launch_elements: dict[tuple[str, bool], int | None]
    # The second phase begins with the tiles that the first ended with, and lets go of what is read for the last time.
    second_phase_reversed: bool
    second_phase_evicts_first: bool
    # Whether separate launches go through a channels_last tensor block of channels by block of channels, not row by
    # row, where a block is small enough. Rows, until a GPU has compared them.
    channel_major: bool
    # The searches that made it, the first one first: where, when, and what each change gained. None: untuned.
    tuned_on: list[dict[str, Any]] | None

    @property
    def constants(self) -> dict[str, Any]:
        """By the names that ``launch_table`` holds them under."""
        return {name.upper(): value for name, value in self._asdict().items() if name != "tuned_on"}


def read(path: Path = PATH) -> Table:
    """Raises: ValueError, with the file and the key, for anything but a whole table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    parts = _members(content, f"{path}: the table", Table._fields, f"{path}: ")
    return Table(
        streaming=_by_layout(*parts["streaming"], STREAMING_KERNELS, _classes),
        ticketed=_by_layout(*parts["ticketed"], DIRECTIONS, _entry),
        one_launch_elements=_by_layout(*parts["one_launch_elements"], DIRECTIONS, _limit),
        second_phase_reversed=_switch(*parts["second_phase_reversed"]),
        second_phase_evicts_first=_switch(*parts["second_phase_evicts_first"]),
        channel_major=_switch(*parts["channel_major"]),
        tuned_on=_searches(*parts["tuned_on"]),
    )


def write(table: Table, path: Path = PATH) -> None:
    """Replaces the file as a whole: whoever reads it meanwhile finds the table before or the one after."""
    content = table._asdict() | {
        "streaming": _layouts_by_name(
            {
                key: [{"limit": limit, **entry._asdict()} for limit, entry in classes]
                for key, classes in table.streaming.items()
            }
        ),
        "ticketed": _layouts_by_name({key: entry._asdict() for key, entry in table.ticketed.items()}),
        "one_launch_elements": _layouts_by_name(table.one_launch_elements),
    }
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _layouts_by_name(parts: dict[tuple[str, bool], Any]) -> dict[str, dict[str, Any]]:
    return {
        kernel: {name: parts[kernel, channels_last] for name, channels_last in LAYOUTS.items()}
        for kernel in dict.fromkeys(kernel for kernel, _ in parts)
    }


def _need(holds: bool, what: str, value: Any, where: str) -> Any:
    if not holds:
        raise ValueError(f"{where} must be {what}, but is {value!r}")
    return value


def _members(value: Any, where: str, names: Collection[str], prefix: str | None = None) -> dict[str, tuple[Any, str]]:
    """The members of an object that has these and no others, each with where it stands."""
    _need(isinstance(value, dict), "an object", value, where)
    if set(value) != set(names):
        missing, other = (", ".join(found) or "none" for found in (set(names) - set(value), set(value) - set(names)))
        raise ValueError(f"{where} must have the keys {', '.join(names)}; missing: {missing}; unknown: {other}")
    return {name: (value[name], f"{where}.{name}" if prefix is None else prefix + name) for name in names}


def _by_layout(
    value: Any, where: str, kernels: Collection[str], parse: Callable[[Any, str], Any]
) -> dict[tuple[str, bool], Any]:
    return {
        (kernel, LAYOUTS[layout]): parse(*part)
        for kernel, layouts in _members(value, where, kernels).items()
        for layout, part in _members(*layouts, LAYOUTS).items()
    }


def _classes(value: Any, where: str) -> tuple[tuple[int | None, Entry], ...]:
    _need(isinstance(value, list) and len(value) > 0, "a list of entries", value, where)
    classes: list[tuple[int | None, Entry]] = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        members = _members(part, at, ("limit", *Entry._fields))
        limit, limit_at = members["limit"]
        if index == len(value) - 1:
            _need(limit is None, "null, since the last entry serves the rest", limit, limit_at)
        else:
            previous = classes[-1][0] if classes else 0
            _need(_is_count(limit) and limit > previous, f"an integer above {previous}", limit, limit_at)
        classes.append((limit, _entry({name: part[name] for name in Entry._fields}, at)))
    return tuple(classes)


def _entry(value: Any, where: str) -> Entry:
    members = _members(value, where, Entry._fields)
    entry = Entry(*(_need(_is_count(number), "a positive integer", number, at) for number, at in members.values()))
    for name, least, most in (("elements", 8, None), ("inner", 8, entry.elements), ("warps", 1, MOST_WARPS)):
        number, at = members[name]
        within = f"a power of two from {least}" + ("" if most is None else f" to {most}")
        _need(number & (number - 1) == 0 and least <= number <= (most or number), within, number, at)
    return entry


def _limit(value: Any, where: str) -> int | None:
    holds = value is None or _is_count(value) or (type(value) is int and value == 0)
    return _need(holds, "null or an integer from 0", value, where)


def _switch(value: Any, where: str) -> bool:
    return _need(type(value) is bool, "true or false", value, where)


def _searches(value: Any, where: str) -> list[dict[str, Any]] | None:
    holds = value is None or (isinstance(value, list) and all(isinstance(search, dict) for search in value))
    return _need(holds, "null or a list of objects", value, where)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
