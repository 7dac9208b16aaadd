"""Compiles directions of nodes in many processes, so that a GPU need not wait; the results are in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from count.offline import compiling_for
from resfused.kernels.gpu import launch_table

from tuning.directions import Case

# The process that measures and its driver keep these to themselves.
SPARE_CORES = 2


class Compiler:
    """Compiles for ``architecture``, as ``offline`` names it, and an L2 cache of ``l2_bytes``."""

    def __init__(self, pool: ProcessPoolExecutor, architecture: str, l2_bytes: int):
        self._pool = pool
        self._architecture = architecture
        self._l2_bytes = l2_bytes

    def compile(self, work: Sequence[tuple[Sequence[Case], Any]], seconds: float) -> list[str]:
        """Every case of ``work`` under the table beside it, as far as ``seconds`` allow; returns what went wrong.

        That is not the last word on a table: the process that measures compiles whatever it does not find.
        """
        try:
            futures = [
                self._pool.submit(
                    compile_cases, part, {**table.constants, "L2_BYTES": self._l2_bytes}, self._architecture
                )
                for cases, table in work
                for part in _by_kernels(cases)
            ]
            done, late = wait(futures, seconds)
            for future in late:
                future.cancel()
            return [reason for future in done if (reason := future.result()) is not None]
        except BrokenProcessPool as error:
            return [f"a process that compiles ahead has ended: {error}"]


@contextmanager
def compiler(architecture: str, l2_bytes: int) -> Iterator[Compiler]:
    """A pool that is dropped on leaving, with whatever it has not begun."""
    workers = max(1, (os.cpu_count() or 1) - SPARE_CORES)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield Compiler(pool, architecture, l2_bytes)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_cases(cases: Sequence[Case], constants: dict[str, Any], architecture: str) -> str | None:
    """Why one of the cases does not compile, or None. Needs a process without TRITON_INTERPRET."""
    for case in cases:
        try:
            with launch_table.using(**constants), compiling_for(architecture):
                case.tensors(torch.device("meta")).run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def _by_kernels(cases: Sequence[Case]) -> list[tuple[Case, ...]]:
    """Cases that take the same kernels side by side."""

    def kernels(case: Case) -> tuple[str, str, str, bool]:
        return case.direction, case.layout, case.node.form, case.direction == "backward" and case.node.forked

    return [tuple(part) for _, part in groupby(sorted(cases, key=kernels), key=kernels)]
