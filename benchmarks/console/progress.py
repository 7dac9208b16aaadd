"""How far a command is: a bar on a terminal; elsewhere, in a log file, a line at most every ten seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

from rich import progress as bars
from rich.console import Console

T = TypeVar("T")
SECONDS = 10


class Progress:
    """``done`` of ``total`` steps of ``what``; a context, left when they are over."""

    def __init__(self, console: Console, what: str, total: int, done: int = 0):
        self._console, self._what, self._total, self._done = console, what, total, done
        self._detail = ""
        self._begun = self._said = monotonic()
        self._before = done
        shown = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=20), bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(), console=console, transient=True, disable=not shown,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @property
    def rate(self) -> float:
        """Steps a second since this began."""
        return (self._done - self._before) / max(monotonic() - self._begun, 1e-9)

    def detail(self, text: str) -> None:
        """What is being done now, or how it goes."""
        self._detail = text
        self._bar.update(self._task, description=f"{self._what}: {text}" if text else self._what)
        self._say()

    def advance(self) -> None:
        self._done += 1
        self._bar.advance(self._task)
        self._say()

    def _say(self) -> None:
        """Where there is no bar."""
        now = monotonic()
        if self._bar.disable and now - self._said >= SECONDS:
            self._said = now
            detail = f", {self._detail}" if self._detail else ""
            self._console.print(
                f"{self._what}: {self._done}/{self._total}, {now - self._begun:.0f} s{detail}",
                soft_wrap=True, highlight=False, markup=False,
            )  # fmt: skip


def track(steps: Iterable[T], what: str, console: Console, total: int | None = None) -> Iterator[T]:
    """``steps`` one after the other; ``total``: where they have no length."""
    items = steps if total is not None else list(steps)
    with Progress(console, what, total if total is not None else len(items)) as progress:  # type: ignore[arg-type]
        for step in items:
            yield step
            progress.advance()
