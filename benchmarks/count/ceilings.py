"""What a kernel can reach at most on a GPU by its machine code: the programs that run at a time, and what binds them.

Of the bytes that an element takes, read and written:

    by issue   = bytes · lanes that are issued a clock / instructions · multiprocessors · clock
    by a pipe  = the same with the pipe's lanes and instructions
    in flight  = memory · bytes of loads in flight of a multiprocessor / bytes that saturate memory, by Little's law
    memory     = what a copy reaches

The last wave of a grid has fewer programs, which have less in flight. Programs are taken as equal, and what they do
before and after their inner loops as nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KIB = 1024


class Architecture(NamedTuple):
    """Limits of one multiprocessor, and how many there are. Registers are 32-bit words, shared memory is bytes.

    Those of GB100 and MI300X, which have no ``CARDS``, are a B200's and an MI300X's.
    """

    multiprocessors: int
    lanes: int
    warps: int
    blocks: int
    registers: int
    register_unit: int
    partitions: int
    shared: int
    reserved: int
    """Shared memory that the system takes of each block's."""


ARCHITECTURES = {
    "sm_80": Architecture(108, 32, 64, 32, 65536, 256, 4, 164 * KIB, KIB),
    "sm_90": Architecture(132, 32, 64, 32, 65536, 256, 4, 228 * KIB, KIB),
    "sm_100": Architecture(148, 32, 64, 32, 65536, 256, 4, 228 * KIB, KIB),
    "gfx942": Architecture(304, 64, 32, 32, 131072, 512, 4, 64 * KIB, 0),
}


class Card(NamedTuple):
    """``clock`` in GHz; ``copy``: TB/s that a copy moves; ``saturating``: bytes in flight of a multiprocessor."""

    architecture: str
    clock: float
    copy: float
    saturating: int


# Clocks: an A100's boost, as NVIDIA's data sheet has it; of the others one that they hold under load (boost 1.98).
# Copies: measured of an H100 and an H200; an A100's as much of its data sheet's 2.04 as an H100's of its 3.35.
# Saturating: arch_to_min_bytes_in_flight in CUB's tuning of its transform, NVIDIA/cccl, "32 for H100, 48 for H200".
CARDS = {
    "A100": Card("sm_80", 1.41, 1.83, 16 * KIB),
    "H100": Card("sm_90", 1.755, 3.0, 32 * KIB),
    "H200": Card("sm_90", 1.755, 4.3, 48 * KIB),
}

# Lanes a clock of a multiprocessor: "Throughput of Native Arithmetic Instructions", CUDA C++ Programming Guide.
ISSUE = 128
PIPES = {
    "sm_80": {"ALU": 64, "FMA": 64, "XU": 16},
    "sm_90": {"ALU": 64, "FMA": 128, "XU": 16},
    "sm_100": {"ALU": 64, "FMA": 128, "XU": 16},
}
# Integer multiplication and the moves that are written as one share a pipe with floating point; comparisons, selections
# and the logic, shifts and sums of integers do not. What is of no pipe here only takes its turn to be issued.
_PIPE = re.compile(
    r"(?P<FMA>IMAD|FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2)"
    r"|(?P<XU>MUFU|I2F\b|F2I\b|F2F\b|FRND|POPC|FLO|BREV)"
    r"|(?P<ALU>V?IADD|VIMNMX|VIADDMNMX|IMNMX|FMNMX|HMNMX2|IABS|LOP3|SHF\b|SHL|SHR|LEA|SGXT|BMSK|PRMT|MOV|P2R|R2P|PLOP3"
    r"|[IFH]SETP2?|FSET|SEL|FSEL|I2FP|F2FP|FCHK|VABSDIFF)"
)


def pipe_counts(opcodes: Iterable[str]) -> Counter[str]:
    """How many of the instructions each pipe executes."""
    return Counter(str(found.lastgroup) for opcode in opcodes if (found := _PIPE.match(opcode)))


def resident_programs(architecture: Architecture, warps: int, registers: int, shared: int) -> int:
    """Programs that one multiprocessor holds at a time. A warp's registers lie in one of its partitions."""
    unit = architecture.register_unit
    of_a_warp = -(-registers * architecture.lanes // unit) * unit
    by_registers = architecture.partitions * (architecture.registers // architecture.partitions // of_a_warp)
    of_a_block = shared + architecture.reserved
    by_shared = architecture.shared // of_a_block if of_a_block else architecture.blocks
    return min(architecture.blocks, architecture.warps // warps, by_registers // warps, by_shared)


class Work(NamedTuple):
    """A launch as a ceiling sees it. Instructions an element of the inner loop; ``moved``: bytes an element.

    ``in_flight``: bytes of loads of a multiprocessor with all the programs that it holds, on average over the loop.
    ``waves``: of the grid, each of as many programs as run at a time.
    """

    instructions: float
    pipes: dict[str, float]
    moved: float
    in_flight: float
    waves: float

    @property
    def last_wave(self) -> float:
        """How full it is."""
        return self.waves - math.ceil(self.waves) + 1


class Ceiling(NamedTuple):
    """TB/s of what must be moved, and what binds it."""

    bandwidth: float
    limit: str


LAST_WAVE = "last wave"
# What a last wave may cost before it is what binds.
SMALL = 0.05


def arithmetic(work: Work, architecture: str, clock: float) -> Ceiling:
    """By issue and by pipes alone."""
    limits = {"issue": work.instructions / ISSUE}
    limits |= {pipe: work.pipes.get(pipe, 0) / lanes for pipe, lanes in PIPES[architecture].items()}
    limit = max(limits, key=limits.__getitem__)
    lanes = ARCHITECTURES[architecture].multiprocessors * clock * 1e9
    return Ceiling(work.moved / limits[limit] * lanes / 1e12, limit)


def ceiling(work: Work, card: Card) -> Ceiling:
    by_arithmetic = arithmetic(work, card.architecture, card.clock)

    def with_programs(share: float) -> Ceiling:
        in_flight = card.copy * share * work.in_flight / card.saturating
        limits = Ceiling(card.copy, "memory"), by_arithmetic, Ceiling(in_flight, "in flight")
        return min(limits, key=lambda limit: limit.bandwidth)

    if work.waves <= 1:
        return with_programs(work.waves)
    full = with_programs(1)
    time = math.ceil(work.waves) - 1 + work.last_wave * full.bandwidth / with_programs(work.last_wave).bandwidth
    bandwidth = full.bandwidth * work.waves / time
    return Ceiling(bandwidth, full.limit if bandwidth >= (1 - SMALL) * full.bandwidth else LAST_WAVE)
