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
WATCHED_BYTES = 2**26


def keep_mapped() -> bool:
    """From now on, and for good, what this process frees stays mapped; False where the C library has no such choice."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No allocation has a mapping of its own, and the heap's end is never given back.
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))


def page_faults() -> int:
    """Of a tensor of ``WATCHED_BYTES`` that is allocated and written, the least of some: the first look for a place."""
    found = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(WATCHED_BYTES, dtype=torch.uint8)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)
