"""The machine code of the library's own launches, and the budgets it is held to. Needs no GPU.

Every launch of a forward and a backward is compiled for each architecture, on tensors without data, and read back:
what a step of the inner loop issues for an element, what it keeps in flight, and by ``ceilings`` the bandwidth that the
launch can reach at most on an A100, an H100 and an H200, with what binds it. Per multiprocessor:

    resident programs = min(blocks, warps / (warps of a program), registers / (registers of a program),
                            shared memory / (shared memory of a program))
    bytes in flight   = min(resident programs, grid / multiprocessors) · threads · share of tiles inside the shape
                        · bytes that a thread has on their way before it first uses one
    bytes it has      = elements of the shape · Σ element size over the activations that a tile loads / multiprocessors

A tile whose loads come one after the other waits for each: bandwidth counts its round trips.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from typing import NamedTuple

import torch
import triton
from console.arguments import write_json
from console.progress import track
from console.rows import Rows
from resfused.kernels.geometry import Geometry, geometry
from resfused.kernels.gpu import launch_table
from rich.console import Console
from workloads.nodes import FORMS, resnet50_nodes

from count.budgets import BATCH, BUDGETS, RESNET50, Loop, Row, StepCount, full, violations, worst
from count.ceilings import ARCHITECTURES, CARDS, KIB, Work, arithmetic, ceiling, pipe_counts, resident_programs
from count.machine_code import (
    FLOAT64,
    FLOAT_ATOMIC,
    Access,
    MachineCode,
    UnreadableError,
    narrowest,
    read_back,
    step_of,
    tile_accesses,
    widths,
)
from count.offline import (
    BACKWARD,
    FORKED,
    FORWARD,
    LAYOUTS,
    OTHER_FORMS,
    PHASES,
    Fills,
    Launch,
    compile_launches,
    compiler_environment,
    compiling_for,
)

WORKERS = 2
DEFAULT_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
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
    """What one call of a worker compiles: these forms and phases of these shapes."""

    architecture: str
    dtype: str
    layout: str
    shapes: tuple[tuple[int, ...], ...]
    forms: tuple[str, ...] = FORMS
    phases: tuple[str, ...] = PHASES


class Audit(NamedTuple):
    """The launches that could be read back, and of each other one which it is and why not.

    ``fills``: launches of PyTorch's own, by architecture, layout, form, phase and shape.
    """

    rows: list[Row]
    unread: list[str]
    fills: Counter[tuple[object, ...]]


def rows_of(task: Task) -> Audit:
    """Every launch of a task, compiled and read back. Needs a process without TRITON_INTERPRET."""
    found = Audit([], [], Counter())
    dtype = getattr(torch, task.dtype)
    for shape, form, phase in product(task.shapes, task.forms, task.phases):
        g = geometry(torch.empty(shape, device="meta", memory_format=LAYOUTS[task.layout]))
        card = launch_table.using(MULTIPROCESSORS=ARCHITECTURES[task.architecture].multiprocessors)
        with card, compiling_for(task.architecture) as launches:
            compile_launches(form, phase, dtype, task.layout, shape)
            compiled = launches.copy()
            # Again: what is cleared once and kept is there now.
            with Fills() as fills:
                compile_launches(form, phase, dtype, task.layout, shape)
        found.fills[task.architecture, task.layout, form, phase, shape] += fills.launches
        for launch in compiled:
            try:
                found.rows.append(row_of(task, shape, form, phase, g, launch))
            except UnreadableError as error:
                name = f"{task.architecture} {launch.kernel.name} ({form}, {phase}, {task.dtype})"
                found.unread.append(f"{name}: {error}")
    return found


def row_of(task: Task, shape: tuple[int, ...], form: str, phase: str, g: Geometry, launch: Launch) -> Row:
    kernel = launch.kernel
    architecture = ARCHITECTURES[task.architecture]
    name = kernel.name.removeprefix("_").removesuffix("_kernel")
    streams = (name, g.channels_last) in launch_table.STREAMING
    accesses = tile_accesses(kernel.asm["ttir"]) if streams else []
    code = read_back(kernel, accesses)
    activations = [a for a in accesses if a.itemsize > 1]
    loaded = {a.base: a.itemsize for a in activations if a.loads}
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
        warps=kernel.metadata.num_warps,
        registers=code.registers,
        spilled=code.spilled,
        shared=kernel.metadata.shared,
        instructions=len(code.opcodes),
        loads=widths(code.opcodes, loads=True),
        stores=widths(code.opcodes, loads=False),
        float_atomics=sum(FLOAT_ATOMIC.match(opcode) is not None for opcode in code.opcodes),
        float64=sum(FLOAT64.search(opcode) is not None for opcode in code.opcodes),
        narrowest=narrowest(activations, code.transfers),
        least_width=least_width(activations, g, kernel.metadata.num_warps * architecture.lanes),
        offset_bits=min((a.offset_bits for a in accesses), default=64),
        available=g.numel * sum(loaded.values()) // architecture.multiprocessors,
        # AMD's waits are not read.
        loop=_loop(task.architecture, g, launch, code, accesses) if streams and task.architecture[0] == "s" else None,
    )


def _loop(architecture: str, g: Geometry, launch: Launch, code: MachineCode, accesses: list[Access]) -> Loop:
    """Raises: UnreadableError where the machine code has no such loop."""
    step, loop = step_of(accesses, code), code.loop
    assert loop is not None
    metadata = launch.kernel.metadata
    limits = ARCHITECTURES[architecture]
    programs = resident_programs(limits, metadata.num_warps, code.registers, metadata.shared)
    grid = math.prod(launch.grid)
    waves = grid / (programs * limits.multiprocessors)
    tiles, inside = tiles_of(g, max(accesses, key=lambda a: a.elements).tile)
    threads = metadata.num_warps * limits.lanes * inside
    instructions = len(loop.opcodes) / step.elements
    pipes = {pipe: n / step.elements for pipe, n in pipe_counts(loop.opcodes).items()}
    work = Work(instructions, pipes, step.moved, programs * threads * loop.loaded / loop.round_trips, waves)
    cards = {name: card for name, card in CARDS.items() if card.architecture == architecture}
    return Loop(
        elements=step.elements,
        loaded=step.loaded,
        instructions=instructions,
        pipes=pipes,
        moved=step.moved,
        programs=programs,
        waves=waves,
        # A single wave is full where every multiprocessor has as many programs.
        last_wave=full(waves if waves > 1 else grid / limits.multiprocessors),
        fills=grid >= tiles,
        in_flight=int(min(programs, grid / limits.multiprocessors) * threads * loop.first),
        round_trips=loop.round_trips,
        arithmetic=arithmetic(work, architecture, CARDS["H100"].clock),
        ceilings={name: ceiling(work, card) for name, card in cards.items()},
    )


def tiles_of(g: Geometry, tile: tuple[int, int]) -> tuple[int, float]:
    """How many tiles of so many rows and columns a tensor has, and how much of them is inside it."""
    positions, columns = tile if g.channels_last else reversed(tile)
    tiles = g.groups * -(-g.positions // positions) * -(-g.columns // columns)
    return tiles, g.numel / (tiles * positions * columns)


def least_width(activations: list[Access], g: Geometry, threads: int) -> int:
    """128 where 16 bytes of an activation always lie side by side, and a tile has as many for each thread; else 0."""
    neighbours = math.gcd(g.inner, 16)
    wide = all(a.itemsize * min(neighbours, a.elements // threads) >= 16 for a in activations)
    return 128 if activations and wide else 0


def audit(tasks: list[Task], console: Console) -> Audit:
    """All tasks, compiled in processes of their own."""
    with compiler_environment(), ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(rows_of, task) for task in tasks]
        finished = track(as_completed(futures), "Compiling", console, len(futures))
        found = [future.result() for future in finished]
    rows = sorted((row for each in found for row in each.rows), key=_order)
    return Audit(rows, [reason for each in found for reason in each.unread], sum((e.fills for e in found), Counter()))


def tasks_of(architectures: Iterable[str], short: bool) -> list[Task]:
    """All shapes of all dtypes or, short, one shape in bfloat16 on the first architecture. The longest come first.

    The other activations' on that one shape.
    """
    dtypes = {"bfloat16": RESNET50[:1]} if short else DTYPES
    chosen = list(architectures)[:1] if short else list(architectures)
    tasks = [
        Task(architecture, dtype, layout, shapes)
        for dtype, shapes in dtypes.items()
        for architecture, layout in product(chosen, LAYOUTS)
    ]
    return tasks + [
        Task(architecture, "bfloat16", layout, RESNET50[:1], OTHER_FORMS, (FORWARD, BACKWARD))
        for architecture, layout in product(chosen, LAYOUTS)
    ]


def steps_of(found: Audit) -> list[StepCount]:
    """Of each architecture and layout whose launches on ResNet-50's activations in bfloat16 are all there."""
    of: dict[tuple[object, ...], list[Row]] = {}
    for row in found.rows:
        if row.dtype == "bfloat16":
            of.setdefault((row.architecture, row.layout, row.form, row.phase, row.shape), []).append(row)
    nodes = [
        (node, (node.form, phase, (BATCH, node.channels, node.height, node.width)))
        for node in resnet50_nodes()
        for phase in (FORWARD, FORKED if node.forked else BACKWARD)
    ]
    steps = []
    for where in dict.fromkeys(key[:2] for key in of):
        if not found.unread and all((*where, *which) in of for _, which in nodes):
            of_nodes = [(node.count, of[(*where, *which)], found.fills[(*where, *which)]) for node, which in nodes]
            launches = sum(n * (len(rows) + fills) for n, rows, fills in of_nodes)
            kernels = {row.hash for _, rows, _ in of_nodes for row in rows}
            steps.append(StepCount(str(where[0]), str(where[1]), launches, len(kernels)))
    return steps


