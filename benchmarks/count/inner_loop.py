"""The inner loop of NVIDIA's machine code: what a step of it issues, and what is in flight while it waits for memory.

A thread issues in order, and waits where it touches a register that a load has yet to fill, or at a DEPBAR for all but
the newest groups of copies to shared memory. With every load one round trip of time on its way and nothing else taking
any, a loop comes to a steady pace: so many round trips a step. By Little's law it then keeps

    bytes of a step / round trips of a step

in flight, on average; most is in flight at the first of its waits.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

# After so many steps the pace is steady, whatever is in flight before the first; over so many more it is taken.
SETTLING, STEADY = 8, 12


class UnreadableError(Exception):
    """What this version of Triton, or of a tool that it carries, writes is not what this package knows."""


Source = tuple[str, int]
"""A file and the line in it where a statement begins."""


class Instruction(NamedTuple):
    """``target``: the number of the instruction that it may branch to. ``source``: of about which line it is."""

    opcode: str
    operands: str
    target: int | None = None
    source: Source = ("", 0)


class InnerLoop(NamedTuple):
    """Of one step. ``loaded``: bytes that a thread loads; ``first``: of them, most that are in flight at a wait."""

    opcodes: list[str]
    loaded: int
    first: int
    round_trips: float


_NVIDIA_ACCESS = re.compile(r"(LDG|LDGSTS|STG)\b(?:.*?\.[US]?(8|16|64|128|256)(?=\.|$))?")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def width_of(opcode: str, loads: bool) -> int:
    """Bits that each thread moves in a load from, or a store to, global memory; 0 for any other instruction."""
    if access := _NVIDIA_ACCESS.match(opcode):
        return int(access[2] or 32) if (access[1] != "STG") == loads else 0
    if access := _AMD_ACCESS.match(opcode):
        return _AMD_BITS[access[2]] if (access[1] == "load") == loads else 0
    return 0


def innermost(branches: Iterable[tuple[int, int]], loaded: Callable[[range], int]) -> range | None:
    """Of the loops that branches (from, to) close, the one that loads the most and has no other that loads in it."""
    ends: dict[int, int] = {}
    for at, target in branches:
        if target <= at:
            ends[target] = max(at, ends.get(target, at))
    loops = [loop for first, last in ends.items() if loaded(loop := range(first, last + 1))]
    inner = [a for a in loops if not any(b != a and b[0] in a and b[-1] in a for b in loops)]
    return max(inner, key=loaded, default=None)


_LINE = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;|^\.(L_\w+):"
    r'|^\s+//## File "(.*?)", line (\d+)(?:.*\n\s+//## File.*)*',
    re.MULTILINE,
)
_TARGET = re.compile(r"`\(\.?(L_\w+)\)")


def instructions(sass: str) -> list[Instruction]:
    """What the disassembler prints, in order, without padding."""
    found: list[tuple[str, str, Source]] = []
    labels: dict[str, int] = {}
    source = "", 0
    for opcode, operands, label, file, line in _LINE.findall(sass):
        if label:
            labels[label] = len(found)
        elif file:
            source = file, int(line)
        elif opcode != "NOP":
            found.append((opcode, operands, source))
    return [
        Instruction(opcode, operands, labels.get(target[1]) if (target := _TARGET.search(operands)) else None, source)
        for opcode, operands, source in found
    ]


def inner_loop(code: list[Instruction], is_streamed: Callable[[Source], bool] = lambda source: True) -> InnerLoop:
    """The one that loads the most of what ``is_streamed``.

    Raises: UnreadableError where there is none that loads, or it loads in a way that is not known here.
    """

    def streamed(loop: range) -> int:
        return sum(width_of(code[i].opcode, loads=True) for i in loop if is_streamed(code[i].source))

    loop = innermost(((i, c.target) for i, c in enumerate(code) if c.target is not None), streamed)
    if loop is None:
        raise UnreadableError("the machine code has no loop that loads")
    body = [code[i] for i in loop]
    for opcode in (c.opcode for c in body):
        if opcode.startswith(("UBLKCP", "UTMALDG", "ARRIVES.LDGSTS")):
            raise UnreadableError(f"what {opcode} keeps in flight is not known")
    first, round_trips = _pace(body)
    loaded = sum(width_of(c.opcode, loads=True) for c in body) // 8
    return InnerLoop([c.opcode for c in body], loaded, first, round_trips)


class _Load(NamedTuple):
    size: int
    arrives: float


class _Thread:
    """A thread that issues without taking time, and waits for loads, each a round trip long."""

    def __init__(self) -> None:
        self.now = 0.0
        self.most_waited_for = 0
        self._in_flight: list[_Load] = []
        self._registers: dict[int, _Load] = {}
        self._group: list[_Load] = []
        self._groups: deque[list[_Load]] = deque()

    def issue(self, instruction: Instruction) -> None:
        opcode, operands, *_ = instruction
        size = width_of(opcode, loads=True) // 8
        if opcode.startswith("DEPBAR"):
            kept = int(operands.rpartition(",")[2], 16)
            while len(self._groups) > kept:
                self._wait_for(self._groups.popleft())
        elif opcode == "LDGDEPBAR":
            self._groups.append(self._group)
            self._group = []
        else:
            touched = set(_registers(opcode, operands))
            self._wait_for([self._registers.pop(r) for r in touched & self._registers.keys()])
            if size:
                load = _Load(size, self.now + 1)
                self._in_flight.append(load)
                if opcode.startswith("LDGSTS"):
                    self._group.append(load)
                else:
                    self._registers |= dict.fromkeys(_destination(operands, size), load)

    def _wait_for(self, loads: list[_Load]) -> None:
        arrives = max((load.arrives for load in loads), default=self.now)
        if arrives > self.now:
            self.most_waited_for = max(self.most_waited_for, sum(load.size for load in self._in_flight))
            self.now = arrives
            self._in_flight = [load for load in self._in_flight if load.arrives > arrives]


def _pace(body: list[Instruction]) -> tuple[int, float]:
    """(most bytes in flight at a wait, round trips of a step), once the pace is steady."""
    thread = _Thread()
    for step in range(SETTLING + STEADY):
        if step == SETTLING:
            since, thread.most_waited_for = thread.now, 0
        for instruction in body:
            thread.issue(instruction)
    if thread.now == since:
        raise UnreadableError("nothing waits for what the inner loop loads")
    return thread.most_waited_for, (thread.now - since) / STEADY


_REGISTER = re.compile(r"\bR(\d+)(\.64)?(?![\w])")


def _registers(opcode: str, operands: str) -> Iterator[int]:
    """Those that an instruction names, with those that a wide operand reaches over."""
    stored = width_of(opcode, loads=False) or (128 if opcode.startswith("STS.128") else 32)
    wide = re.match(r"D[A-Z]", opcode) is not None
    for name, pair in _REGISTER.findall(operands):
        yield from range(int(name), int(name) + max(stored // 32, 2 if pair or wide else 1))


def _destination(operands: str, size: int) -> Iterator[int]:
    """The registers that a load fills: two quadruples where it is 32 bytes wide."""
    quadruples = _REGISTER.findall(operands.partition("[")[0])[: 2 if size == 32 else 1]
    for name, _ in quadruples:
        yield from range(int(name), int(name) + max(1, size // 4 // len(quadruples)))
