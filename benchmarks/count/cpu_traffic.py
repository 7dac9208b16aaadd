"""Passes over memory of single nodes on a CPU, by the lines that cachegrind's caches miss: eager's and ours.

A pass reads or writes one activation once. Cachegrind simulates a last-level cache a third of an activation large, on
one thread of the AVX2 library, as it knows no AVX-512. It counts a line that is stored as one, whether or not it had to
be read first; the processor's own prefetching and its stores past the caches are not seen, nor is the system when it
clears fresh pages. Beside every node a copy is counted, which has to be two passes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from console.arguments import UsageError, write_json
from console.rows import Rows
from rich.console import Console
from workloads.nodes import FORMS
from workloads.passes import BACKWARD, FORWARD
from workloads.problems import LAYOUTS, Problem, problem

import resfused
from resfused import functional, reference

# Images that lie a power of two apart would take turns in a few sets of the simulated cache, whose index is no hash.
SHAPE = (8, 64, 56, 56)
LINE_BYTES = 64
CACHE_BYTES = 2**21
LIBRARIES = {"eager": reference, "resfused": functional}
KEYS = ("form", "layout", "phase")
COPY = 2
WITHIN = 0.05
"""Passes of a copy, and how far what is counted may lie off: Python has some lines of its own."""
WORKER = "from count import cpu_traffic; cpu_traffic.run_nodes()"


def run(args: argparse.Namespace) -> int:
    """Raises: UsageError where there is no valgrind."""
    if shutil.which("valgrind") is None:
        raise UsageError("cpu-traffic needs valgrind, whose cachegrind counts, and it was not found")
    passes = count()
    table = Rows("Passes over memory, by cachegrind", keys=KEYS, values=tuple(LIBRARIES))
    for form, layout, phase in product(FORMS, LAYOUTS, (FORWARD, BACKWARD)):
        table.add(form, layout, phase, *(f"{passes[form, layout, phase, name]:.2f}" for name in LIBRARIES))
    Console().print(table)
    if args.json:
        write_json(
            args.json, [dict(zip((*KEYS, "library"), key, strict=True)) | {"passes": n} for key, n in passes.items()]
        )
    return 0


def count() -> dict[tuple[str, str, str, str], float]:
    """By form, layout, phase and library. Raises: RuntimeError where cachegrind fails, or a copy is not two passes."""
    lines = torch.Size(SHAPE).numel() * 4 / LINE_BYTES
    with TemporaryDirectory() as folder:
        simulated = ("--cache-sim=yes", f"--LL={CACHE_BYTES},16,{LINE_BYTES}", f"--cachegrind-out-file={folder}/%p")
        command = ["valgrind", "--tool=cachegrind", *simulated, sys.executable, "-c", WORKER]
        root = Path(__file__).parents[2]
        least = {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'benchmarks'}"}
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=kept | least, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"cachegrind failed: {done.stderr[-2000:]}")
        missed = {
            tuple(names): _missed(Path(folder) / pid) for pid, *names in map(json.loads, done.stdout.splitlines())
        }
    passes = {}
    for form, layout, name in product(FORMS, LAYOUTS, LIBRARIES):
        nothing, copied, forward, both = (missed[form, layout, name, what] for what in ACTS)
        copy = (copied - nothing) / lines
        if abs(copy - COPY) > WITHIN:
            raise RuntimeError(f"a copy counts as {copy:.2f} passes beside {form}, {layout}, {name}: it must be {COPY}")
        passes[form, layout, FORWARD, name] = (forward - nothing) / lines
        passes[form, layout, BACKWARD, name] = (both - forward) / lines
    return passes


def _missed(counted: Path) -> int:
    """Lines of data that the last level did not hold, to read or to write."""
    fields = dict(
        line.split(":", 1) for line in counted.read_text().splitlines() if line.startswith(("events", "summ"))
    )
    by_event = dict(zip(fields["events"].split(), map(int, fields["summary"].split()), strict=True))
    return by_event["DLmr"] + by_event["DLmw"]


def run_nodes() -> None:
    """Each act in a process of its own, forked from this one, whose counts it has: of importing, and of the tensors.

    Prints a line for each: the process, and what it did.
    """
    resfused.set_backend("native")
    for form, layout, (name, library) in product(FORMS, LAYOUTS, LIBRARIES.items()):
        # What is done once, in a process that has done it.
        _both(problem(form, (2, 8, 4, 4), torch.float32, layout, torch.device("cpu")), library)
        p = problem(form, SHAPE, torch.float32, layout, torch.device("cpu"))
        for what, act in ACTS.items():
            print(json.dumps([str(_forked(act, p, library)), form, layout, name, what]), flush=True)


def _forked(act: Act, p: Problem, library: object) -> int:
    process = os.fork()
    if process == 0:
        # Here, not in the process that forks: later ones would count it once more each.
        _empty_caches()
        act(p, library)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if status != 0:
        raise RuntimeError(f"a forked process ended with {status}")
    return process


def _empty_caches() -> None:
    torch.zeros(2 * CACHE_BYTES, dtype=torch.uint8)


def _nothing(p: Problem, library: object) -> None:
    pass


def _copy(p: Problem, library: object) -> None:
    p.dy.clone()


def _forward(p: Problem, library: object) -> None:
    p.forward(library)


def _both(p: Problem, library: object) -> None:
    p.backward(p.forward(library))


Act = Callable[[Problem, object], None]
ACTS: dict[str, Act] = {"nothing": _nothing, "copy": _copy, "forward": _forward, "both": _both}