def _order(row: Row) -> tuple[float | str, ...]:
    """Rows of one kernel side by side, the one that can reach the least first."""
    reach = min((c.bandwidth for c in row.loop.ceilings.values()), default=0.0) if row.loop else 0.0
    return (
        list(ARCHITECTURES).index(row.architecture),
        list(DTYPES).index(row.dtype),
        row.layout,
        row.kernel,
        row.form,
        row.phase,
        row.hash,
        reach,
    )


def show(rows: list[Row], console: Console) -> None:
    """One line for each distinct kernel, with the launch of it that can reach the least."""
    distinct = {(row.architecture, row.hash): row for row in reversed(rows)}
    for architecture in dict.fromkeys(row.architecture for row in rows):
        cards = [name for name, card in CARDS.items() if card.architecture == architecture]
        table = Rows(
            architecture,
            keys=("kernel", "form", "phase", "dtype", "layout", "shape", "grid"),
            values=(
                "regs", "spill", "loads", "stores", "instr/elem", "ALU/elem", "programs/SM", "waves", "KiB in flight",
                "round trips", "arithmetic TB/s", *(f"{card} TB/s" for card in cards),
            ),
            caption="Of streaming kernels' inner loops. KiB: of a multiprocessor, before the first use. TB/s: at most.",
        )  # fmt: skip
        for row in reversed(distinct.values()):
            if row.architecture == architecture:
                table.add(*_cells(row, cards), style="red" if violations(row) else "")
        console.print(table)


