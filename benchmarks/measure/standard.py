"""The run without a command: the gate, then ResNet-50's nodes and training step against what one would otherwise use.

What decides most comes first: a lease of a GPU may end, and a CPU's minutes are few. With wrong kernels nothing is
timed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product

import torch
from count.offline import PHASES
from workloads.gate import Case, Verdict, every_case, interpreted_gate, run_gate
from workloads.interpreter import interpreted
from workloads.nodes import FORMS, NETWORKS, Node
from workloads.problems import DTYPES

from measure import ahead, network_timing, node_timing
from measure.kernel_profile import profile_nodes
from measure.measuring import Measuring
from measure.network_timing import Workload, standard_workload, time_networks
from measure.node_timing import SMALL, Comparison, time_nodes, unique
from measure.timing import first_line
from measure.variants import AGAIN, EAGER, OURS
from resfused import backend_for

# Of ResNet-50, in the middle of its sizes, one of each form: channels and height.
FIRST_ON_A_CPU = tuple(zip(FORMS, (64, 512, 1024), (56, 28, 14), strict=True))
WITHOUT_COMPILATION = (OURS, AGAIN, EAGER)
AHEAD_SECONDS = 60.0
NODE_REPETITIONS, STEP_REPETITIONS, STEP_BATCH = 4, 3, 4


def measure(args: Namespace, m: Measuring) -> None:
    if not _right(m):
        m.console.print("[red]The kernels are wrong on this machine, or cannot run: nothing was timed.")
    elif m.device.type == "cuda":
        _on_a_gpu(m)
    else:
        _on_a_cpu(m)


def _right(m: Measuring) -> bool:
    """Of ours, and on a CPU of Triton's kernels, whose place these take, in short."""
    on_gpu = m.device.type == "cuda"
    try:
        backend_for(torch.empty(1, device=m.device))
    except RuntimeError as error:
        m.run.leave_out("resfused", first_line(error))
        return False
    dtypes = [torch.bfloat16, torch.float32] if on_gpu else DTYPES.values()
    name = "Triton's kernels" if on_gpu else "The kernels in C++"
    cases = every_case(dtypes)
    if on_gpu:
        _compile_ahead(m, cases)
    right = _noted(m, "gate", run_gate(m.device, cases, m.console, name))
    return right and (on_gpu or _noted(m, "gate_interpreted", interpreted(interpreted_gate)))


def _noted(m: Measuring, name: str, verdicts: list[Verdict]) -> bool:
    """Whether nothing is wrong; what raises is lost, and what cannot run at all is not right."""
    m.run.note(name, [{**asdict(v), "passed": v.passed} for v in verdicts])
    for v in verdicts:
        if v.raised:
            m.run.leave_out(f"resfused in the {name.replace('_', ' ')}: {v.case}", v.raised)
    right = all(v.passed or v.raised for v in verdicts) and any(v.passed for v in verdicts)
    if not right:
        m.run.leave_out("resfused", f"WRONG: see the {name.replace('_', ' ')}")
    return right


def _nodes(m: Measuring) -> list[Node]:
    return SMALL if m.small else unique(NETWORKS["resnet50"]().nodes)


def _on_a_gpu(m: Measuring) -> None:
    """What torch.compile takes for nodes comes last: it is most of the time, and decides least."""
    found, steps = node_timing.scope(m), network_timing.scope(m)
    every = [
        Comparison(_nodes(m), [batch], torch.bfloat16, "channels_last", m.device, found.repetitions)
        for batch in found.batches
    ]
    for c in every:
        profile_nodes(c, m, counters=False)
        time_nodes([replace(c, variants=WITHOUT_COMPILATION)], m)
        if c is every[0]:
            time_networks([standard_workload(m)], steps.ways, steps.repetitions, m)
    time_nodes(every, m)


def _compile_ahead(m: Measuring, cases: list[Case]) -> None:
    """Of the gate and the nodes, in every core; what does not compile is met again where it is launched."""
    work = [(c.form, phase, str(c.dtype).removeprefix("torch."), c.layout, c.shape) for c in cases for phase in PHASES]
    work += [
        (n.form, phase, "bfloat16", "channels_last", (batch, n.channels, n.height, n.width))
        for n in _nodes(m)
        for batch in node_timing.scope(m).batches
        for phase in PHASES
    ]
    with m.console.status("Compiling"):
        failures = ahead.compile_launches(work, m.device, min(AHEAD_SECONDS, m.deadline.seconds_left))
    if failures:
        m.console.print(f"{len(failures)} could not be compiled ahead: {failures[0]}", markup=False, soft_wrap=True)


def _on_a_cpu(m: Measuring) -> None:
    """A node of each form in channels_last, training steps and an inference, the same nodes in other layouts, and the
    other nodes for as long as the minutes allow."""
    found = node_timing.scope(m)
    first = [n for n in _nodes(m) if m.small or (n.form, n.channels, n.height) in FIRST_ON_A_CPU]
    others = sorted((n for n in _nodes(m) if n not in first), key=lambda n: n.elements)
    preferred, *further = found.layouts
    _time_on_a_cpu(first, [preferred], m)
    _time_steps_on_a_cpu(m)
    _time_on_a_cpu(first, further, m)
    _time_on_a_cpu(others, found.layouts, m)


def _time_steps_on_a_cpu(m: Measuring) -> None:
    found = network_timing.scope(m)
    batch = found.batches[0] if m.small else STEP_BATCH
    workloads = [
        Workload(name, mode, batch, network_timing.image_size(name), found.dtypes[0]) for name, mode in found.workloads
    ]
    ways = (network_timing.OURS, network_timing.AGAIN, network_timing.EAGER)
    time_networks(workloads, ways, min(STEP_REPETITIONS, found.repetitions), m)


def _time_on_a_cpu(nodes: Sequence[Node], layouts: Sequence[str], m: Measuring) -> None:
    found = node_timing.scope(m)
    time_nodes(
        [
            Comparison(
                [node], found.batches, DTYPES[dtype], layout, m.device, NODE_REPETITIONS, variants=found.variants
            )
            for node in nodes
            for dtype, layout in product(found.dtypes, layouts)
        ],
        m,
    )
