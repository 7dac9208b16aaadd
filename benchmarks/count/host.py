"""Host time of a training forward and backward: what Python, PyTorch and Triton do until a kernel is on its way.

The Triton kernels are launched by Triton's own launcher, above a driver that launches nothing, from tiny CPU tensors in
channels_last; beside them, in the same process, eager's operators and the kernels in C++ on the same tensors, with
their arithmetic on a handful of values. Medians. A GPU hides host time behind the kernels before it wherever it is the
slower of the two.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import pstats
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from console.arguments import write_json
from console.rows import Rows
from rich.console import Console
from torch import Tensor, nn
from workloads.nodes import FORMS, NORM_ADD_NORM_RELU, NORM_ADD_RELU
from workloads.problems import Problem, problem

import resfused
from count.offline import compiler_environment
from resfused import backend, functional, reference

SHAPE = (2, 8, 2, 2)
WARM_UP = 50
EAGER, SEPARATE, ONE_LAUNCH, NATIVE = "eager", "Triton", "Triton, one launch", "C++"
EAGER_MODULES, FUSED_MODULES = "eager's modules", "Triton, from fuse_"
VARIANTS = (EAGER, SEPARATE, ONE_LAUNCH, NATIVE, EAGER_MODULES, FUSED_MODULES)
# Of the functions that a profile shows.
MOST = 15


class Times(NamedTuple):
    """Microseconds and launches of one node's directions."""

    forward: float
    backward: float
    launches: int


class Host(NamedTuple):
    """By form and variant; and microseconds of a Triton node with a residual by function, forward and backward."""

    times: dict[str, dict[str, Times]]
    profile: dict[str, float]


class Tail(nn.Module):
    """A problem's node as a model has it: one norm or two, an addition, a ReLU."""

    def __init__(self, p: Problem):
        super().__init__()
        self.form = p.form
        self.bn = nn.BatchNorm2d(SHAPE[1])
        self.shortcut = nn.BatchNorm2d(SHAPE[1]) if p.form == NORM_ADD_NORM_RELU else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.bn(x)
        if residual is not None:
            z = z + (residual if self.shortcut is None else self.shortcut(residual))
        return F.relu(z)


class Modules:
    """A module in place of a library: what ``Problem.forward`` asks of one. ``problem`` has its parameters."""

    def __init__(self, p: Problem, fused: bool):
        self.module = Tail(p)
        self.problem = replace(p, parameters=list(self.module.parameters()))
        if fused:
            resfused.fuse_(self.module)
        self.batch_norm_relu = self._call(1)
        self.batch_norm_add_relu = self.batch_norm_add_batch_norm_relu = self._call(2)

    def _call(self, activations: int) -> Callable[..., Tensor]:
        return lambda *args: self.module(*args[:activations])


def microseconds(call: Callable[[], object], repetitions: int) -> float:
    """The median of single calls."""
    samples = []
    for repetition in range(WARM_UP + repetitions):
        start = perf_counter()
        call()
        if repetition >= WARM_UP:
            samples.append(perf_counter() - start)
    return median(samples) * 1e6


def _problem(form: str) -> Problem:
    return problem(form, SHAPE, torch.float32, "channels_last", torch.device("cpu"))


def measure(p: Problem, library: object, repetitions: int, launches: Any) -> Times:
    """One node; ``launches`` counts them."""
    y = p.forward(library)
    p.backward(y, retain_graph=True)
    before = launches.value
    p.backward(p.forward(library))
    of_one = launches.value - before
    forward = microseconds(lambda: p.forward(library), repetitions)
    return Times(forward, microseconds(lambda: p.backward(y, retain_graph=True), repetitions), of_one)


def measure_all(repetitions: int) -> Host:
    """All of it. Needs a process without TRITON_INTERPRET, a C compiler, and Triton."""
    torch.set_num_threads(1)
    with _triton_on_cpu() as launches:
        kernels = backend.load_kernels()
        table = kernels.launch_table
        results: dict[str, dict[str, Times]] = {}
        for form in FORMS:
            p = _problem(form)

            def of(library: object, p: Problem = p) -> Times:
                return measure(p, library, repetitions, launches)

            with table.using(ONE_LAUNCH_ELEMENTS=table.NO_NODE):
                found = {EAGER: of(reference), SEPARATE: of(functional)}
                for variant, modules in ((EAGER_MODULES, Modules(p, False)), (FUSED_MODULES, Modules(p, True))):
                    found[variant] = of(modules, modules.problem)
            with table.using(ONE_LAUNCH_ELEMENTS=table.EVERY_NODE):
                found[ONE_LAUNCH] = of(functional)
            with resfused.use_backend("native"):
                found[NATIVE] = of(functional)
            results[form] = {variant: found[variant] for variant in VARIANTS}
        return Host(results, profile(_problem(NORM_ADD_RELU), repetitions))


@contextmanager
def _triton_on_cpu() -> Iterator[Any]:
    """In it CPU tensors take the compiled Triton kernels, which launch nothing; yields the number of launches."""
    kernels = backend.load_kernels()
    if kernels is None:
        raise RuntimeError("host time is that of launching Triton's kernels, and the triton package is not installed")
    from count.stub_driver import launching_nothing

    # CPU tensors count as interpreted, so that they take the kernels' path.
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(kernels, "INTERPRETED", True),
        launching_nothing("sm_90", Path(folder)) as launches,
    ):
        yield launches


def profile(p: Problem, repetitions: int) -> dict[str, float]:
    """Microseconds in each function of a forward and backward itself, those below it left out; the largest.

    The profiler's own time is in them, more of it in what is called often.
    """
    profiler = cProfile.Profile()
    # The backward too runs in this thread.
    with torch.autograd.set_multithreading_enabled(False):
        p.backward(p.forward(functional))
        profiler.enable()
        for _ in range(repetitions):
            p.backward(p.forward(functional))
        profiler.disable()
    found = {
        f"{Path(file).name}: {name}" if line else name: own / repetitions * 1e6
        for (file, line, name), (_, _, own, *_) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    }
    return dict(sorted(found.items(), key=lambda item: -item[1])[:MOST])


def run(args: argparse.Namespace) -> int:
    """Prints the tables; 0."""
    with compiler_environment(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        host = pool.submit(measure_all, args.repetitions).result()
    console = Console()
    console.print(_table(host.times))
    console.print(_profile_table(host.profile))
    if args.json:
        times = {form: {variant: found._asdict() for variant, found in of.items()} for form, of in host.times.items()}
        write_json(args.json, {"microseconds": times, "profile": host.profile})
    return 0


def _table(results: dict[str, dict[str, Times]]) -> Rows:
    table = Rows(
        "Host time of one training node, microseconds, launches included",
        keys=("form", "node"),
        values=["forward", "backward", "launches"],
    )
    for form, times in results.items():
        for variant, (forward, backward, launches) in times.items():
            table.add(form, variant, f"{forward:.1f}", f"{backward:.1f}", str(launches))
    return table


def _profile_table(profile: dict[str, float]) -> Rows:
    table = Rows(
        f"What is left of {NORM_ADD_RELU} with Triton, forward and backward, by function; under a profiler",
        keys=("function",),
        values=["microseconds"],
    )
    for name, time in profile.items():
        table.add(name, f"{time:.1f}")
    return table
