"""Time of pieces of work on a device: variants in turn, raw samples in milliseconds, and a copy to compare with.

The variants take turns within a repetition, so that they meet the same clocks; each has several sets of inputs, which
rotate where one would stay in the L2 cache; work is queued behind a wait on the GPU, so that it is the GPU that is
timed and not the host that launches.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

# Sets of inputs together exceed any L2 cache.
ROTATED_BYTES = 2**29
# Long enough for the host to queue a node behind it.
WAIT_CYCLES = 1_000_000
WARM_UP = 3


def rotation(set_bytes: int, repetitions: int, device: torch.device) -> int:
    """How many sets of inputs, each of ``set_bytes``, the repetitions should rotate through."""
    needed = ROTATED_BYTES // max(set_bytes, 1) if device.type == "cuda" else 1
    return max(1, min(needed, repetitions))


def interleaved(
    calls: dict[str, list[Callable[[], object]]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of every repetition; the first ones of each variant warm up and are dropped."""
    timed: dict[str, list[Callable[[], float]]] = {variant: [] for variant in calls}
    for repetition in range(WARM_UP + repetitions):
        for variant, rotated in calls.items():
            elapsed = _timed(rotated[repetition % len(rotated)], device)
            if repetition >= WARM_UP:
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


def copy_bandwidth(device: torch.device, repetitions: int = 20) -> float:
    """GB/s of a device-to-device copy of 1 GiB (16 MiB on a CPU), bytes read and written."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    samples = interleaved({"copy": [lambda: target.copy_(source)]}, repetitions, device)["copy"]
    return 2 * size / median(samples) / 1e6
