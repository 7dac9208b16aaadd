"""Everything that a first half hour on a GPU should do, in order of worth, in steps that each leave their results.

A step is a process of its own that is ended after its minutes; what it had measured by then is in the result file. What
ran, how it ended and how long it took is in ``record.json`` beside it, so that the next call goes on with what has not
been done. All of it lies in one folder: ``record.json``, ``record.log``, ``results.json`` to which every measurement is
added, and the launch table that was found, with ``tune.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from time import monotonic
from typing import IO, Any

from console.arguments import UsageError, write_json
from console.rows import Rows
from rich.console import Console

from record.environment import environment
from record.results import Run

ROOT = Path(__file__).parents[2]
LAUNCH_TABLE = ROOT / "kernels" / "gpu" / "launch_table.json"
MOST_MINUTES = 9.0
# Each has a context of its own on the GPU.
MOST_PROCESSES = 12
TAIL = 15
DONE, FAILED, OVER, RUNNING = "done", "failed", "out of time", "interrupted"
NODES = ("--network", "resnet50")
RESNET50 = ("networks", "--network", "torchvision/resnet50", "--mode", "training")
GPU_TESTS = (
    "tests/kernels/test_gpu.py", "tests/kernels", "tests/operator/test_compile.py",
    "tests/conversion/test_fuse_compile.py",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """``arguments``: of run.py or, with ``tests``, of pytest; ``{out}`` in them is the folder.

    ``minutes``: after them the process is ended. ``tuned``: with the launch table that ``tune`` has found, in place.
    """

    what: str
    arguments: Sequence[str] = ()
    minutes: float = MOST_MINUTES
    tests: bool = False
    tuned: bool = False

    def command(self, out: Path) -> list[str]:
        given = [each.format(out=out) for each in self.arguments]
        if self.tests:
            # Not what few cores are given by default; one file that cannot be imported costs only itself.
            processes = (
                ["-n", str(min(os.cpu_count() or 1, MOST_PROCESSES))] if find_spec("xdist") else ["-o", "addopts="]
            )
            return [sys.executable, "-m", "pytest", "-q", *processes, "--continue-on-collection-errors", *given]
        run = [sys.executable, str(ROOT / "benchmarks" / "run.py")]
        if given[:1] == ["tune"]:
            return [*run, *given]
        # A minute less, for what began last and for the tables.
        measuring = ["--results", str(out / "results.json"), "--no-plots", "--minutes", f"{self.minutes - 1.5:g}"]
        return [*run, *measuring, *given]


STEPS = {
    "suite-gpu": Step("the suite's tests that a GPU decides", GPU_TESTS, 5, tests=True),
    "standard": Step("the run without a command", (), 6),
    "nodes-graph": Step("nodes at batch 32 in a CUDA graph", ("nodes", *NODES, "--batch", "32", "--cuda-graph",
                        "--against", "eager"), 3),
    "nodes-float16": Step("nodes in float16 against cuDNN's graph", ("nodes", *NODES, "--batch", "256", "--dtype",
                          "float16", "--against", "cuDNN graph", "--against", "eager"), 4),
    "nodes-autotune": Step("nodes against torch.compile max-autotune", ("nodes", *NODES, "--batch", "256",
                           "--against", "torch.compile max-autotune"), 7),
    "networks": Step("training steps of networks", ("networks", "--batch", "256", "--batch", "32"), 9),
    "profile": Step("kernels with the bytes that memory moved, and where a step's time goes", ("profile", *NODES,
                    "--batch", "256", "--counters", "--step", "resfused", "--step", "eager"), 6),
    "memory": Step("peak memory of a training step", (*RESNET50, "--batch", "256", "--against", "eager",
                   "--repetitions", "5"), 4),
    "tune": Step("a launch table for this GPU", ("tune", "--minutes", "6", "--output", "{out}/launch_table.json",
                 "--record", "{out}/tune.json"), 9),
    "standard-tuned": Step("the run without a command, with that table", (), 6, tuned=True),
    "suite": Step("the rest of the suite", ("tests",), 9, tests=True),
}  # fmt: skip


class Record:
    """The summary in a folder: of each step its state, exit code, seconds, command and last lines."""

    def __init__(self, out: Path):
        self.path = out / "record.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.steps = dict(json.loads(self.path.read_text())["steps"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{self.path} is no record of steps: {error}") from error

    def state(self, name: str) -> str:
        return str(self.steps.get(name, {}).get("state", ""))

    def put(self, name: str, **entry: Any) -> None:
        self.steps[name] = entry
        write_json(self.path, {"environment": environment(), "steps": self.steps})


def run(args: argparse.Namespace) -> int:
    """0 if every step that was asked for is done, else 1. Raises: UsageError, before anything runs."""
    console, out = Console(), Path(args.out).resolve()
    record = Record(out)
    if args.list:
        console.print(table(record))
        return 0
    _check(out)
    names = args.step or [name for name in STEPS if record.state(name) != DONE]
    end = monotonic() + 60 * args.minutes if args.minutes else float("inf")
    left = [name for name in names if not run_step(name, out, record, end, console)]
    console.print(table(record))
    if left:
        console.print(f"[red]not done: {', '.join(left)}", highlight=False)
    return 1 if left else 0


def _check(out: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("record needs a CUDA GPU, and torch sees none; --list shows its steps")
    # It says what is wrong with the file, and changes nothing.
    Run(out / "results.json", {}, "cuda")
    out.mkdir(parents=True, exist_ok=True)


def run_step(name: str, out: Path, record: Record, end: float, console: Console) -> bool:
    """Whether it is done; it does not begin where it might not end before ``end``."""
    step = STEPS[name]
    if monotonic() + 60 * step.minutes > end:
        console.print(f"{name}: its {step.minutes:g} minutes are more than are left", highlight=False)
        return False
    table = out / "launch_table.json"
    if step.tuned:
        if not table.exists():
            record.put(name, state=FAILED, why=f"{table} is not there: tune has found none")
            return False
        copyfile(table, LAUNCH_TABLE)
    command = step.command(out)
    console.print(f"[bold]{name}[/]: {step.what}, at most {step.minutes:g} minutes", highlight=False)
    record.put(name, state=RUNNING, command=command)
    begun = monotonic()
    with (out / "record.log").open("a+b") as log:
        log.write(f"\n===== {name}: {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        code = _ended(command, log, 60 * step.minutes)
        log.seek(start)
        tail = log.read().decode(errors="replace").splitlines()[-TAIL:]
    state = OVER if code is None else DONE if code == 0 else FAILED
    seconds = round(monotonic() - begun, 1)
    record.put(name, state=state, code=code, seconds=seconds, command=command, tail=tail)
    console.print(f"{name}: {state} after {seconds:.0f} s", highlight=False)
    for line in tail if state != DONE else ():
        console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
    return state == DONE


def _ended(command: list[str], log: IO[bytes], seconds: float) -> int | None:
    """The exit code; None where it was ended, with every process that it had started."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    child_environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=child_environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(record: Record) -> Rows:
    shown = Rows("Record", keys=("step", "what", "state"), values=("minutes at most", "seconds"))
    for name, step in STEPS.items():
        seconds, state = record.steps.get(name, {}).get("seconds", ""), record.state(name)
        style = "" if state in ("", DONE) else "red"
        shown.add(name, step.what, state or "not run", f"{step.minutes:g}", str(seconds), style=style)
    return shown
