"""What a training step keeps: live bytes at the end of the forward and its peak, beside its time, by network and way.

By the allocator's own figures: on a CPU every allocation that PyTorch's profiler sees, on a GPU those of
``torch.cuda``. What lies there before the step, weights and the optimizer's state among it, does not count.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from itertools import accumulate, product
from typing import NamedTuple

import torch
from console.progress import Progress
from console.rows import Rows
from record.results import StepMemory
from torch.profiler import ProfilerActivity, profile
from workloads.zoo import entry

from measure.measuring import Measuring
from measure.network_timing import (
    AGAIN_IN_THE_BACKWARD,
    CHECKPOINT,
    COMPILED,
    EAGER,
    FLOAT,
    HALF,
    OURS,
    SMALL_NETWORK,
    TRAINING,
    WAYS,
    Judge,
    Step,
    Workload,
)
from measure.timing import first_line, interleaved

NETWORKS = RESNET50, MOBILENET, EFFICIENTNET, DENSENET, FASTER_RCNN = (
    "torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/efficientnet_b0", "torchvision/densenet121",
    "torchvision/fasterrcnn_resnet50_fpn_frozen",
)  # fmt: skip
COMPARED = (EAGER, CHECKPOINT, COMPILED, OURS, AGAIN_IN_THE_BACKWARD)
# (batch, pixels, dtype, repetitions) where nothing else is asked.
DEFAULTS = {"cuda": (64, 224, HALF, 20), "cpu": (16, 160, FLOAT, 3)}


def measure(args: argparse.Namespace, m: Measuring) -> None:
    batch, pixels, dtype, repetitions = DEFAULTS[m.device.type]
    networks, ways = args.network or NETWORKS, args.way or COMPARED
    if m.small:
        networks, ways = [SMALL_NETWORK], tuple(way for way in ways if WAYS[way].compiled is None)
        batch, _, _, pixels = entry(SMALL_NETWORK).shape
        repetitions = 2
    workloads = [
        Workload(name, TRAINING, size, args.image_size or pixels, dtype)
        for name, size in product(networks, args.batch or [batch])
    ]
    with Progress(m.console, "Measuring memory", len(workloads)) as progress:
        for workload in workloads:
            progress.detail(str(workload))
            _measure(workload, ways, args.repetitions or repetitions, m)
            progress.advance()


def _measure(workload: Workload, ways: tuple[str, ...], repetitions: int, m: Measuring) -> None:
    torch._dynamo.reset()
    try:
        judge = Judge(workload, m.device)
    except Exception as error:
        m.run.leave_out(f"every way, {workload}", f"no exact results: {first_line(error)}")
        return
    ready: dict[str, _Ready] = {}
    for way in ways:
        if m.deadline.passed:
            m.run.leave_out(f"{way}, {workload}", m.deadline.over)
            continue
        try:
            ready[way] = _prepared(way, judge, m.device)
        except Exception as error:
            m.run.leave_out(f"{way}, {workload}", first_line(error))
        gc.collect()
    # Their steps take turns.
    samples = interleaved({way: [each.step.run] for way, each in ready.items()}, repetitions, m.device)
    of = workload.network, workload.batch, workload.image_size, workload.dtype
    m.run.add(StepMemory(samples[way], *of, way, *each.allocated, each.error) for way, each in ready.items())


class _Ready(NamedTuple):
    step: Step
    allocated: tuple[int, int]
    error: float


def _prepared(way: str, judge: Judge, device: torch.device) -> _Ready:
    """Raises: RuntimeError where its results are wrong."""
    step = judge.step(WAYS[way])
    error, limit = judge.verdict(step)
    if not error <= limit:
        raise RuntimeError(f"WRONG: off by {error:.1e}, over {limit:.1e}")
    # The optimizer's state is made in the first.
    step.run()
    return _Ready(step, bytes_of(step, device), error)


def bytes_of(step: Step, device: torch.device) -> tuple[int, int]:
    """(alive at the end of the forward, the most in a step)."""
    measured = _on_a_gpu if device.type == "cuda" else _on_a_cpu
    return measured(step.forward)[0], measured(step.run)[1]


def _on_a_cpu(call: Callable[[], object]) -> tuple[int, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        # What it returns holds the graph.
        held = call()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    del held
    allocated = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return allocated[-1], max(allocated)


def _on_a_gpu(call: Callable[[], object]) -> tuple[int, int]:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    held = call()
    allocated = torch.cuda.memory_allocated() - before
    del held
    return allocated, torch.cuda.max_memory_allocated() - before


def table(found: list[StepMemory], title: str) -> Rows:
    """Of every network the ways in which it was trained, beside eager."""
    shown = Rows(
        title,
        keys=("network", "batch", "dtype", "variant"),
        values=("live MB", "x eager", "peak MB", "x eager's peak", "ms", "x eager's time"),
        caption="Live: at the end of the forward. Medians of the time.",
    )
    eager = {each.workload: each for each in found if each.variant == EAGER}
    for each in found:
        base = eager.get(each.workload)
        numbers = each.live_bytes / 2**20, each.peak_bytes / 2**20, each.milliseconds
        of_eager = (base.live_bytes / 2**20, base.peak_bytes / 2**20, base.milliseconds) if base else (None,) * 3
        cells = [
            cell
            for number, other in zip(numbers, of_eager, strict=True)
            for cell in (f"{number:.1f}", f"{number / other:.2f}" if other else "")
        ]
        shown.add(each.network, str(each.batch), each.dtype, each.variant, *cells)
    return shown
