"""Times of single nodes: ours against what a user would otherwise pick, forward, backward and both.

Medians are reported. GB/s is of the least bytes that two-phase kernels must move, whatever was moved. Nothing is timed
before its results on the same tensors were compared with float64. A second run of ours shows the noise. On a CPU nodes
are timed twice, the second time with memory kept mapped, and so is the compilation of the kernels.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from console.arguments import UsageError
from console.progress import Progress
from console.rows import Rows
from record.results import BuildTime, NodeTime, Run
from resfused.kernels import cpu
from workloads.gate import Judge
from workloads.nodes import FORMS, NETWORKS, NORM_ADD_RELU, Node
from workloads.passes import BACKWARD, FORWARD, PHASES, two_phases
from workloads.problems import DTYPES, Problem, problem

from measure import memory
from measure.measuring import Measuring
from measure.timing import captured, first_line, interleaved, rotation
from measure.variants import AGAIN, EAGER, OURS, STANDARD, VARIANTS, Variant

# What a call takes before any arithmetic.
TINY = Node(NORM_ADD_RELU, 8, 2, 2, 1)
SMALL = [Node(form, 16, 4, 4, 1) for form in FORMS]
HALF, FLOAT = "bfloat16", "float32"


@dataclass(frozen=True)
class Scope:
    """What is timed on a device where nothing else is asked. ``memories``: see ``memory``."""

    networks: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    repetitions: int
    least_seconds: float = 0.0
    memories: tuple[str, ...] = (memory.DEFAULT,)
    variants: tuple[str, ...] = STANDARD


SCOPES = {
    "cuda": Scope(tuple(NETWORKS), (256, 32), (HALF,), ("channels_last",), 30),
    "cpu": Scope(("resnet50",), (32,), (FLOAT, HALF), ("channels_last", "contiguous"), 7, 0.2, memory.MEMORIES),
}


def scope(m: Measuring) -> Scope:
    found = SCOPES[m.device.type]
    if not m.small:
        return found
    variants = STANDARD if m.device.type == "cuda" else (OURS, AGAIN, EAGER)
    return replace(found, batches=(8,), repetitions=5, least_seconds=0.0, memories=(memory.DEFAULT,), variants=variants)


@dataclass(frozen=True)
class Comparison:
    """What is timed against what. ``cuda_graph``: every call is the replay of a CUDA graph.

    ``least_seconds``: see ``interleaved``; ``kept_mapped``: see ``memory``.
    """

    nodes: list[Node]
    batches: Sequence[int]
    dtype: torch.dtype
    layout: str
    device: torch.device
    repetitions: int
    least_seconds: float = 0.0
    variants: tuple[str, ...] = STANDARD
    cuda_graph: bool = False
    kept_mapped: bool = False

    def __str__(self) -> str:
        return setting(_name(self.dtype), self.layout, self.cuda_graph, self.kept_mapped)


def setting(dtype: str, layout: str, cuda_graph: bool, kept_mapped: bool) -> str:
    """In words."""
    graphs = ", in CUDA graphs" if cuda_graph else ""
    return f"{dtype} {layout}{graphs}{', memory kept mapped' if kept_mapped else ''}"


def unique(nodes: list[Node]) -> list[Node]:
    """One of each form and shape: whether the output is forked makes no difference to a node on its own."""
    return list({(n.form, n.channels, n.height, n.width): n for n in nodes}.values())


def time_nodes(comparisons: Sequence[Comparison], m: Measuring) -> None:
    """Every node of every batch until the deadline; what could not be timed is noted with the reason."""
    total = sum(len(c.nodes) * len(c.batches) for c in comparisons)
    with Progress(m.console, "Timing nodes", total) as progress:
        for c in comparisons:
            libraries = _libraries(c, m.run)
            for batch, node in product(c.batches, c.nodes):
                name = f"{node.form} {node.channels}x{node.height}x{node.width}, batch {batch}"
                progress.detail(f"{name}, {c}")
                if m.deadline.passed:
                    m.run.leave_out(f"{name}, {c}", m.deadline.over)
                else:
                    try:
                        m.run.add(_time_node(c, node, batch, libraries, partial(_leave_out, m.run, c, name), m.copy))
                    except Exception as error:
                        m.run.leave_out(f"{OURS} and every other variant on {name}, {c}", first_line(error))
                progress.advance()


def _leave_out(run: Run, c: Comparison, node: str, variant: str, reason: str) -> None:
    run.leave_out(f"{variant} on {node}, {c}", reason)


def _libraries(c: Comparison, run: Run) -> dict[str, object]:
    """Those of the variants that are there."""
    libraries = {}
    for name in c.variants:
        if not VARIANTS[name].applies(c.dtype, c.layout):
            run.leave_out(f"{name}, {c}", "it is of another precision, or what is compared already")
            continue
        try:
            libraries[name] = VARIANTS[name].library()
        except RuntimeError as error:
            run.leave_out(f"{name}, {c}", first_line(error))
    return libraries


def _time_node(
    c: Comparison,
    node: Node,
    batch: int,
    libraries: dict[str, object],
    leave_out: Callable[[str, str], None],
    copy: float,
) -> list[NodeTime]:
    """Forward, backward and both of every variant that can and is right."""
    torch._dynamo.reset()
    shape = (batch, node.channels, node.height, node.width)
    elements = batch * node.elements
    sets = rotation(3 * elements * c.dtype.itemsize, c.repetitions, c.device)
    problems = [problem(node.form, shape, c.dtype, c.layout, c.device) for _ in range(sets)]
    errors = {}
    judges: dict[object, Judge] = {}
    for variant, library in libraries.items():
        error, reason = _checked(VARIANTS[variant], problems[0], library, c.layout, judges)
        if reason is None:
            errors[variant] = error
        else:
            leave_out(variant, reason)
    own = {variant: [VARIANTS[variant].problem(p) for p in problems] for variant in errors}
    found = []
    for phase in PHASES:
        calls = {}
        for v in errors:
            try:
                calls[v] = _calls(own[v], libraries[v], phase, c)
            except Exception as error:
                leave_out(v, f"{phase}: {first_line(error)}")
        samples = interleaved(calls, c.repetitions, c.device, c.least_seconds)
        least = two_phases(node.form, phase).bytes(elements, c.dtype)
        place = node.form, node.channels, node.height, node.width, batch, _name(c.dtype), c.layout, phase, least, copy
        # A graph's replay is a call of every set.
        per_call = [(v, [ms * len(calls[v]) / sets for ms in samples[v]]) for v in calls]
        found += [NodeTime(times, *place, v, c.cuda_graph, errors[v], c.kept_mapped) for v, times in per_call]
    return found


def _checked(
    variant: Variant, p: Problem, library: object, layout: str, judges: dict[object, Judge]
) -> tuple[float, str | None]:
    """(its largest error, why it cannot be timed): wrong numbers, or whatever it raises.

    ``judges``: of ``p`` in the dtypes and layouts of variants that were checked before.
    """
    own = variant.dtype, variant.layout
    try:
        if own not in judges:
            judges[own] = Judge(variant.problem(p))
        verdict = judges[own].verdict(variant.layout or layout, library)
    except Exception as error:
        return 0.0, first_line(error)
    if not verdict.passed:
        return verdict.error, f"WRONG: {verdict.worst} is off by {verdict.error:.1e}, over {verdict.limit:.1e}"
    return verdict.error, None


def _calls(problems: list[Problem], library: object, phase: str, c: Comparison) -> list[Callable[[], object]]:
    """One call of each problem, or one replay of a graph of all of them."""
    makes = [partial(_call, p, library, phase) for p in problems]
    return [captured(makes, c.device)] if c.cuda_graph else [make() for make in makes]


def _call(p: Problem, library: object, phase: str) -> Callable[[], object]:
    if phase == FORWARD:
        return lambda: p.forward(library)
    if phase == BACKWARD:
        y = p.forward(library)
        return lambda: p.backward(y, retain_graph=True)
    return lambda: p.backward(p.forward(library))


def table(times: list[NodeTime], title: str) -> Rows:
    """Milliseconds of each variant, how many times as long each takes as ours, and our speed beside a copy's."""
    variants = list(dict.fromkeys(t.variant for t in times))
    others = [v for v in variants if v != OURS]
    shown = Rows(
        title,
        keys=("batch", "form", "C x H x W", "phase"),
        values=(*(f"{v} ms" for v in variants), *(f"{v} / ours" for v in others), "GB/s", "of copy", "passes"),
        caption="Medians. GB/s: least bytes of two-phase kernels over our time. Passes: our time in those of a copy.",
    )
    rows: dict[tuple[Any, ...], dict[str, NodeTime]] = {}
    for t in times:
        rows.setdefault((t.batch, t.form, t.shape, t.phase), {})[t.variant] = t
    for (batch, *names), row in rows.items():
        milliseconds = [f"{row[v].milliseconds:.4f}" if v in row else "" for v in variants]
        ours = row.get(OURS)
        ratios = [f"{row[v].milliseconds / ours.milliseconds:.2f}" if ours and v in row else "" for v in others]
        bandwidth = [f"{ours.gb_s:.0f}", f"{ours.of_copy:.2f}", f"{ours.passes:.1f}"] if ours else ["", "", ""]
        shown.add(str(batch), *names, *milliseconds, *ratios, *bandwidth)
    return shown


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def filtered(args: argparse.Namespace, m: Measuring) -> list[Comparison]:
    """A comparison for each dtype and layout, from the filters."""
    found = scope(m)
    nodes = SMALL if m.small else unique([n for name in args.network or found.networks for n in NETWORKS[name]().nodes])
    if m.device.type == "cpu" and not filters(args):
        nodes = [*nodes, TINY]
    return [
        Comparison(
            nodes=[n for n in nodes if n.form in (args.form or FORMS)],
            batches=args.batch or found.batches,
            dtype=DTYPES[dtype],
            layout=layout,
            device=m.device,
            repetitions=args.repetitions or found.repetitions,
            least_seconds=found.least_seconds,
            variants=found.variants,
        )
        for dtype, layout in product(args.dtype or found.dtypes, args.layout or found.layouts)
    ]


