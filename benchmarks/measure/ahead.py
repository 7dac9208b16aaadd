"""Compiles launches in every core before the first is needed; the results are in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch
from count import offline
from resfused.kernels.gpu import launch_table

Work = tuple[str, str, str, str, tuple[int, ...]]
"""Form, phase, dtype, layout and shape, as ``offline.compile_launches`` takes them."""


def compile_launches(work: Sequence[Work], device: torch.device, seconds: float) -> list[str]:
    """As far as ``seconds`` allow; returns what went wrong. Nothing where ``device`` is no GPU of NVIDIA's.

    One process has all shapes of a kernel, and compiles what they share once.
    """
    architecture = offline.architecture_of(device)
    if architecture is None:
        return []
    constants = constants_of(device)
    parts = [(list(part), constants, architecture) for _, part in groupby(sorted(work), key=lambda each: each[:4])]
    with processes(min(len(parts), os.cpu_count() or 1)) as pool:
        found, late = in_parts(pool, _compile, parts, seconds)
    return found + [f"{seconds:.0f} s were over"] * late


def constants_of(device: torch.device) -> dict[str, Any]:
    """What the launch table asks of a device, for processes that compile without it."""
    return {"L2_BYTES": launch_table.l2_bytes(device), "MULTIPROCESSORS": launch_table.multiprocessors(device)}


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool that is dropped on leaving, with whatever it has not begun."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def in_parts(
    pool: ProcessPoolExecutor, compile: Callable[..., list[str]], parts: Sequence[Sequence[Any]], seconds: float
) -> tuple[list[str], int]:
    """What ``compile`` says went wrong in the parts that end within ``seconds``, and how many did not."""
    try:
        futures = [pool.submit(compile, *part) for part in parts]
        done, late = wait(futures, seconds)
        for future in late:
            future.cancel()
        return [reason for future in done for reason in future.result()], len(late)
    except BrokenProcessPool as error:
        return [f"a process that compiles ahead has ended: {error}"], 0


def _compile(work: Sequence[Work], constants: dict[str, Any], architecture: str) -> list[str]:
    """Why some do not compile. Needs a process without TRITON_INTERPRET."""
    reasons = []
    for form, phase, dtype, layout, shape in work:
        try:
            with launch_table.using(**constants), offline.compiling_for(architecture) as launches:
                offline.compile_launches(form, phase, getattr(torch, dtype), layout, shape)
        except Exception as error:
            reasons.append(f"{form}, {phase}, {dtype} {layout}: {type(error).__name__}: {error}")
        for launch in launches:
            _compile_launcher(launch.kernel)
    return reasons


def _compile_launcher(kernel: Any) -> None:
    """What calls the kernel is C code of its own up to Triton 3.7. Without it, it is compiled at the first launch."""
    with suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)
