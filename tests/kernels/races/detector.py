"""Which accesses of a launch's programs nothing orders, and which read what nobody has written.

Races are found by happens-before, not by their effects, so mostly whatever the order in which the programs ran: two
accesses to the same bytes by two programs, not both loads and not both atomic, that nothing orders. What orders (as in
PTX and C++, with the scope of the GPU):

* the operations of one program, in its own order;
* an atomic that releases, before one on the same address that acquires and finds its value or that of a later atomic.
  Atomics here are all read-modify-writes: even relaxed ones go on with a release that came before. A store ends it;
* what a release publishes is what its program did before its last barrier, and what it has acquired: a scalar atomic is
  the work of one thread, and the stores of the program's other threads come before it only by ``tl.debug_barrier``.
  After it there is a barrier where its result is used: Triton hands that to the other threads. The atomic itself, and
  the same thread's before it, are published too.

Nothing else does: not that one program ended before another began, nor a relaxed atomic, nor one whose scope is a
single program, which to all others is a load and a store. Launches follow each other.

"no barrier": a program comes back to bytes that it has stored since its last barrier, and nobody promises that the same
one of its threads does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton._C.libtriton import ir

# What an access clashes with, where it is not ordered with that.
_CLASHES = {"load": ("store", "atomic"), "atomic": ("store", "load"), "store": ("store", "load", "atomic")}
_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class Finding(NamedTuple):
    """kind: "race", "no barrier" or "uninitialised". access, other: such as "store at forward.py:93"."""

    kernel: str
    kind: str
    argument: str
    access: str
    other: str


class Launched(NamedTuple):
    """A launch that ended: its programs, their loads, stores and atomics, how often another program went on."""

    kernel: str
    programs: int
    operations: int
    switches: int


@dataclass
class Log:
    """``findings``: each with its first example."""

    findings: dict[Finding, str] = field(default_factory=dict)
    launches: list[Launched] = field(default_factory=list)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def __str__(self) -> str:
        return "\n".join(f"{f.kernel}, {f.kind}: {example}" for f, example in self.findings.items())


class Access(NamedTuple):
    """A "load", "store" or "atomic" of ``size`` bytes at each of the addresses, which stands at ``site``."""

    kind: str
    addresses: np.ndarray
    size: int
    site: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}"


class Fresh:
    """What ``torch.empty`` and its kin have allocated: poisoned, and kept alive so that no address is used again."""

    def __init__(self) -> None:
        self._allocated: dict[int, tuple[Tensor, int, np.ndarray]] = {}

    def poisoned(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            storage = tensor.untyped_storage()
            if tensor.device.type == "cpu" and storage.nbytes():
                storage.fill_(255)
                self._allocated[storage.data_ptr()] = tensor, tensor._version, np.zeros(storage.nbytes(), bool)
            return tensor

        return wrapper

    def written(self, storage: int) -> np.ndarray | None:
        """Which bytes were written, None if all: what PyTorch's own operators leave is a version, and is not asked."""
        tensor, version, written = self._allocated.get(storage, (None, 0, None))
        return None if tensor is None or tensor._version != version else written


class _Region(NamedTuple):
    """A storage among a launch's arguments, in cells of its smallest element, of which the first has a number."""

    start: int
    end: int
    cell: int
    first: int
    written: np.ndarray | None


