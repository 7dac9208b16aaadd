"""Compiles directions of nodes in many processes, so that a GPU need not wait; the results are in Triton's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from count.offline import compiling_for
from measure.ahead import in_parts, processes
from resfused.kernels.gpu import launch_table

from tuning.directions import Case

# The process that measures and its driver keep these to themselves.
SPARE_CORES = 2


class Compiler:
    """Compiles for ``architecture``, as ``offline`` names it, and a device with these ``constants`` of the table."""

    def __init__(self, pool: ProcessPoolExecutor, architecture: str, constants: dict[str, Any]):
        self._pool = pool
        self._architecture = architecture
        self._constants = constants

    def compile(self, work: Sequence[tuple[Sequence[Case], Any]], seconds: float) -> list[str]:
        """Every case of ``work`` under the table beside it, as far as ``seconds`` allow; returns what went wrong.

        That is not the last word on a table: the process that measures compiles whatever it does not find.
        """
        parts = [
            (part, {**table.constants, **self._constants}, self._architecture)
            for cases, table in work
            for part in _by_kernels(cases)
        ]
        return in_parts(self._pool, compile_cases, parts, seconds)[0]


@contextmanager
def compiler(architecture: str, constants: dict[str, Any]) -> Iterator[Compiler]:
    with processes(max(1, (os.cpu_count() or 1) - SPARE_CORES)) as pool:
        yield Compiler(pool, architecture, constants)


def compile_cases(cases: Sequence[Case], constants: dict[str, Any], architecture: str) -> list[str]:
    """Why one of the cases does not compile, if so. Needs a process without TRITON_INTERPRET."""
    for case in cases:
        try:
            with launch_table.using(**constants), compiling_for(architecture):
                case.tensors(torch.device("meta")).run()
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
    return []


def _by_kernels(cases: Sequence[Case]) -> list[tuple[Case, ...]]:
    """Cases that take the same kernels side by side."""

    def kernels(case: Case) -> tuple[str, str, str, bool]:
        return case.direction, case.layout, case.node.form, case.direction == "backward" and case.node.forked

    return [tuple(part) for _, part in groupby(sorted(cases, key=kernels), key=kernels)]
