"""Compiles launches in every core before the first is needed; the results are in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import groupby
from typing import Any

import torch
from count import offline
from resfused.kernels.gpu import launch_table

Work = tuple[str, str, str, str, tuple[int, ...]]
"""Form, phase, dtype, layout and shape, as ``offline.compile_launches`` takes them."""


def compile_launches(work: Sequence[Work], device: torch.device, seconds: float) -> list[str]:
    """As far as ``seconds`` allow; returns what went wrong. Nothing where ``device`` is no GPU of NVIDIA's."""
    architecture = offline.architecture_of(device)
    if architecture is None:
        return []
    constants = {
        "L2_BYTES": launch_table.l2_bytes(device), "MULTIPROCESSORS": launch_table.multiprocessors(device)
    }  # fmt: skip
    return compile_for(architecture, constants, work, seconds)


def compile_for(architecture: str, constants: dict[str, Any], work: Sequence[Work], seconds: float) -> list[str]:
    """``constants``: of the launch table. One process has all shapes of a kernel, and compiles what they share once."""
    parts = [list(part) for _, part in groupby(sorted(work), key=lambda each: each[:4])]
    pool = ProcessPoolExecutor(min(len(parts), os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(_compile, part, constants, architecture) for part in parts]
        done, late = wait(futures, seconds)
        found = [reason for future in done for reason in future.result()]
        return found + [f"{seconds:.0f} s were over"] * len(late)
    except BrokenProcessPool as error:
        return [f"a process that compiles ahead has ended: {error}"]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
