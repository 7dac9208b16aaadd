"""Reads what Triton compiled: the tiles that its own code accesses, and the machine code that became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

from count.inner_loop import (
    InnerLoop,
    Source,
    UnreadableError,
    inner_loop,
    innermost,
    instructions,
    width_of,
)


class Transfer(NamedTuple):
    """A load from, or a store to, global memory; ``width`` in bits, of each thread; ``inner``: in the inner loop."""

    loads: bool
    width: int
    source: Source
    inner: bool = False


class Access(NamedTuple):
    """A load or a store of a tile, rows by columns, of an activation or, of one byte, of a bit mask.

    ``base``: what its addresses are reckoned from. ``loop``: the number of the loop that it is in, 0 without one.
    """

    loads: bool
    tile: tuple[int, int]
    itemsize: int
    offset_bits: int
    source: Source
    base: str = ""
    loop: int = 0

    @property
    def elements(self) -> int:
        return self.tile[0] * self.tile[1]


class MachineCode(NamedTuple):
    """``registers`` of a thread, ``spilled`` bytes or registers. ``loop``: the inner one, where it can be read."""

    opcodes: list[str]
    transfers: list[Transfer]
    registers: int
    spilled: int
    loop: InnerLoop | None


class Step(NamedTuple):
    """What a thread does in one step of the inner loop, by tiles.

    ``elements``: of each activation that it loads, of which there are ``loaded``; ``moved``: bytes an element.
    """

    elements: float
    loaded: int
    moved: float


def step_of(accesses: list[Access], code: MachineCode) -> Step:
    """Raises: UnreadableError where the inner loop is not one of Triton's code."""
    loads = _streamed(accesses)
    size = sum(a.elements * a.itemsize for a in loads)
    of_bases = Counter(a.base for a in loads)
    written = {(a.loads, a.source): a.itemsize for a in accesses}
    inner = [t for t in code.transfers if t.inner and (t.loads, t.source) in written]
    loaded = sum(t.width // 8 for t in inner if t.loads and written[True, t.source] > 1)
    if not loads[0].loop or not loaded or code.loop is None:
        raise UnreadableError("its inner loop is not one of Triton's code")
    # A step of Triton's loop has as many tiles of each base; LLVM and the assembler may each unroll it.
    elements = loaded * of_bases.most_common(1)[0][1] * loads[0].elements / size
    moved = sum(t.width // 8 for t in inner) / elements
    unrolled = round(code.loop.loaded / sum(t.width // 8 for t in code.transfers if t.inner and t.loads))
    return Step(max(1, unrolled) * elements, len(of_bases), moved)


def _streamed(accesses: list[Access]) -> list[Access]:
    """The loads of activations in the loop that loads the most."""
    loads = [a for a in accesses if a.loads and a.itemsize > 1]
    bytes_of_loops = Counter[int]()
    for a in loads:
        bytes_of_loops[a.loop] += a.elements * a.itemsize
    return [a for a in loads if a.loop == max(bytes_of_loops, key=bytes_of_loops.__getitem__)]


def narrowest(activations: list[Access], transfers: list[Transfer]) -> int:
    """The width of the narrowest access to an activation. Raises: UnreadableError where one has become no transfer.

    Where transfers of one line are both in the inner loop and not, as those of a function that stores this and that,
    the ones in the loop are the activation's.
    """
    in_loop = {(t.loads, t.source) for t in transfers if t.inner}
    found: dict[tuple[bool, Source], int] = {}
    for loads, width, source, inner in transfers:
        if inner or (loads, source) not in in_loop:
            found[loads, source] = min(width, found.get((loads, source), width))
    for access in activations:
        if (access.loads, access.source) not in found:
            kind, (file, line) = "load" if access.loads else "store", access.source
            raise UnreadableError(f"no instruction is said to be of the {kind} in line {line} of {file}")
    return min((found[a.loads, a.source] for a in activations), default=0)


_DEFINITION = re.compile(r"^ *(%[\w#]+) = (tt\.\w+) (%[\w#]+).* : (.*) loc\(", re.MULTILINE)
_TILE_ACCESS = re.compile(r"tt\.(load|store) (%[\w#]+).* : tensor<(\d+)x(\d+)x!tt\.ptr<[a-z]+(\d+)>> loc\((#loc\d+)\)")
_PARTIALS = "%partials"
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)


def tile_accesses(ttir: str) -> list[Access]:
    """The loads and stores of whole tiles in a streaming kernel's Triton code, of which it has some.

    Not those of its argument ``partials``, which are merged behind its loop.
    """
    definitions: dict[str, tuple[str, str, str]] = {}
    locations = dict(_LOCATION.findall(ttir))

    def source(location: str) -> Source:
        """The innermost line of a location, through names and inlined calls."""
        text = locations.get(location, "")
        if place := re.match(r'"(.+)":(\d+):', text):
            return place[1], int(place[2])
        inner = re.search(r"#loc\d*", text)
        if inner is None:
            raise UnreadableError(f"Triton's code does not say what line {location} is")
        return source(inner[0])

    def offset_bits(pointer: str) -> int:
        """Width of the scalar offset under a tile of pointers: 64 too where there is none."""
        while pointer in definitions:
            operation, pointer, types = definitions[pointer]
            if operation == "tt.addptr" and not types.startswith("tensor"):
                return int(types.rpartition(", i")[2])
        return 64

    def base(pointer: str) -> str:
        while pointer in definitions:
            pointer = definitions[pointer][1]
        return pointer

    accesses = []
    for loop, line in _lines_of_loops(ttir):
        # Branches and loops side by side may each give a name of theirs to another value.
        if definition := _DEFINITION.match(line):
            name, operation, of, types = definition.groups()
            definitions[name] = operation, of, types
        if (found := _TILE_ACCESS.search(line)) and base(found[2]) != _PARTIALS:
            kind, pointer, rows, columns, bits, location = found.groups()
            accesses.append(
                Access(
                    kind == "load", (int(rows), int(columns)), int(bits) // 8, offset_bits(pointer), source(location),
                    base(pointer), loop,
                )
            )  # fmt: skip
    if not any(access.itemsize > 1 for access in accesses):
        raise UnreadableError("Triton's code has no access to a tile")
    return accesses


def _lines_of_loops(ttir: str) -> Iterator[tuple[int, str]]:
    """Every line, with the number of the innermost loop that it is in."""
    depth, number = 0, 0
    open_loops = [(-1, 0)]
    for line in ttir.splitlines():
        deeper = line.count("{") - line.count("}")
        if deeper > 0 and re.search(r"\bscf\.(for|while)\b", line):
            number += 1
            open_loops.append((depth, number))
        depth += deeper
        if depth <= open_loops[-1][0]:
            open_loops.pop()
        yield open_loops[-1][1], line


FLOAT_ATOMIC = re.compile(r"(RED|ATOM)\w*\..*(F16|BF16|F32|F64)|(global|buffer|flat)_atomic_\w*f(16|32|64)")
FLOAT64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)\b|F64|^MUFU.*64|_f64")


def widths(opcodes: Iterable[str], loads: bool) -> dict[int, int]:
    """How many loads or stores there are of each width, the widest first."""
    counts = Counter(width_of(opcode, loads) for opcode in opcodes)
    return {width: counts[width] for width in sorted(counts, reverse=True) if width}


def read_back(kernel: CompiledKernel, accesses: list[Access]) -> MachineCode:
    """Of a compiled kernel, with the inner loop that streams most by its ``accesses``. Raises: UnreadableError."""
    if "cubin" in kernel.asm:
        streamed = frozenset(a.source for a in _streamed(accesses)) if accesses else None
        return read_cubin(kernel.asm["cubin"], kernel.asm["ptx"], streamed)
    return read_amdgcn(kernel.asm["amdgcn"])


@lru_cache(maxsize=1024)
def read_cubin(cubin: bytes, ptx: str, streamed: frozenset[Source] | None) -> MachineCode:
    """Of NVIDIA's format, by the disassembler that Triton's package carries. A spill is a use of local memory.

    ``streamed``: of which statements are the loads that make a loop the inner one; None: of all.

    Which statement a transfer is of is read in the PTX, which has each where it was written: the lines that the
    assembler notes are at times those of a neighbour, some lines further on: enough to tell one loop from another.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output_of(knobs.nvidia.nvdisasm.path, "-c", "-ndf", "-gi", file.name)
        usage = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    code = instructions(sass)
    opcodes = [instruction.opcode for instruction in code]
    transfers = transfers_of(ptx, streamed)
    sources = sorted({t.source for t in transfers})

    def is_streamed(noted: Source) -> bool:
        return streamed is None or max((s for s in sources if s <= noted), default=noted) in streamed

    for loads in (True, False):
        written, assembled = Counter(t.width for t in transfers if t.loads == loads), widths(opcodes, loads)
        # Not their numbers: the assembler repeats some, and drops one that it finds to be another's.
        if written.keys() != assembled.keys():
            raise UnreadableError(f"its PTX has transfers of {dict(written)} bits, its machine code of {assembled}")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    if not opcodes or len(found) != 3:
        raise UnreadableError("the disassembler's output is not as it was")
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    try:
        loop = inner_loop(code, is_streamed)
    except UnreadableError:
        # Whether it should have one is the reader's to say.
        loop = None
    return MachineCode(opcodes, transfers, int(found["REG"]), spilled, loop)


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnreadableError(str(error)) from error


_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+) "(.+?)"', re.MULTILINE)
_PTX = re.compile(
    r"^\s*(?:\.loc\s+(\d+) (\d+)|// (begin|end) inline asm"
    r"|(?:@!?%p\d+ )?(ld|st)\.(?:\w+\.)*global\S*?(?:\.v(\d))?\.[a-z](\d+) "
    r"|cp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (0x\w+)"
    r"|(?:@!?%p\d+ )?bra(?:\.uni)?\s+(\$\w+);|(\$L__BB\w+):)",
    re.MULTILINE,
)


def transfers_of(ptx: str, streamed: frozenset[Source] | None = None) -> list[Transfer]:
    """Each with the statement that it was written for, and whether it is in the inner loop, of ``streamed`` loads.

    Triton writes a load as inline assembly of several lines. LLVM, as of Triton 3.8, counts a line of the source for
    each of them, so that the load itself is said to be of a line further on, which may be another statement's.
    """
    files = dict(_PTX_FILE.findall(ptx))
    source = ("", 0)
    transfers: dict[int, Transfer] = {}
    branches: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    inside = counting = False
    for at, (file, line, mark, kind, vector, bits, copied, target, label) in enumerate(_PTX.findall(ptx)):
        if mark:
            inside, counting = mark == "begin", False
        elif copied:
            transfers[at] = Transfer(True, 8 * int(copied, 16), source)
        elif kind:
            transfers[at] = Transfer(kind == "ld", int(vector or 1) * int(bits), source)
        elif target:
            branches.append((at, target))
        elif label:
            labels[label] = at
        else:
            source = source if counting else (files.get(file, ""), int(line))
            counting = inside

    def loaded(loop: range) -> int:
        wanted = (t for at, t in transfers.items() if at in loop and (streamed is None or t.source in streamed))
        return sum(t.width for t in wanted if t.loads)

    inner = innermost(((at, labels[target]) for at, target in branches if target in labels), loaded) or range(0)
    return [transfer._replace(inner=at in inner) for at, transfer in transfers.items()]


_GCN = re.compile(r'^\t\.file\t(\d+) "(.*?)" "(.*?)"|^\t\.loc\t(\d+) (\d+)|^\t([a-z]\w+) ', re.MULTILINE)


@lru_cache(maxsize=1024)
def read_amdgcn(assembly: str) -> MachineCode:
    """Of AMD's assembly, which carries its own counts of vector registers and of spills."""
    files: dict[str, str] = {}
    source = ("", 0)
    opcodes, transfers = [], []
    for number, folder, name, file, line, opcode in _GCN.findall(assembly):
        if number:
            files[number] = f"{folder}/{name}"
        elif file:
            source = files.get(file, ""), int(line)
        else:
            opcodes.append(opcode)
            transfers += [
                Transfer(loads, width, source) for loads in (True, False) if (width := width_of(opcode, loads))
            ]
    found = dict(re.findall(r"^ +\.(vgpr_count|[sv]gpr_spill_count): +(\d+)", assembly, re.MULTILINE))
    if not opcodes or len(found) != 3:
        raise UnreadableError("the assembly is not as it was")
    spilled = int(found["sgpr_spill_count"]) + int(found["vgpr_spill_count"])
    return MachineCode(opcodes, transfers, int(found["vgpr_count"]), spilled, None)
