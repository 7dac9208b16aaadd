"""Programs of a launch as threads of which one runs at a time, each up to its next operation, by a seeded schedule.

As on a GPU they are dispatched in some order, at most ``resident`` are under way, and one must end before the next is
dispatched. Nothing here runs at the same time as anything else, so Triton's interpreter, which keeps its state in
globals, need not be safe for threads.

A program that repeats one scalar load or atomic, finds the same and changes nothing is spinning. It is left aside until
the memory there changes, but for a turn now and then: one that spins cannot keep another resident program from going
on for ever, as on a GPU. Where all that are resident spin, that is a deadlock.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

PICKS = ("oldest", "newest", "random", "starve", "priorities", "turns")
DISPATCHES = ("forward", "backward", "shuffled")
# How often a turn is given to a program that spins, though another is ready.
_SPINS = 1 / 16
# How often the program of highest priority is made that of the lowest.
_DEMOTIONS = 1 / 32
# Turns that each gets, where all spin, before that is a deadlock.
_PATIENCE = 4


class Schedule(NamedTuple):
    """Which program goes on, of how many at once (None for all), dispatched in which order of their numbers.

    pick: "oldest" and "newest" by dispatch; "starve", one of them only where no other can; "priorities", the one with
    the highest of random priorities; "turns", one after the other; "random".
    """

    pick: str = "oldest"
    resident: int | None = None
    dispatch: str = "forward"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.pick}, {self.resident or 'all'} resident, {self.dispatch}, seed {self.seed}"


class DeadlockError(RuntimeError):
    """Every resident program spins."""


class _Cancelled(BaseException):
    """Ends a program that is not to go on. No Exception, which the interpreter would wrap."""


class Spin(NamedTuple):
    """What a scalar operation found and left, in so many bytes at an address, and where it stands in the source."""

    site: str
    address: int
    found: bytes

    def lasts(self) -> bool:
        return ctypes.string_at(self.address, len(self.found)) == self.found


class _Program(threading.Thread):
    """One program of a launch. Its lock is open only in its turn."""

    def __init__(self, number: int, order: int, priority: float, scheduler: Scheduler) -> None:
        super().__init__(daemon=True)
        self.number, self.order, self.priority = number, order, priority
        self.latest: Spin | None = None
        self.spins = False
        self.turn = threading.Lock()
        self.turn.acquire()
        self._scheduler = scheduler
        self.start()

    def run(self) -> None:
        self.turn.acquire()
        self._scheduler.run_program(self)

    def waits(self) -> bool:
        return self.spins and self.latest is not None and self.latest.lasts()


class Scheduler:
    """Runs ``body`` for every program of a launch. ``switches``: how often another program went on than before."""

    def __init__(self, kernel: str, programs: int, body: Callable[[], None], schedule: Schedule, launch: int) -> None:
        if schedule.pick not in PICKS or schedule.dispatch not in DISPATCHES:
            raise ValueError(f"a schedule picks by {PICKS} and dispatches {DISPATCHES}, but is {schedule}")
        self._kernel, self._body, self._schedule = kernel, body, schedule
        self._random = random.Random(f"{schedule.seed} {launch} {kernel}")
        numbers = list(range(programs))
        if schedule.dispatch == "backward":
            numbers.reverse()
        elif schedule.dispatch == "shuffled":
            self._random.shuffle(numbers)
        self._waiting, self._resident = deque(enumerate(numbers)), list[_Program]()
        self._victim = self._random.randrange(programs)
        self._running: _Program | None = None
        self._fruitless = 0
        self._error: BaseException | None = None
        self._done = threading.Event()
        self.switches = 0

    @property
    def running(self) -> int:
        """The number of the program whose turn it is."""
        assert self._running is not None
        return self._running.number

    def run(self) -> None:
        """Returns when all programs have ended. Raises: DeadlockError; what one of them has raised."""
        self._dispatch()
        self._hand_over()
        self._done.wait()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Returns when it is the running program's turn again."""
        program = self._running
        assert program is not None
        if self._hand_over() is not program:
            program.turn.acquire()
        if self._error is not None:
            raise _Cancelled

    def found(self, spin: Spin | None) -> None:
        """What the running program's operation found and did not change; None where it was of another kind."""
        program = self._running
        assert program is not None
        program.spins = spin is not None and spin == program.latest
        program.latest = spin

    def run_program(self, program: _Program) -> None:
        """The whole of a program, in its thread."""
        try:
            if self._error is None:
                self._body()
        except _Cancelled:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._resident.remove(program)
        self._dispatch()
        if self._resident:
            self._hand_over()
        else:
            self._done.set()

    def _dispatch(self) -> None:
        while self._waiting and self._error is None and len(self._resident) < (self._schedule.resident or 2**31):
            order, number = self._waiting.popleft()
            self._resident.append(_Program(number, order, self._random.random(), self))

    def _hand_over(self) -> _Program:
        """Who goes on; it is woken, unless it is the running program."""
        before, chosen = self._running, self._choose()
        if chosen is not before:
            self._running = chosen
            self.switches += 1
            chosen.turn.release()
        return chosen

    def _choose(self) -> _Program:
        if self._error is not None:
            return self._resident[0]
        ready = [p for p in self._resident if not p.waits()]
        if ready:
            self._fruitless = 0
            if len(ready) < len(self._resident) and self._random.random() < _SPINS:
                return self._random.choice(self._resident)
            return self._pick(ready)
        self._fruitless += 1
        if self._fruitless > _PATIENCE * len(self._resident):
            places = ", ".join(sorted({p.latest.site for p in self._resident if p.latest is not None}))
            self._error = DeadlockError(
                f"{self._kernel}: all of {len(self._resident)} resident programs spin, at {places}"
            )
        return self._resident[self._fruitless % len(self._resident)]

    def _pick(self, ready: list[_Program]) -> _Program:
        match self._schedule.pick:
            case "oldest":
                return min(ready, key=lambda p: p.order)
            case "newest":
                return max(ready, key=lambda p: p.order)
            case "starve":
                return self._random.choice([p for p in ready if p.number != self._victim] or ready)
            case "turns":
                # In a circle: the first after the one that ran last.
                latest = -1 if self._running is None else self._running.order
                return min(ready, key=lambda p: (p.order <= latest, p.order))
            case "priorities":
                chosen = max(ready, key=lambda p: p.priority)
                if self._random.random() < _DEMOTIONS:
                    chosen.priority = min(p.priority for p in self._resident) - 1
                return chosen
        return self._random.choice(ready)
