"""Stands in for rich where it is not installed: what is said comes as plain lines, a table's cells between tabs."""

from __future__ import annotations

import multiprocessing
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_MARKUP = re.compile(r"(?<!\\)\[/?[a-z #]*\]")


def render(text: str) -> str:
    return _MARKUP.sub("", text).replace("\\[", "[")


def escape(text: str) -> str:
    return re.sub(r"\[(?=/?[a-z #]*\])", r"\\[", text)


class Table:
    def __init__(self, title: str | None = None, caption: str | None = None, **settings: Any):
        self.title, self.caption = title, caption
        self.headings: list[str] = []
        self.rows: list[tuple[str, ...]] = []

    def add_column(self, heading: str, **settings: Any) -> None:
        self.headings.append(heading)

    def add_row(self, *cells: str, **settings: Any) -> None:
        self.rows.append(cells)


class Console:
    is_terminal, is_dumb_terminal, quiet = False, True, False

    def __init__(self, quiet: bool = False, **settings: Any):
        self.quiet = quiet

    def print(self, *objects: object, markup: bool = True, **settings: Any) -> None:
        if not self.quiet:
            print(*(_plain(each, markup) for each in objects), flush=True)

    def status(self, text: str) -> AbstractContextManager[None]:
        self.print(text)
        return nullcontext()


def _plain(shown: Any, markup: bool) -> str:
    if isinstance(shown, str):
        return render(shown) if markup else shown
    # A ``Table``, or ``Rows``.
    headings = getattr(shown, "headings", None) or [*shown.keys, *shown.values]
    lines = [shown.title, "\t".join(headings), *("\t".join(row) for row in shown.rows), shown.caption]
    return "\n".join(render(line) for line in lines if line)


class _Bars:
    """A progress bar that is not shown."""

    def __init__(self, *columns: Any, **settings: Any):
        self.disable = True

    def add_task(self, *about: Any, **settings: Any) -> int:
        return 0

    def start(self) -> None: ...

    stop = start

    def update(self, *about: Any, **settings: Any) -> None: ...

    advance = update


def stand_in() -> None:
    """For what of rich is used here, where there is none; says so."""
    if find_spec("rich") is not None:
        return
    # Not again where a process that was spawned imports this anew.
    if multiprocessing.current_process().name == "MainProcess":
        print("rich is not installed: tables are plain, and progress is said in lines", file=sys.stderr)
    columns = ("BarColumn", "MofNCompleteColumn", "TextColumn", "TimeRemainingColumn")
    contents: dict[str, dict[str, Any]] = {
        "rich": {},
        "rich.cells": {"cell_len": len},
        "rich.console": {"Console": Console, "ConsoleOptions": Any, "RenderResult": Any},
        "rich.markup": {"escape": escape, "render": render},
        "rich.progress": {"Progress": _Bars, **dict.fromkeys(columns, _Bars)},
        "rich.table": {"Table": Table},
    }
    for name, content in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
