"""Breaks the library, a fault at a time, and runs the tests that should see it: a survivor is a missing test.

``python tests/faults.py [NAME ...] [--jobs N] [--check] [--list]``: NAME is a fault of the lists, or a part of
its name or file. Each fault is put into a copy of the tree. ``--check`` first runs the same tests on a copy without
faults. Exit status: 0 where every fault was killed, else 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from activation_faults import ACTIVATION_FAULTS
from conversion_faults import CONVERSION_FAULTS
from fault_list import BY_FILE_AND_TESTS
from native_fault_list import IN_CPP

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "resfused")
CHANGE = re.compile("«(.*?)→(.*?)»", re.DOTALL)
KILLED, SURVIVED = "killed", "SURVIVED"
# Of one fault's tests.
SECONDS = 300
PRELOADED = ["pytest", "torch", "torch._dynamo", "torch.distributed", "triton.language", "triton.runtime.interpreter"]
# By pytest's exit status.
VERDICTS = {0: SURVIVED, 1: KILLED}


class Fault(NamedTuple):
    """``old`` in ``file`` becomes ``new``; ``tests``: what pytest is asked for, its file without folders."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def source(self, root: Path = ROOT) -> Path:
        """Raises: LookupError where the tree has no such text any more, or has it twice."""
        path = _found(root, SOURCES, self.file)
        occurrences = path.read_text(encoding="utf-8").count(self.old)
        if occurrences != 1:
            raise LookupError(f"the list is out of date: {path.relative_to(root)} has {occurrences} times {self.old!r}")
        return path


FAULTS = tuple(
    Fault(name, file, CHANGE.sub(r"\1", code), CHANGE.sub(r"\2", code), tests)
    for faults in (BY_FILE_AND_TESTS, ACTIVATION_FAULTS, CONVERSION_FAULTS, IN_CPP)
    for (file, tests), of_tests in faults.items()
    for name, code in of_tests.items()
)


def _found(root: Path, folders: Iterable[str], name: str) -> Path:
    """The one file of this name; it may have moved to another folder."""
    paths = [path for folder in folders for path in (root / folder).rglob(name)]
    if len(paths) != 1:
        raise LookupError(f"the list is out of date: there are {len(paths)} files {name} in {', '.join(folders)}")
    return paths[0]


def arguments(tests: str, root: Path = ROOT) -> list[str]:
    """What pytest is given, in a tree."""
    found = []
    for word in shlex.split(tests):
        file, colons, rest = word.partition("::")
        is_file = file.startswith("test_") and file.endswith(".py")
        found.append(f"{_found(root, ['tests'], file)}{colons}{rest}" if is_file else word)
    return found


class Outcome(NamedTuple):
    """``seconds``: of CPU, importing what all have in common left out."""

    verdict: str
    seconds: float
    output: str = ""


def outcome(fault: Fault | None, tests: str, processes: Any) -> Outcome:
    """What becomes of the tests in a copy of the tree with the fault."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        copy, log = Path(folder) / "tree", Path(folder) / "log"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "build"))
        try:
            if fault is not None:
                path = fault.source(copy)
                path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
            tests_here = arguments(tests, copy)
        except LookupError as error:
            return Outcome("no verdict", 0.0, f"{error}\n")
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=_run, args=(copy, tests_here, log, sender))
        process.start()
        sender.close()
        try:
            # A test that hangs or crashes has seen the fault.
            status, seconds = receiver.recv() if receiver.poll(SECONDS) else (1, SECONDS)
        except EOFError:
            status, seconds = 1, 0.0
        process.kill()
        process.join()
        return Outcome(VERDICTS.get(status, "no verdict"), seconds, log.read_text(errors="replace"))


def _run(tree: Path, tests: list[str], log: Path, sender: Any) -> None:
    """Sends pytest's exit status and the seconds."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(tree))
    # No test needs a plugin, and importing them takes longer than most.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    status = pytest.main([*tests, "-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider"])
    package = sys.modules.get("resfused")
    if package is not None and tree not in Path(str(package.__file__)).parents:
        print(f"{package} is not the copy's")
        status = -1
    sender.send((int(status), sum(os.times()[:4])))


def forks() -> Any:
    """Processes forked from one that has imported what takes seconds."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def all_end_so(wanted: str, tasks: list[tuple[str, Fault | None, str]], jobs: int) -> bool:
    """Prints the outcome of every task, (name, fault, tests), in order; whether all are as wanted."""
    processes = forks()
    good, seconds = 0, 0.0
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = pool.map(lambda task: outcome(*task[1:], processes), tasks)
        for (name, *_), each in zip(tasks, outcomes, strict=True):
            print(f"{each.verdict:8} {each.seconds:6.1f} s  {name}", flush=True)
            good += each.verdict == wanted
            seconds += each.seconds
            if each.verdict not in (wanted, SURVIVED):
                print(each.output[-2000:], end="", flush=True)
    print(f"{good} of {len(tasks)} {wanted}, {seconds:.0f} s of CPU")
    return good == len(tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help="a fault's name, or a part of its name or file")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--check", action="store_true", help="first see that the tests pass where nothing is broken")
    parser.add_argument("--list", action="store_true", help="print the faults and their tests, and do nothing")
    options = parser.parse_args()
    unknown = [n for n in options.names if not any(n in f.name or n in f.file for f in FAULTS)]
    if unknown:
        parser.error(f"no fault has the name {', '.join(unknown)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, but is {options.jobs}")
    chosen = [f for f in FAULTS if not options.names or any(n in f.name or n in f.file for n in options.names)]
    if options.list:
        for f in chosen:
            print(f"{f.file:20} {f.name}: {f.tests}")
        return 0
    if options.check:
        tests = sorted({f.tests for f in chosen})
        print(f"{len(tests)} selections of tests, which must survive without a fault")
        if not all_end_so(SURVIVED, [(t, None, t) for t in tests], options.jobs):
            return 1
    print(f"{len(chosen)} faults, which must be killed")
    return 0 if all_end_so(KILLED, [(f"{f.file}: {f.name}", f, f.tests) for f in chosen], options.jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
