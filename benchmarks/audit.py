"""The machine code of the library's own launches, and the budgets it is held to. Needs no GPU.

Every launch of a forward and a backward is compiled for each architecture, on tensors without data, and read back
from the disassembly. Per multiprocessor:

    resident programs = min(blocks, warps / (warps of a program), registers / (registers of a program),
                            shared memory / (shared memory of a program))
    bytes in flight   = min(resident programs, grid / multiprocessors) · tile elements · share of them inside the shape
                        · Σ element size over the activations that a tile loads
    bytes it has      = elements of the shape · the same Σ / multiprocessors

A tile's activation loads do not depend on each other, so all of a tile's are on their way at once. A bit mask and
vectors over channels are not counted.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from arguments import write_json
from offline import Launch, compiling_for
from progress import track
from resfused.kernels import gpu
from resfused.kernels.geometry import Geometry, geometry
from resfused.kernels.gpu import launch_table
from rich.console import Console
from rows import Rows
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

KIB = 1024
IN_FLIGHT = 32 * KIB
"""Bytes of activation loads in flight that hide the latency of memory on a multiprocessor of sm_90."""
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
WORKERS = 2


class Architecture(NamedTuple):
    """Limits of one multiprocessor, and how many there are. Registers are 32-bit words, shared memory is bytes."""

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
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The residual, and whether it is normed too.
FORMS = {"norm+relu": (False, False), "norm+add+relu": (True, False), "norm+add(norm)+relu": (True, True)}
PHASES = ("training forward", "training backward", "eval forward")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
RESNET50 = (
    (256, 64, 56, 56),
    (256, 256, 56, 56),
    (256, 2048, 7, 7),
    (256, 64, 112, 112),
    (256, 128, 56, 56),
    (256, 128, 28, 28),
    (256, 512, 28, 28),
    (256, 256, 28, 28),
    (256, 256, 14, 14),
    (256, 1024, 14, 14),
    (256, 512, 14, 14),
    (256, 512, 7, 7),
)
ODD = (256, 130, 28, 28)
# 2^33 elements: neither an element's offset nor a byte's fits 32 bits.
HUGE = (4096, 64, 256, 128)
DTYPES = {
    "bfloat16": (*RESNET50, ODD, HUGE),
    "float16": (*RESNET50[:3], ODD),
    "float32": (*RESNET50[:3], ODD),
    "float64": (ODD,),
}


class Task(NamedTuple):
    """What one call of a worker compiles: every form and phase of these shapes."""

    architecture: str
    dtype: str
    layout: str
    shapes: tuple[tuple[int, ...], ...]


class Instruction(NamedTuple):
    opcode: str
    source: tuple[str, int]
    """The file and the line that it was compiled from."""


class Access(NamedTuple):
    """A load or a store of a tile of an activation or, of one byte, of a bit mask."""

    loads: bool
    elements: int
    itemsize: int
    offset_bits: int
    source: tuple[str, int]


@dataclass(frozen=True)
class Row:
    """One launch. Widths are in bits; ``narrowest`` is that of the accesses to activations, 0 where one is missing."""

    architecture: str
    kernel: str
    form: str
    phase: str
    dtype: str
    layout: str
    shape: tuple[int, ...]
    hash: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    float_atomics: int
    float64: int
    narrowest: int
    least_width: int
    offset_bits: int
    resident_warps: int
    in_flight: int
    available: int


def violations(row: Row) -> list[str]:
    """The budgets that a launch breaks."""
    found = []
    if row.spilled:
        found.append(f"spills {row.spilled}")
    if row.narrowest < row.least_width:
        found.append(f"accesses an activation {row.narrowest} bits wide, not {row.least_width}")
    if row.float_atomics:
        found.append(f"{row.float_atomics} floating-point atomics")
    if row.float64 and row.dtype != "float64":
        found.append(f"{row.float64} float64 instructions for {row.dtype} activations")
    if row.architecture == "sm_90" and row.shape in RESNET50 and row.in_flight < min(IN_FLIGHT, row.available):
        found.append(f"{row.in_flight} bytes in flight, of {min(IN_FLIGHT, row.available)}")
    if any(blocks > most for blocks, most in zip(row.grid, MOST_BLOCKS, strict=False)):
        found.append(f"grid {row.grid}")
    if row.offset_bits < 64:
        found.append(f"offsets of activations in {row.offset_bits} bits")
    return found


def compile_launches(form: str, phase: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """Makes the launches of one form and phase, on tensors that have no data."""
    has_residual, norm_residual = FORMS[form]

    def activation() -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])

    def norm() -> gpu.Norm:
        vectors = [torch.empty(shape[1], dtype=accumulator, device="meta") for _ in range(4)]
        return gpu.Norm(*vectors, momentum=0.1, eps=1e-5)

    accumulator = gpu.accumulator(activation())
    x = activation()
    residual = activation() if has_residual else None
    norms = norm(), norm() if norm_residual else None
    if phase != "training backward":
        training = phase == "training forward"
        gpu.forward(x, residual, *norms, training=training, save_mask=training)
        return
    masked = has_residual and not norm_residual
    gpu.backward(
        activation(),
        None,
        x,
        residual if norm_residual else None,
        dtype if masked else None,
        torch.empty(geometry(x).mask_numel, dtype=torch.uint8, device="meta") if masked else None,
        torch.empty((4 if norm_residual else 2, shape[1]), dtype=accumulator, device="meta"),
        *norms,
        gpu.Gradients(*[True] * 6),
    )


def rows_of(task: Task) -> list[Row]:
    """Every launch of a task, compiled and read back. Needs a process without TRITON_INTERPRET."""
    rows = []
    dtype = getattr(torch, task.dtype)
    for shape, form, phase in product(task.shapes, FORMS, PHASES):
        g = geometry(torch.empty(shape, device="meta", memory_format=LAYOUTS[task.layout]))
        with compiling_for(task.architecture) as launches:
            compile_launches(form, phase, dtype, task.layout, shape)
        rows += [row_of(task, shape, form, phase, g, launch) for launch in launches]
    return rows


def row_of(task: Task, shape: tuple[int, ...], form: str, phase: str, g: Geometry, launch: Launch) -> Row:
    kernel = launch.kernel
    architecture = ARCHITECTURES[task.architecture]
    name = kernel.name.removeprefix("_").removesuffix("_kernel")
    streams = (name, g.channels_last) in launch_table.STREAMING
    code, registers, spilled = read_back(kernel)
    accesses = tile_accesses(kernel.asm["ttir"]) if streams else []
    activations = [a for a in accesses if a.itemsize > 1]
    warps = kernel.metadata.num_warps
    resident = resident_programs(architecture, warps, registers, kernel.metadata.shared)
    loaded = sum(a.itemsize for a in activations if a.loads)
    in_flight = tile_elements_inside(name, g, task.dtype == "float64") * loaded if streams else 0.0
    return Row(
        architecture=task.architecture,
        kernel=name,
        form=form,
        phase=phase,
        dtype=task.dtype,
        layout=task.layout,
        shape=shape,
        hash=kernel.hash,
        grid=launch.grid,
        warps=warps,
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        instructions=len(code),
        loads=widths(code, loads=True),
        stores=widths(code, loads=False),
        float_atomics=sum(_FLOAT_ATOMIC.match(i.opcode) is not None for i in code),
        float64=sum(_FLOAT64.search(i.opcode) is not None for i in code),
        narrowest=narrowest(activations, code),
        least_width=least_width(activations, g, warps * architecture.lanes),
        offset_bits=min((a.offset_bits for a in accesses), default=64),
        resident_warps=resident * warps,
        in_flight=int(in_flight * min(resident, math.prod(launch.grid) / architecture.multiprocessors)),
        available=g.numel * loaded // architecture.multiprocessors,
    )


def resident_programs(architecture: Architecture, warps: int, registers: int, shared: int) -> int:
    """Programs that one multiprocessor holds at a time. A warp's registers lie in one of its partitions."""
    unit = architecture.register_unit
    of_a_warp = -(-registers * architecture.lanes // unit) * unit
    by_registers = architecture.partitions * (architecture.registers // architecture.partitions // of_a_warp)
    of_a_block = shared + architecture.reserved
    by_shared = architecture.shared // of_a_block if of_a_block else architecture.blocks
    return min(architecture.blocks, architecture.warps // warps, by_registers // warps, by_shared)


def tile_elements_inside(kernel: str, g: Geometry, wide: bool) -> float:
    """Elements of a tile, on average, that are inside the shape."""
    launch = launch_table.streaming(kernel, g, wide)
    tiles = g.groups * -(-g.positions // launch.block_positions) * launch.channel_blocks
    return g.numel / tiles


def least_width(activations: list[Access], g: Geometry, threads: int) -> int:
    """128 where 16 bytes of an activation always lie side by side, and a tile has as many for each thread; else 0."""
    neighbours = math.gcd(g.inner, 16)
    wide = all(a.itemsize * min(neighbours, a.elements // threads) >= 16 for a in activations)
    return 128 if activations and wide else 0


def narrowest(activations: list[Access], code: list[Instruction]) -> int:
    """The width of the narrowest access to an activation, by the source lines of the machine code."""
    found: dict[tuple[bool, tuple[str, int]], int] = {}
    for loads, i in product((True, False), code):
        if width := width_of(i.opcode, loads):
            found[loads, i.source] = min(width, found.get((loads, i.source), width))
    return min((found.get((a.loads, a.source), 0) for a in activations), default=0)


_DEFINITION = re.compile(r"^ *(%[\w#]+) = (tt\.\w+) (%[\w#]+).* : (.*) loc\(", re.MULTILINE)
_TILE_ACCESS = re.compile(
    r"tt\.(load|store) (%[\w#]+).* : tensor<(\d+)x(\d+)x!tt\.ptr<([a-z]+)(\d+)>> loc\((#loc\d+)\)"
)
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)


def tile_accesses(ttir: str) -> list[Access]:
    """The loads and stores of whole tiles in a streaming kernel's Triton code."""
    definitions = {name: (operation, of, types) for name, operation, of, types in _DEFINITION.findall(ttir)}
    locations = dict(_LOCATION.findall(ttir))

    def source(location: str) -> tuple[str, int]:
        """The innermost line of a location, through names and inlined calls."""
        while (place := re.match(r'"(.+)":(\d+):', locations[location])) is None:
            location = re.findall(r"#loc\d+", locations[location])[0]
        return place[1], int(place[2])

    def offset_bits(pointer: str) -> int:
        """Width of the scalar offset under a tile of pointers: 64 too where there is none."""
        while pointer in definitions:
            operation, pointer, types = definitions[pointer]
            if operation == "tt.addptr" and not types.startswith("tensor"):
                return int(types.rpartition(", i")[2])
        return 64

    return [
        Access(kind == "load", int(rows) * int(columns), int(bits) // 8, offset_bits(pointer), source(location))
        for kind, pointer, rows, columns, _, bits, location in _TILE_ACCESS.findall(ttir)
    ]


_FLOAT_ATOMIC = re.compile(r"(RED|ATOM)\w*\..*(F16|BF16|F32|F64)|(global|buffer|flat)_atomic_\w*f(16|32|64)")
_FLOAT64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)\b|F64|^MUFU.*64|_f64")
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


def widths(code: Iterable[Instruction], loads: bool) -> dict[int, int]:
    """How many loads or stores there are of each width, the widest first."""
    counts = Counter(width_of(i.opcode, loads) for i in code)
    return {width: counts[width] for width in sorted(counts, reverse=True) if width}


def read_back(kernel: CompiledKernel) -> tuple[list[Instruction], int, int]:
    """(machine code, registers of a thread, spilled bytes or registers) of a compiled kernel."""
    return read_cubin(kernel.asm["cubin"]) if "cubin" in kernel.asm else read_amdgcn(kernel.asm["amdgcn"])


_SASS = re.compile(r'File "(.+?)", line (\d+)|^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)', re.MULTILINE)


@lru_cache(maxsize=1024)
def read_cubin(cubin: bytes) -> tuple[list[Instruction], int, int]:
    """Of NVIDIA's format, by the disassembler that Triton's package carries. A spill is a use of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([*command, file.name], capture_output=True, check=True, text=True).stdout
            for command in (
                [knobs.nvidia.nvdisasm.path, "-c", "-g"],
                [knobs.nvidia.cuobjdump.path, "--dump-resource-usage"],
            )
        )
    source = ("", 0)
    code = []
    for file_name, line, opcode in _SASS.findall(sass):
        if file_name:
            source = file_name, int(line)
        elif opcode != "NOP":
            code.append(Instruction(opcode, source))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return code, int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


_GCN = re.compile(r'^\t\.file\t(\d+) "(.*?)" "(.*?)"|^\t\.loc\t(\d+) (\d+)|^\t([a-z]\w+) ', re.MULTILINE)


@lru_cache(maxsize=1024)
def read_amdgcn(assembly: str) -> tuple[list[Instruction], int, int]:
    """Of AMD's assembly, which carries its own counts of vector registers and of spills."""
    files: dict[str, str] = {}
    source = ("", 0)
    code = []
    for number, folder, name, file, line, opcode in _GCN.findall(assembly):
        if number:
            files[number] = f"{folder}/{name}"
        elif file:
            source = files[file], int(line)
        else:
            code.append(Instruction(opcode, source))
    found = dict(re.findall(r"^ +\.(vgpr_count|[sv]gpr_spill_count): +(\d+)", assembly, re.MULTILINE))
    return code, int(found["vgpr_count"]), int(found["sgpr_spill_count"]) + int(found["vgpr_spill_count"])


@contextmanager
def compiler_environment() -> Iterator[None]:
    """Processes started within it compile, whatever this one does, and find nothing compiled before."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def audit(tasks: list[Task], console: Console) -> list[Row]:
    """The rows of all tasks, compiled in processes of their own."""
    with compiler_environment(), ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(rows_of, task) for task in tasks]
        finished = track(as_completed(futures), "Compiling", console, len(futures))
        return sorted((row for future in finished for row in future.result()), key=_order)


def tasks_of(architectures: Iterable[str], short: bool) -> list[Task]:
    """All shapes of all dtypes or, short, one shape in bfloat16 on the first architecture. The longest come first."""
    dtypes = {"bfloat16": RESNET50[:1]} if short else DTYPES
    chosen = list(architectures)[:1] if short else list(architectures)
    return [
        Task(architecture, dtype, layout, shapes)
        for dtype, shapes in dtypes.items()
        for architecture, layout in product(chosen, LAYOUTS)
    ]


def _order(row: Row) -> tuple[int | str, ...]:
    """Rows of one kernel side by side, those with the least in flight of what they could have first."""
    margin = int(KIB * row.in_flight / max(row.available, 1))
    return (
        list(ARCHITECTURES).index(row.architecture),
        list(DTYPES).index(row.dtype),
        row.layout,
        row.kernel,
        row.form,
        row.phase,
        row.hash,
        margin,
    )


def show(rows: list[Row], console: Console) -> None:
    """One line for each distinct kernel, with the launch of it that has the least in flight."""
    distinct = {(row.architecture, row.hash): row for row in reversed(rows)}
    for architecture in dict.fromkeys(row.architecture for row in rows):
        table = Rows(
            architecture,
            keys=("kernel", "form", "phase", "dtype", "layout", "shape", "grid"),
            values=("regs", "spill", "shared", "instr", "loads", "stores", "warps/SM", "KiB in flight"),
        )
        for row in reversed(distinct.values()):
            if row.architecture == architecture:
                table.add(*_cells(row), style="red" if violations(row) else "")
        console.print(table)


def _cells(row: Row) -> list[str]:
    return [
        row.kernel,
        row.form,
        row.phase,
        row.dtype,
        row.layout,
        "×".join(map(str, row.shape)),
        "×".join(map(str, row.grid)),
        str(row.registers),
        str(row.spilled),
        str(row.shared),
        str(row.instructions),
        *(" ".join(f"{n}·{width}" for width, n in counts.items()) for counts in (row.loads, row.stores)),
        str(row.resident_warps),
        f"{row.in_flight / KIB:.1f}" if row.available else "",
    ]


def run(args: argparse.Namespace) -> int:
    """Prints the audit; 0 if every launch keeps every budget, else 1."""
    console = Console()
    default = ("sm_90",) if args.short else DEFAULT_ARCHITECTURES
    rows = audit(tasks_of(args.arch or default, args.short), console)
    show(rows, console)
    broken = [(row, violations(row)) for row in rows if violations(row)]
    for row, found in broken:
        case = f"{row.architecture} {row.kernel} ({row.form}, {row.phase}, {row.dtype}, {row.layout}, {row.shape})"
        console.print(f"[red]{case}: {'; '.join(found)}", soft_wrap=True, highlight=False)
    kernels_compiled = len({(row.architecture, row.hash) for row in rows})
    console.print(f"{len(rows)} launches, {kernels_compiled} kernels, {len(broken)} launches over budget")
    if args.json:
        write_json(args.json, [asdict(row) | {"violations": violations(row)} for row in rows])
    return 1 if broken else 0