class Detector:
    """Holds a launch's accesses against each other.

    Every program has a clock, which its accesses advance. ``_known`` is by program what it knows of all clocks,
    ``_atomics`` the same of atomics alone, and ``_published`` what a release of its own would hand on; of each cell
    there is the time of every program's last access of each kind.
    """

    def __init__(self, kernel: str, tensors: dict[str, Tensor], programs: int, fresh: Fresh, log: Log) -> None:
        self._kernel, self._tensors, self._log = kernel, tensors, log
        self._known = np.zeros((programs, programs), np.int32)
        self._published = np.zeros((programs, programs), np.int32)
        self._atomics = np.zeros((programs, programs), np.int32)
        self._released: dict[int, np.ndarray] = {}
        self._history: list[list[Access | None]] = [[None] for _ in range(programs)]
        self._regions: list[_Region] = []
        cells = 0
        sizes: dict[int, tuple[int, int]] = {}
        for tensor in tensors.values():
            storage = tensor.untyped_storage()
            _, smallest = sizes.get(storage.data_ptr(), (0, 16))
            sizes[storage.data_ptr()] = storage.nbytes(), min(smallest, tensor.element_size())
        for start, (nbytes, cell) in sorted(sizes.items()):
            self._regions.append(_Region(start, start + nbytes, cell, cells, fresh.written(start)))
            cells += -(-nbytes // cell)
        self._starts = np.array([region.start for region in self._regions], np.int64)
        self._times = {kind: np.zeros((cells, programs), np.int32) for kind in _CLASHES}

    @property
    def operations(self) -> int:
        return sum(len(history) - 1 for history in self._history)

    def barrier(self, program: int) -> None:
        self._published[program] = self._known[program]

    def access(self, program: int, access: Access) -> None:
        """Raises: IndexError for an address outside the launch's arguments."""
        self._known[program, program] = len(self._history[program])
        self._history[program].append(access)
        regions = np.searchsorted(self._starts, access.addresses, side="right") - 1
        for number in set(regions.tolist()):
            addresses = access.addresses[regions == number]
            region = self._regions[number]
            if number < 0 or (addresses + access.size > region.end).any():
                raise IndexError(f"{self._kernel}: {access} by program {program}, outside the launch's arguments")
            self._initialise(program, access, region, addresses)
            self._order(program, access, region, addresses)

    def synchronise(self, program: int, addresses: np.ndarray, semantics: Any) -> None:
        """What the atomic that the program has just accessed these addresses with orders."""
        self._atomics[program, program] = self._known[program, program]
        for address in addresses.tolist():
            if semantics in _ACQUIRES and address in self._released:
                published, atomics = self._released[address]
                for clocks, others in (
                    (self._known, published), (self._published, published), (self._atomics, atomics)
                ):  # fmt: skip
                    np.maximum(clocks[program], others, out=clocks[program])
            if semantics in _RELEASES:
                own = np.stack((self._published[program], self._atomics[program]))
                self._released[address] = np.maximum(own, self._released.get(address, 0))

    def _initialise(self, program: int, access: Access, region: _Region, addresses: np.ndarray) -> None:
        if region.written is None:
            return
        at = (addresses - region.start)[:, None] + np.arange(access.size)
        if access.kind != "store":
            missing = ~region.written[at].all(1)
            if missing.any():
                self._report("uninitialised", program, addresses[missing.argmax()], access)
        if access.kind != "load":
            region.written[at] = True

    def _order(self, program: int, access: Access, region: _Region, addresses: np.ndarray) -> None:
        offsets = addresses - region.start
        if access.size % region.cell or (offsets % region.cell).any():
            raise NotImplementedError(f"{self._kernel}: {access} is not of whole elements of its tensor")
        parts = access.size // region.cell
        cells = (region.first + offsets[:, None] // region.cell + np.arange(parts)).ravel()
        unsettled = self._times["store"][cells, program] > self._published[program, program]
        if unsettled.any():
            i = int(unsettled.argmax())
            there = self._history[program][self._times["store"][cells[i], program]]
            self._report("no barrier", program, addresses[i // parts], access, there, program)
        for kind in _CLASHES[access.kind]:
            known = self._known[program]
            later = self._times[kind][cells] > (
                np.maximum(known, self._atomics[program]) if kind == "atomic" else known
            )
            if later.any():
                i, other = divmod(int(later.argmax()), later.shape[1])
                there = self._history[other][self._times[kind][cells[i], other]]
                self._report("race", program, addresses[i // parts], access, there, other)
        self._times[access.kind][cells, program] = self._known[program, program]
        if access.kind == "store" and self._released:
            for address in self._released.keys() & addresses.tolist():
                del self._released[address]

    def _report(
        self, kind: str, program: int, address: int, access: Access, there: Access | None = None, other: int = 0
    ) -> None:
        argument, element = self._name(int(address))
        finding = Finding(self._kernel, kind, argument, str(access), "" if there is None else str(there))
        example = f"{argument} + {element}: {access} by program {program}"
        if there is not None:
            example += f", unordered with {there} by program {other}"
        self._log.findings.setdefault(finding, example)

    def _name(self, address: int) -> tuple[str, int]:
        """The argument that an address is in, and its element."""
        for name, tensor in self._tensors.items():
            element, rest = divmod(address - tensor.data_ptr(), tensor.element_size())
            last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if not rest and 0 <= element <= last:
                return name, element
        return "beside the arguments", 0
