"""Reads what Triton compiled: the tiles that its own code accesses, and the machine code that became of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel

Source = tuple[str, int]
"""A file and the line in it where a statement begins."""


class UnreadableError(Exception):
    """What this version of Triton, or of a tool that it carries, writes is not what this module knows."""


class Transfer(NamedTuple):
    """A load from, or a store to, global memory; ``width`` in bits, of each thread."""

    loads: bool
    width: int
    source: Source


class Access(NamedTuple):
    """A load or a store of a tile of an activation or, of one byte, of a bit mask."""

    loads: bool
    elements: int
    itemsize: int
    offset_bits: int
    source: Source


class MachineCode(NamedTuple):
    """``registers`` of a thread, ``spilled`` bytes or registers."""

    opcodes: list[str]
    transfers: list[Transfer]
    registers: int
    spilled: int


def narrowest(activations: list[Access], transfers: list[Transfer]) -> int:
    """The width of the narrowest access to an activation. Raises: UnreadableError where one has become no transfer."""
    found: dict[tuple[bool, Source], int] = {}
    for loads, width, source in transfers:
        found[loads, source] = min(width, found.get((loads, source), width))
    for access in activations:
        if (access.loads, access.source) not in found:
            kind, (file, line) = "load" if access.loads else "store", access.source
            raise UnreadableError(f"no instruction is said to be of the {kind} in line {line} of {file}")
    return min((found[a.loads, a.source] for a in activations), default=0)


_DEFINITION = re.compile(r"^ *(%[\w#]+) = (tt\.\w+) (%[\w#]+).* : (.*) loc\(", re.MULTILINE)
_TILE_ACCESS = re.compile(
    r"tt\.(load|store) (%[\w#]+).* : tensor<(\d+)x(\d+)x!tt\.ptr<([a-z]+)(\d+)>> loc\((#loc\d+)\)"
)
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)


def tile_accesses(ttir: str) -> list[Access]:
    """The loads and stores of whole tiles in a streaming kernel's Triton code, of which it has some."""
    definitions = {name: (operation, of, types) for name, operation, of, types in _DEFINITION.findall(ttir)}
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

    accesses = [
        Access(kind == "load", int(rows) * int(columns), int(bits) // 8, offset_bits(pointer), source(location))
        for kind, pointer, rows, columns, _, bits, location in _TILE_ACCESS.findall(ttir)
    ]
    if not any(access.itemsize > 1 for access in accesses):
        raise UnreadableError("Triton's code has no access to a tile")
    return accesses


FLOAT_ATOMIC = re.compile(r"(RED|ATOM)\w*\..*(F16|BF16|F32|F64)|(global|buffer|flat)_atomic_\w*f(16|32|64)")
FLOAT64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)\b|F64|^MUFU.*64|_f64")
_NVIDIA_ACCESS = re.compile(r"(LDG|STG)\b(?:.*?\.[US]?(8|16|64|128|256)(?=\.|$))?")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def width_of(opcode: str, loads: bool) -> int:
    """Bits that each thread moves in a load from, or a store to, global memory; 0 for any other instruction."""
    if access := _NVIDIA_ACCESS.match(opcode):
        return int(access[2] or 32) if (access[1] == "LDG") == loads else 0
    if access := _AMD_ACCESS.match(opcode):
        return _AMD_BITS[access[2]] if (access[1] == "load") == loads else 0
    return 0


def widths(opcodes: Iterable[str], loads: bool) -> dict[int, int]:
    """How many loads or stores there are of each width, the widest first."""
    counts = Counter(width_of(opcode, loads) for opcode in opcodes)
    return {width: counts[width] for width in sorted(counts, reverse=True) if width}


def read_back(kernel: CompiledKernel) -> MachineCode:
    """Of a compiled kernel. Raises: UnreadableError."""
    if "cubin" in kernel.asm:
        return read_cubin(kernel.asm["cubin"], kernel.asm["ptx"])
    return read_amdgcn(kernel.asm["amdgcn"])


_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@lru_cache(maxsize=1024)
def read_cubin(cubin: bytes, ptx: str) -> MachineCode:
    """Of NVIDIA's format, by the disassembler that Triton's package carries. A spill is a use of local memory.

    Which statement a transfer is of is read in the PTX, which has each where it was written: the lines that the
    assembler notes are at times those of a neighbour.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output_of(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    opcodes = [opcode for opcode in _SASS.findall(sass) if opcode != "NOP"]
    transfers = transfers_of(ptx)
    for loads in (True, False):
        written, assembled = Counter(t.width for t in transfers if t.loads == loads), widths(opcodes, loads)
        # Not their numbers: the assembler repeats some, and drops one that it finds to be another's.
        if written.keys() != assembled.keys():
            raise UnreadableError(f"its PTX has transfers of {dict(written)} bits, its machine code of {assembled}")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    if not opcodes or len(found) != 3:
        raise UnreadableError("the disassembler's output is not as it was")
    return MachineCode(opcodes, transfers, int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]))


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnreadableError(str(error)) from error


_PTX_FILE = re.compile(r'^\s*\.file\s+(\d+) "(.+?)"', re.MULTILINE)
_PTX = re.compile(
    r"^\s*(?:\.loc\s+(\d+) (\d+)|// (begin|end) inline asm"
    r"|(?:@!?%p\d+ )?(ld|st)\.(?:\w+\.)*global\S*?(?:\.v(\d))?\.[a-z](\d+) )",
    re.MULTILINE,
)


def transfers_of(ptx: str) -> list[Transfer]:
    """Each with the statement that it was written for.

    Triton writes a load as inline assembly of several lines. LLVM, as of Triton 3.8, counts a line of the source for
    each of them, so that the load itself is said to be of a line further on, which may be another statement's.
    """
    files = dict(_PTX_FILE.findall(ptx))
    source = ("", 0)
    transfers = []
    inside = counting = False
    for file, line, mark, kind, vector, bits in _PTX.findall(ptx):
        if mark:
            inside, counting = mark == "begin", False
        elif kind:
            transfers.append(Transfer(kind == "ld", int(vector or 1) * int(bits), source))
        else:
            source = source if counting else (files.get(file, ""), int(line))
            counting = inside
    return transfers


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
    return MachineCode(opcodes, transfers, int(found["vgpr_count"]), spilled)
