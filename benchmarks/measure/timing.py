"""Time of pieces of work on a device: variants in turn, raw samples in milliseconds, and a copy to compare with.

The variants take turns within a repetition, so that they meet the same clocks, each time in another order, so that none
always finds the caches as the same other has left them; each has several sets of inputs, which
rotate where one would stay in the L2 cache; work is queued behind a wait on the GPU, so that it is the GPU that is
timed and not the host that launches. On a CPU its clock is read before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from statistics import median
from time import monotonic, perf_counter

import torch

# Sets of inputs together exceed any L2 cache.
ROTATED_BYTES = 2**29
# Long enough for the host to queue a node behind it.
WAIT_CYCLES = 2_000_000


def warm_ups(device: torch.device) -> int:
    """Calls that are not timed: a GPU's compile, choose algorithms and fill the allocator."""
    return 3 if device.type == "cuda" else 1


class Deadline:
    """So many minutes from now on."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self._end = monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        return monotonic() > self._end

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._end - monotonic())

    @property
    def over(self) -> str:
        """The reason for what was not begun."""
        return f"the {self.minutes:g} minutes were over"


def first_line(error: Exception) -> str:
    """What a table has room for."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def rotation(set_bytes: int, repetitions: int, device: torch.device) -> int:
    """How many sets of inputs, each of ``set_bytes``, the repetitions should rotate through."""
    needed = ROTATED_BYTES // max(set_bytes, 1) if device.type == "cuda" else 1
    return max(1, min(needed, repetitions))


def interleaved(
    calls: dict[str, list[Callable[[], object]]], repetitions: int, device: torch.device, least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of every repetition; the first ones of each variant warm up and are dropped.

    There are more repetitions until ``least_seconds`` are over: of calls that take microseconds many are needed.
    """
    timed: dict[str, list[Callable[[], float]]] = {variant: [] for variant in calls}
    untimed = warm_ups(device)
    turns = count()
    order = Random(0)
    end = monotonic() + least_seconds
    for repetition in count():
        if not calls or (repetition >= untimed + repetitions and monotonic() >= end):
            break
        for variant, rotated in order.sample(list(calls.items()), len(calls)):
            # Every call takes the next set, whatever its variant: none finds what the one before has left in the cache.
            elapsed = _timed(rotated[next(turns) % len(rotated)], device)
            if repetition >= untimed:
                timed[variant].append(elapsed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {variant: [elapsed() for elapsed in each] for variant, each in timed.items()}


def _timed(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """Runs the call; what is returned tells its milliseconds once the device has caught up."""
    if device.type != "cuda":
        start = perf_counter()
        call()
        milliseconds = (perf_counter() - start) * 1e3
        return lambda: milliseconds
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT_CYCLES)
    first.record()
    call()
    last.record()
    return lambda: first.elapsed_time(last)


def captured(makes: Sequence[Callable[[], Callable[[], object]]], device: torch.device) -> Callable[[], object]:
    """The calls that ``makes`` make, one after the other, as one replay of a CUDA graph.

    They are made on the capturing stream too: a backward runs on the stream of its forward.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = [make() for make in makes]
        for _ in range(warm_ups(device)):
            for call in calls:
                call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay(calls: object = calls) -> None:
        # The graph reads what the calls hold.
        graph.replay()

    return replay


def copy_bandwidth(device: torch.device, repetitions: int = 20) -> float:
    """GB/s of a copy of 1 GiB on a GPU or of 256 MiB on a CPU, more than its caches hold; bytes read and written."""
    size = 2**30 if device.type == "cuda" else 2**28
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    samples = interleaved({"copy": [lambda: target.copy_(source)]}, repetitions, device)["copy"]
    return 2 * size / median(samples) / 1e6