def filters(args: argparse.Namespace) -> bool:
    """Whether only some nodes are asked for."""
    return bool(args.network or args.form)


def measure(args: argparse.Namespace, m: Measuring) -> None:
    """Raises: UsageError for what the device has not."""
    on_gpu = m.device.type == "cuda"
    if args.cuda_graph and not on_gpu:
        raise UsageError("--cuda-graph needs a CUDA GPU, and this is a CPU")
    if args.memory and on_gpu:
        raise UsageError("--memory is of CPUs, and this is a GPU")
    variants = (OURS, AGAIN, *args.against) if args.against else scope(m).variants
    comparisons = [replace(c, variants=variants, cuda_graph=args.cuda_graph) for c in filtered(args, m)]
    # Once kept mapped, memory stays so.
    for kept in sorted(name == memory.KEPT for name in set(args.memory or scope(m).memories)):
        if kept and not memory.keep_mapped():
            m.run.leave_out("memory kept mapped", "the C library of this machine has no such choice")
            continue
        if not on_gpu:
            name, faults = memory.KEPT if kept else memory.DEFAULT, memory.page_faults()
            m.run.note(f"page_faults_{name}", faults)
            m.console.print(f"memory {name}: {faults} page faults for a tensor of {memory.WATCHED_BYTES >> 20} MiB")
        time_nodes([replace(c, kept_mapped=kept) for c in comparisons], m)
    if not (on_gpu or m.small or filters(args)):
        try:
            m.run.add([build_time()])
        except cpu.UnavailableError as error:
            m.run.leave_out("first build", first_line(error))


def build_time() -> BuildTime:
    """Into a folder of its own, whatever the cache has."""
    with TemporaryDirectory() as folder, patch.dict(os.environ, RESFUSED_CACHE=folder):
        start = perf_counter()
        cpu.built()
        return BuildTime([(perf_counter() - start) * 1e3])
