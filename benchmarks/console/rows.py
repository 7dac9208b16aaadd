"""Tables that fit: columns for which a line has no room come in further tables below, and no word or number is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import render
from rich.table import Table

# Left and right of a cell, and the line behind it; the table's first line is one more.
FRAME = 3


@dataclass(frozen=True)
class _Column:
    """``folds``: at spaces, as a heading always may."""

    heading: str
    cells: Sequence[str]
    folds: bool

    @cached_property
    def least(self) -> int:
        cells = [word for cell in self.cells for word in cell.split()] if self.folds else self.cells
        return max(map(_width, [*cells, *self.heading.split()]), default=0)

    @cached_property
    def natural(self) -> int:
        return max(map(_width, [*self.cells, self.heading]))


@dataclass
class Rows:
    """Rows of ``keys``, which say what a row is of and fold at spaces, and of ``values``, one line each, to the right.

    Keys stand in every part of a table that is divided; where they would take most of a line they are one column.
    """

    title: str
    keys: Sequence[str]
    values: Sequence[str] = ()
    caption: str | None = None
    rows: list[Sequence[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def add(self, *cells: str, style: str = "") -> None:
        self.rows.append(cells)
        self.styles.append(style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keys, values = self._columns()
        room = options.max_width
        if values and _taken([*keys, *values]) > room and _taken(keys) > room / 2:
            keys = [_joined(keys)]
        least = _taken(keys)
        if len(keys) == 1:
            # With the least only, each of its words would take a line.
            least = max(least, min(2 * room // 5, keys[0].natural + FRAME + 1))
        parts: list[list[_Column]] = [[]]
        for value in values:
            if parts[-1] and least + _taken([*parts[-1], value]) - 1 > room:
                parts.append([])
            parts[-1].append(value)
        for part in parts:
            yield self._table(
                [*keys, *part], len(keys), room,
                title=self.title if part is parts[0] else None,
                caption=self.caption if part is parts[-1] else None,
            )  # fmt: skip

    def _columns(self) -> tuple[list[_Column], list[_Column]]:
        headings = [*self.keys, *self.values]
        columns = [
            _Column(heading, [row[i] for row in self.rows], folds=i < len(self.keys))
            for i, heading in enumerate(headings)
        ]
        return columns[: len(self.keys)], columns[len(self.keys) :]

    def _table(self, columns: list[_Column], keys: int, room: int, title: str | None, caption: str | None) -> Table:
        table = Table(title=title, caption=caption)
        for i, (column, width) in enumerate(zip(columns, _widths(columns, room), strict=True)):
            table.add_column(column.heading, justify="left" if i < keys else "right", overflow="fold", width=width)
        for i, style in enumerate(self.styles):
            table.add_row(*(column.cells[i] for column in columns), style=style)
        return table


def _width(text: str) -> int:
    """Of the longest line, without markup."""
    return max((cell_len(line) for line in render(text).plain.splitlines()), default=0)


def _taken(columns: Sequence[_Column]) -> int:
    return sum(column.least + FRAME for column in columns) + 1


def _widths(columns: Sequence[_Column], room: int) -> list[int]:
    """The least, and the room beyond it where it is lacked the most; words are broken where there is none at all."""
    widths = [column.least for column in columns]
    lacks = [column.natural - column.least for column in columns]
    spare = room - _taken(columns)
    for _ in range(min(spare, sum(lacks))):
        i = lacks.index(max(lacks))
        widths[i] += 1
        lacks[i] -= 1
    for _ in range(-spare):
        widths[widths.index(max(widths))] -= 1
    return [max(width, 1) for width in widths]


def _joined(columns: Sequence[_Column]) -> _Column:
    rows = zip(*(column.cells for column in columns), strict=True)
    return _Column(
        ", ".join(column.heading for column in columns), [", ".join(filter(None, row)) for row in rows], folds=True
    )
