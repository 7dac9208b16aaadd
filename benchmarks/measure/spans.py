"""When each kernel of a piece of work ran, on a GPU by PyTorch's profiler, else by the interpreter's own clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from resfused.backend import load_kernels


class Span(NamedTuple):
    """A kernel from start to end, in milliseconds of one clock."""

    name: str
    start: float
    end: float

    @property
    def milliseconds(self) -> float:
        return self.end - self.start


def spans(work: Callable[[], object], device: torch.device) -> list[Span]:
    """The kernels that ``work`` runs, by start; on a CPU only those of ours, which must be interpreted."""
    found = _on_gpu(work) if device.type == "cuda" else _interpreted(work)
    return sorted(found, key=lambda span: span.start)


def busy(found: Iterable[Span]) -> float:
    """Milliseconds in which at least one of the spans, given by start, runs."""
    total, until = 0.0, float("-inf")
    for span in found:
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def _on_gpu(work: Callable[[], object]) -> list[Span]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


def _interpreted(work: Callable[[], object]) -> list[Span]:
    kernels = load_kernels()
    if kernels is None or not kernels.INTERPRETED:
        raise RuntimeError("without a CUDA GPU the kernels must be interpreted: start with TRITON_INTERPRET=1")
    from triton.runtime.interpreter import GridExecutor

    found = []
    run_grid = GridExecutor.__call__

    def timed(executor: Any, *args: Any, **kwargs: Any) -> None:
        start = perf_counter()
        run_grid(executor, *args, **kwargs)
        found.append(Span(executor.fn.__name__, start * 1e3, perf_counter() * 1e3))

    with patch.object(GridExecutor, "__call__", timed):
        work()
    return found
