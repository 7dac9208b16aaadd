"""What each of our kernels reaches of the copy's bandwidth, and where a training step's time goes, by a profiler.

With ``--counters`` also the bytes that the GPU's memory moved, by Nsight Compute (``ncu``), beside the least there are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from console.arguments import UsageError
from console.progress import Progress
from console.rows import Rows
from record.results import KernelTime, StepProfile
from workloads.nodes import Node
from workloads.passes import BACKWARD, FORWARD, KERNELS
from workloads.problems import problem

from measure import network_timing, node_timing
from measure.counters import CountersError, Moved, dram_bytes
from measure.measuring import Measuring
from measure.network_timing import WAYS, Judge, Workload
from measure.node_timing import Comparison
from measure.spans import Span, busy, spans
from measure.timing import Deadline, first_line, rotation, warm_ups
from resfused import functional

# The first that matches names the kind.
KINDS = {
    "resfused": re.compile(r"^_(statistics|normalise|reduce|apply|forward|backward)_kernel"),
    "Inductor": re.compile(r"^triton_"),
    "convolution, matrix product": re.compile(
        r"conv|gemm|cutlass|xmma|wgrad|dgrad|fprop|cudnn_(generated|infer)|nvjet|sm\d+_|matmul|implicit", re.IGNORECASE
    ),
    "batch norm": re.compile(r"bn_|batch_?norm", re.IGNORECASE),
    "optimiser": re.compile(r"multi_tensor|foreach|sgd", re.IGNORECASE),
    "copy, fill": re.compile(r"mem(cpy|set)|copy|fill", re.IGNORECASE),
    "pooling": re.compile(r"pool", re.IGNORECASE),
    "elementwise, reduction": re.compile(r"elementwise|reduce|softmax|nll_loss", re.IGNORECASE),
}
OTHER = "other"
_KERNEL = re.compile(r"^_(\w+)_kernel")
LONGEST = 15
STEPS = 3


def kernel_of(span_name: str) -> str | None:
    """ "statistics" for ``_statistics_kernel``; None for what is no kernel of ours."""
    found = _KERNEL.match(span_name)
    return found[1] if found else None


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), OTHER)


def profile_node(c: Comparison, node: Node, batch: int, copy: float) -> list[KernelTime]:
    """Every streaming kernel of a node's forward and backward."""
    shape = (batch, node.channels, node.height, node.width)
    elements = batch * node.elements
    sets = rotation(3 * elements * c.dtype.itemsize, c.repetitions, c.device)
    problems = [problem(node.form, shape, c.dtype, c.layout, c.device) for _ in range(sets)]

    def work(repetitions: int) -> None:
        for repetition in range(repetitions):
            p = problems[repetition % sets]
            p.backward(p.forward(functional))

    work(warm_ups(c.device))
    found: dict[str, list[float]] = {}
    for span in spans(lambda: work(c.repetitions), c.device):
        if (kernel := kernel_of(span.name)) in KERNELS[node.form]:
            found.setdefault(str(kernel), []).append(span.milliseconds)
    return [
        KernelTime(
            samples, node.form, node.channels, node.height, node.width, batch, str(c.dtype).removeprefix("torch."),
            c.layout, FORWARD if kernel in ("statistics", "normalise", "forward") else BACKWARD,
            KERNELS[node.form][kernel].bytes(elements, c.dtype), copy, kernel, None,
        )
        for kernel, samples in found.items()
    ]  # fmt: skip


def profile_step(workload: Workload, way: str, repetitions: int, device: torch.device) -> StepProfile:
    """Where the time of a step goes, on average over the repetitions."""
    step = Judge(workload, device).step(WAYS[way])
    for _ in range(warm_ups(device)):
        step.run()

    def steps() -> None:
        for _ in range(repetitions):
            step.run()

    found = spans(steps, device)
    return summary(workload, way, found, repetitions)


