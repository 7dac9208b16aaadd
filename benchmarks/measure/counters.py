"""Bytes that a GPU's memory moved in each of our kernels, by its counters, through Nsight Compute's ``ncu``."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterator, Sequence
from shutil import which
from typing import NamedTuple

_READ, _WRITTEN = _METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_OURS = r"regex:^_(statistics|normalise|reduce|apply|forward|backward)_kernel"
# Clocks are left alone; caches stay as the kernel before has left them, which is half of what there is to see.
_OPTIONS = ("--clock-control", "none", "--cache-control", "none", "--print-units", "base", "--csv", "--page", "raw")


class Moved(NamedTuple):
    """One launch. ``kernel``: as ``_statistics_kernel``."""

    kernel: str
    read: float
    written: float


class CountersError(Exception):
    """The counters cannot be read, and why."""


def dram_bytes(command: Sequence[str], seconds: float) -> list[Moved]:
    """Every launch of our kernels that ``command`` makes, in its order.

    Raises: CountersError where ``ncu`` is missing, refuses, or is not done after ``seconds``.
    """
    ncu = which("ncu")
    if ncu is None:
        raise CountersError("ncu, of NVIDIA's Nsight Compute, is not on the PATH")
    watched = [ncu, *_OPTIONS, "--kernel-name", _OURS, "--metrics", ",".join(_METRICS), *command]
    try:
        done = subprocess.run(watched, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise CountersError(f"ncu was not done after {seconds:.0f} s") from error
    found = list(parse(done.stdout))
    if done.returncode != 0 or not found:
        last = (done.stdout + done.stderr).strip().rpartition("\n")[2]
        raise CountersError(f"ncu ended with {done.returncode} and {len(found)} launches: {last}")
    return found


def parse(output: str) -> Iterator[Moved]:
    """The launches in what ``ncu --csv --page raw`` prints, among messages of its own and of the program."""
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    for row in csv.DictReader(lines[header:]):
        # The row under the header has the units, those behind the last are messages.
        if row["ID"].isdigit():
            yield Moved(row["Kernel Name"].partition("(")[0], _number(row[_READ]), _number(row[_WRITTEN]))


def _number(text: str) -> float:
    return float(text.replace(",", ""))
