"""Times of single nodes: ours against what a user would otherwise pick, forward, backward and both.

Medians are reported. GB/s is of the least bytes that two-phase kernels must move, whatever was moved. Nothing is timed
before its results on the same tensors were compared with float64. A second run of ours shows the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from console.arguments import UsageError
from console.progress import Progress
from console.rows import Rows
from record.results import NodeTime, Run
from workloads.gate import judge
from workloads.nodes import FORMS, NETWORKS, Node
from workloads.passes import BACKWARD, FORWARD, PHASES, two_phases
from workloads.problems import DTYPES, Problem, problem

from measure.measuring import Measuring
from measure.timing import captured, first_line, interleaved, rotation
from measure.variants import AGAIN, EAGER, OURS, STANDARD, VARIANTS, Variant

SMALL = [Node(form, 16, 4, 4, 1) for form in FORMS]
SMALL_BATCHES = (8,)
BATCHES = (256, 32)


@dataclass(frozen=True)
class Comparison:
    """What is timed against what. ``cuda_graph``: every call is the replay of a CUDA graph."""

    nodes: list[Node]
    batches: list[int]
    dtype: torch.dtype
    layout: str
    repetitions: int
    variants: tuple[str, ...] = STANDARD
    cuda_graph: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __str__(self) -> str:
        graphs = ", in CUDA graphs" if self.cuda_graph else ""
        return f"{_name(self.dtype)} {self.layout}{graphs}"


def unique(nodes: list[Node]) -> list[Node]:
    """One of each form and shape: whether the output is forked makes no difference to a node on its own."""
    return list({(n.form, n.channels, n.height, n.width): n for n in nodes}.values())


def time_nodes(c: Comparison, m: Measuring) -> None:
    """Every node of every batch until the deadline; what could not be timed is noted with the reason."""
    libraries = _libraries(c, m.run)
    with Progress(m.console, "Timing nodes", len(c.nodes) * len(c.batches)) as progress:
        for batch, node in product(c.batches, c.nodes):
            name = f"{node.form} {node.channels}x{node.height}x{node.width}, batch {batch}"
            progress.detail(name)
            if m.deadline.passed:
                m.run.leave_out(f"{name}, {c}", m.deadline.over)
            else:
                m.run.add(_time_node(c, node, batch, libraries, partial(_leave_out, m.run, c, name), m.copy))
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
    for variant, library in libraries.items():
        error, reason = _checked(VARIANTS[variant], problems[0], library, c.layout)
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
        samples = interleaved(calls, c.repetitions, c.device)
        least = two_phases(node.form, phase).bytes(elements, c.dtype)
        place = node.form, node.channels, node.height, node.width, batch, _name(c.dtype), c.layout, phase, least, copy
        # A graph's replay is a call of every set.
        per_call = [(v, [ms * len(calls[v]) / sets for ms in samples[v]]) for v in calls]
        found += [NodeTime(times, *place, v, c.cuda_graph, errors[v]) for v, times in per_call]
    return found


def _checked(variant: Variant, p: Problem, library: object, layout: str) -> tuple[float, str | None]:
    """(its largest error, why it cannot be timed): wrong numbers, or whatever it raises."""
    try:
        verdict = judge(variant.problem(p), variant.layout or layout, library)
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
    """Milliseconds of each variant, how many times as long each takes as ours, our GB/s and fraction of the copy."""
    variants = list(dict.fromkeys(t.variant for t in times))
    others = [v for v in variants if v != OURS]
    shown = Rows(
        title,
        keys=("batch", "form", "C x H x W", "phase"),
        values=(*(f"{v} ms" for v in variants), *(f"{v} / ours" for v in others), "GB/s", "of copy"),
        caption="Medians. GB/s: least bytes of two-phase kernels over our time.",
    )
    rows: dict[tuple[Any, ...], dict[str, NodeTime]] = {}
    for t in times:
        rows.setdefault((t.batch, t.form, t.shape, t.phase), {})[t.variant] = t
    for (batch, *names), row in rows.items():
        milliseconds = [f"{row[v].milliseconds:.4f}" if v in row else "" for v in variants]
        ours = row.get(OURS)
        ratios = [f"{row[v].milliseconds / ours.milliseconds:.2f}" if ours and v in row else "" for v in others]
        bandwidth = [f"{ours.gb_s:.0f}", f"{ours.of_copy:.2f}"] if ours else ["", ""]
        shown.add(str(batch), *names, *milliseconds, *ratios, *bandwidth)
    return shown


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def filtered(args: argparse.Namespace, small: bool) -> Comparison:
    """From the filters; ``small``: of nodes that Triton's interpreter takes no time for."""
    nodes = SMALL if small else unique([n for name in args.network or NETWORKS for n in NETWORKS[name]().nodes])
    return Comparison(
        nodes=[n for n in nodes if n.form in (args.form or FORMS)],
        batches=list(args.batch or (SMALL_BATCHES if small else BATCHES)),
        dtype=DTYPES[args.dtype],
        layout=args.layout,
        repetitions=args.repetitions or repetitions(small),
    )


def repetitions(small: bool) -> int:
    return 5 if small else 30


def standard(device: torch.device) -> tuple[str, ...]:
    """The variants of a comparison that names none; a CPU would compile for minutes, and its noise says nothing."""
    return STANDARD if device.type == "cuda" else (OURS, EAGER)


def measure(args: argparse.Namespace, m: Measuring) -> None:
    """Raises: UsageError for CUDA graphs without a GPU."""
    if args.cuda_graph and m.device.type != "cuda":
        raise UsageError("--cuda-graph needs a CUDA GPU, and torch sees none")
    variants = (OURS, AGAIN, *args.against) if args.against else standard(m.device)
    time_nodes(replace(filtered(args, m.small), variants=variants, cuda_graph=args.cuda_graph), m)
