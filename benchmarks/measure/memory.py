"""The C library's memory on a CPU: whether a tensor's pages must be mapped anew.

glibc maps every allocation of more than 32 MB for itself and unmaps it when it is freed, so that each tensor's pages
fault again; what allocates less then also faults less. Kept mapped, only traffic counts.
"""

from __future__ import annotations

import ctypes
import resource

import torch

DEFAULT, KEPT = MEMORIES = ("default", "kept")
# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# glibc's aligned allocation cannot take the place that one of the same size has left between others, and would go on
# to new pages ten times and more before it finds room.
RESERVED_BYTES = 2**30
WATCHED_BYTES = 2**26


def keep_mapped() -> bool:
    """From now on, and for good, what this process frees stays mapped; False where the C library has no such choice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No allocation has a mapping of its own, and the heap's end is never given back.
    kept = mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
    if kept:
        torch.ones(RESERVED_BYTES, dtype=torch.uint8)
    return kept


def page_faults() -> int:
    """Of a tensor of ``WATCHED_BYTES`` that is allocated and written, where one like it has been freed before."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(WATCHED_BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
