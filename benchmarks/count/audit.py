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
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import NamedTuple

import torch
import triton
from console.arguments import write_json
from console.progress import track
from console.rows import Rows
from resfused.kernels import gpu
from resfused.kernels.geometry import Geometry, geometry
from resfused.kernels.gpu import launch_table
from rich.console import Console
from torch import Tensor

from count.machine_code import (
    FLOAT64,
    FLOAT_ATOMIC,
    Access,
    UnreadableError,
    narrowest,
    read_back,
    tile_accesses,
    widths,
)
from count.offline import Launch, compiling_for

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


@dataclass(frozen=True)
class Row:
    """One launch. Widths are in bits; ``narrowest`` is that of the accesses to activations."""

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


class Audit(NamedTuple):
    """The launches that could be read back, and of each other one which it is and why not."""

    rows: list[Row]
    unread: list[str]


def rows_of(task: Task) -> Audit:
    """Every launch of a task, compiled and read back. Needs a process without TRITON_INTERPRET."""
    rows, unread = [], []
    dtype = getattr(torch, task.dtype)
    for shape, form, phase in product(task.shapes, FORMS, PHASES):
        g = geometry(torch.empty(shape, device="meta", memory_format=LAYOUTS[task.layout]))
        with compiling_for(task.architecture) as launches:
            compile_launches(form, phase, dtype, task.layout, shape)
        for launch in launches:
            try:
                rows.append(row_of(task, shape, form, phase, g, launch))
            except UnreadableError as error:
                unread.append(f"{task.architecture} {launch.kernel.name} ({form}, {phase}, {task.dtype}): {error}")
    return Audit(rows, unread)


def row_of(task: Task, shape: tuple[int, ...], form: str, phase: str, g: Geometry, launch: Launch) -> Row:
    kernel = launch.kernel
    architecture = ARCHITECTURES[task.architecture]
    name = kernel.name.removeprefix("_").removesuffix("_kernel")
    streams = (name, g.channels_last) in launch_table.STREAMING
    code = read_back(kernel)
    accesses = tile_accesses(kernel.asm["ttir"]) if streams else []
    activations = [a for a in accesses if a.itemsize > 1]
    warps = kernel.metadata.num_warps
    resident = resident_programs(architecture, warps, code.registers, kernel.metadata.shared)
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
        registers=code.registers,
        spilled=code.spilled,
        shared=kernel.metadata.shared,
        instructions=len(code.opcodes),
        loads=widths(code.opcodes, loads=True),
        stores=widths(code.opcodes, loads=False),
        float_atomics=sum(FLOAT_ATOMIC.match(opcode) is not None for opcode in code.opcodes),
        float64=sum(FLOAT64.search(opcode) is not None for opcode in code.opcodes),
        narrowest=narrowest(activations, code.transfers),
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


def audit(tasks: list[Task], console: Console) -> Audit:
    """All tasks, compiled in processes of their own."""
    with compiler_environment(), ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(rows_of, task) for task in tasks]
        finished = track(as_completed(futures), "Compiling", console, len(futures))
        found = [future.result() for future in finished]
    rows = sorted((row for each in found for row in each.rows), key=_order)
    return Audit(rows, [reason for each in found for reason in each.unread])


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
    """Prints the audit; 0 if every launch that can be read keeps every budget, else 1."""
    console = Console()
    default = ("sm_90",) if args.short else DEFAULT_ARCHITECTURES
    rows, unread = audit(tasks_of(args.arch or default, args.short), console)
    show(rows, console)
    broken = [(row, violations(row)) for row in rows if violations(row)]
    for row, found in broken:
        case = f"{row.architecture} {row.kernel} ({row.form}, {row.phase}, {row.dtype}, {row.layout}, {row.shape})"
        console.print(f"[red]{case}: {'; '.join(found)}", soft_wrap=True, highlight=False)
    kernels_compiled = len({(row.architecture, row.hash) for row in rows})
    console.print(f"{len(rows)} launches, {kernels_compiled} kernels, {len(broken)} launches over budget")
    if unread:
        what = f"{len(unread)} launches more not judged: what Triton {triton.__version__} makes of them cannot be read."
        console.print(what, unread[0], style="yellow", markup=False, soft_wrap=True, highlight=False)
    if args.json:
        write_json(args.json, [asdict(row) | {"violations": violations(row)} for row in rows])
    return 1 if broken else 0