def _cells(row: Row, cards: list[str]) -> list[str]:
    accesses = (" ".join(f"{n}·{width}" for width, n in counts.items()) for counts in (row.loads, row.stores))
    names = [row.kernel, row.form, row.phase, row.dtype, row.layout, "×".join(map(str, row.shape))]
    cells = [*names, "×".join(map(str, row.grid)), str(row.registers), str(row.spilled), *accesses]
    if row.loop is None:
        return [*cells, *[""] * (7 + len(cards))]
    loop = row.loop
    numbers = [f"{loop.instructions:.1f}", f"{loop.pipes.get('ALU', 0):.1f}", str(loop.programs), f"{loop.waves:.2f}"]
    reached = [loop.arithmetic, *(loop.ceilings[card] for card in cards)]
    ceilings = [f"{c.bandwidth:.1f} {c.limit}" for c in reached]
    return [*cells, *numbers, f"{loop.in_flight / KIB:.1f}", f"{loop.round_trips:.1f}", *ceilings]


def goal_table(rows: list[Row], steps: list[StepCount]) -> Rows:
    """Every budget and the launch that is nearest to it or furthest over it."""
    table = Rows("Budgets", keys=("figure", "of"), values=("worst", "budget"))
    for budget in BUDGETS:
        if found := worst(budget, rows):
            figure, row = found
            table.add(
                budget.what, row.place, f"{figure:.3g}", budget.wanted, style="" if budget.keeps(figure) else "red"
            )
    for step in steps:
        of = f"{step.architecture}, {step.layout}"
        for what, n, most in step.counts:
            table.add(
                f"{what} of a ResNet-50 step, batch {BATCH}", of, str(n), f"<= {most}", style="red" if n > most else ""
            )
    return table


def run(args: argparse.Namespace) -> int:
    """Prints the audit; 0 if every launch that can be read keeps every budget, else 1."""
    console = Console()
    default = ("sm_90",) if args.short else DEFAULT_ARCHITECTURES
    found = audit(tasks_of(args.arch or default, args.short), console)
    rows, steps = found.rows, steps_of(found)
    show(rows, console)
    console.print(goal_table(rows, steps))
    broken = [row for row in rows if violations(row)]
    kernels = len({(row.architecture, row.hash) for row in rows})
    over = sum(n > most for step in steps for _, n, most in step.counts)
    console.print(f"{len(rows)} launches, {kernels} kernels, {len(broken)} launches and {over} counts over budget")
    if found.unread:
        what = f"{len(found.unread)} launches more not judged: what Triton {triton.__version__} makes of them cannot be"
        console.print(f"{what} read.", found.unread[0], style="yellow", markup=False, soft_wrap=True, highlight=False)
    if args.json:
        of_rows = [asdict(row) | {"violations": violations(row)} for row in rows]
        write_json(args.json, {"rows": of_rows, "steps": [step._asdict() for step in steps]})
    return 1 if broken or over else 0
