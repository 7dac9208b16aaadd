"""Host time of a training forward and backward: what Python and PyTorch do before a kernel is launched.

Triton runs up to the launch itself, which is left out: what is timed is the choice of the kernel and everything above
it, on a tiny CPU tensor in channels_last. Beside it eager's operators on the same tensor, in the same process, with
their arithmetic on a handful of values. Medians. A GPU hides host time behind the kernels before it wherever it is the
slower of the two.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from console.arguments import write_json
from console.rows import Rows
from rich.console import Console
from workloads.nodes import FORMS
from workloads.problems import problem

from count.audit import compiler_environment
from count.offline import compiling_for
from resfused import backend, functional, reference

SHAPE = (2, 8, 2, 2)
WARM_UP = 50
EAGER = "eager"
SEPARATE, ONE_LAUNCH = "separate launches", "one launch"


def microseconds(call: Callable[[], object], repetitions: int) -> float:
    """The median of single calls."""
    samples = []
    for repetition in range(WARM_UP + repetitions):
        start = perf_counter()
        call()
        if repetition >= WARM_UP:
            samples.append(perf_counter() - start)
    return median(samples) * 1e6


def measure(form: str, library: object, repetitions: int) -> tuple[float, float]:
    """(forward, backward) of one node."""
    p = problem(form, SHAPE, torch.float32, "channels_last", torch.device("cpu"))
    y = p.forward(library)
    forward = microseconds(lambda: p.forward(library), repetitions)
    return forward, microseconds(lambda: p.backward(y, retain_graph=True), repetitions)


def measure_all(repetitions: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By form and variant. Needs a process without TRITON_INTERPRET."""
    torch.set_num_threads(1)
    kernels = backend.load_kernels()
    if kernels is None:
        raise RuntimeError("host time is that of launching Triton's kernels, and the triton package is not installed")
    launch_table = kernels.launch_table
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for form in FORMS:
        results[form] = {EAGER: measure(form, reference, repetitions)}
        for way, nodes in ((SEPARATE, launch_table.NO_NODE), (ONE_LAUNCH, launch_table.EVERY_NODE)):
            # CPU tensors count as interpreted, so that they take the kernels' path.
            with (
                patch.object(kernels, "INTERPRETED", True),
                launch_table.using(ONE_LAUNCH_ELEMENTS=nodes),
                compiling_for("sm_90"),
            ):
                results[form][way] = measure(form, functional, repetitions)
    return results


def run(args: argparse.Namespace) -> int:
    """Prints the table; 0."""
    with compiler_environment(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = pool.submit(measure_all, args.repetitions).result()
    Console().print(_table(results))
    if args.json:
        write_json(args.json, results)
    return 0


def _table(results: dict[str, dict[str, tuple[float, float]]]) -> Rows:
    variants = (SEPARATE, ONE_LAUNCH, EAGER)
    table = Rows(
        "Host time of one training node, microseconds; launches themselves left out",
        keys=("form",),
        values=[f"{variant}, {phase}" for variant in variants for phase in ("forward", "backward")],
    )
    for form, times in results.items():
        table.add(form, *(f"{time:.1f}" for variant in variants for time in times[variant]))
    return table