def summary(workload: Workload, way: str, found: list[Span], steps: int) -> StepProfile:
    """Of ``steps`` steps; the idle time is that between the first kernel's start and the last one's end."""
    span = max(s.end for s in found) - found[0].start
    kinds: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, float] = defaultdict(float)
    for s in found:
        kinds[kind_of(s.name)] += s.milliseconds / steps
        names[s.name] += s.milliseconds / steps
    launches = Counter(s.name for s in found)
    longest = sorted(names, key=names.__getitem__, reverse=True)[:LONGEST]
    return StepProfile(
        workload.network, workload.batch, way, span / steps, (span - busy(found)) / steps, dict(kinds),
        [(name, launches[name] // steps, names[name]) for name in longest],
    )  # fmt: skip


def kernel_table(times: list[KernelTime], title: str) -> Rows:
    """Of every streaming kernel: time, GB/s of the least bytes, fraction of the copy, bytes moved over the least."""
    shown = Rows(
        title,
        keys=("batch", "form", "C x H x W", "kernel"),
        values=("ms", "GB/s", "of copy", "moved / least"),
        caption="GB/s of the least bytes; medians.",
    )
    for t in times:
        moved = f"{t.dram_bytes / t.least_bytes:.2f}" if t.dram_bytes is not None else ""
        numbers = (f"{t.milliseconds:.4f}", f"{t.gb_s:.0f}", f"{t.of_copy:.2f}", moved)
        shown.add(str(t.batch), t.form, t.shape, t.kernel, *numbers)
    return shown


def step_table(steps: list[StepProfile], title: str) -> Rows:
    """Milliseconds of a training step by kind of kernel."""
    kinds = list(dict.fromkeys(kind for s in steps for kind in s.kinds_ms))
    shown = Rows(title, keys=("network", "batch", "variant"), values=("span", "idle", *kinds))
    for s in steps:
        parts = [f"{s.kinds_ms.get(kind, 0.0):.2f}" for kind in kinds]
        shown.add(s.network, str(s.batch), s.variant, f"{s.span_ms:.2f}", f"{s.idle_ms:.2f}", *parts)
    return shown


def profile_nodes(c: Comparison, m: Measuring, counters: bool) -> None:
    """Every node of every batch until the deadline, and then the counters' bytes where they are asked for."""
    found: list[list[KernelTime]] = []
    with Progress(m.console, "Profiling", len(c.nodes) * len(c.batches)) as progress:
        for batch, node in product(c.batches, c.nodes):
            name = f"{node.form} {node.channels}x{node.height}x{node.width}, batch {batch}"
            progress.detail(name)
            if m.deadline.passed:
                m.run.leave_out(f"kernels of {name}, {c}", m.deadline.over)
            else:
                try:
                    found.append(profile_node(c, node, batch, m.copy))
                    m.run.add(found[-1])
                except Exception as error:
                    m.run.leave_out(f"resfused's kernels of {name}, {c}", first_line(error))
            progress.advance()
    if counters and any(found):
        try:
            m.run.add(with_counters([times for times in found if times], m.deadline))
        except CountersError as error:
            m.run.leave_out(f"counters, {c}", str(error))


def with_counters(nodes: list[list[KernelTime]], deadline: Deadline) -> list[KernelTime]:
    """The kernels of ``nodes`` with the bytes that memory moved, seen in a process of its own.

    Raises: CountersError where the counters cannot be read or are of other launches.
    """
    problems = [(t.form, t.dtype, t.layout, t.batch, t.channels, t.height, t.width) for t, *_ in nodes]
    command = [sys.executable, str(Path(__file__).parent.parent / "nodes_once.py"), json.dumps(problems)]
    return counted([t for times in nodes for t in times], dram_bytes(command, deadline.seconds_left))


def counted(times: list[KernelTime], moved: Iterable[Moved]) -> list[KernelTime]:
    """A launch of each kernel, in the same order. Raises: CountersError where they are not."""
    seen = list(moved)
    if [kernel_of(m.kernel) for m in seen] != [t.kernel for t in times]:
        raise CountersError(f"{len(times)} kernels were timed, and the counters saw {len(seen)}, or other ones")
    return [replace(t, dram_bytes=m.read + m.written) for t, m in zip(times, seen, strict=True)]


def profile_steps(workload: Workload, ways: Sequence[str], m: Measuring) -> None:
    for way in ways:
        if m.deadline.passed:
            m.run.leave_out(f"profile of {way}, {workload}", m.deadline.over)
            continue
        m.console.print(f"profiling {workload}: {way}")
        try:
            m.run.add([profile_step(workload, way, STEPS, m.device)])
        except Exception as error:
            m.run.leave_out(f"profile of {way}, {workload}", first_line(error))


def measure(args: argparse.Namespace, m: Measuring) -> None:
    """Raises: UsageError without a CUDA GPU."""
    if m.device.type != "cuda":
        raise UsageError("profile needs a CUDA GPU, whose kernels its profiler sees")
    for c in node_timing.filtered(args, m):
        profile_nodes(c, m, args.counters)
    profile_steps(network_timing.standard_workload(m), args.step or [], m)
