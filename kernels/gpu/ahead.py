"""Kernels compiled before they are needed: launches of what is not compiled are noted, and that compiled at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from triton import AsyncCompileMode, knobs


class Missing(NamedTuple):
    """A kernel that a device has no code of: ``specialisation`` says for which arguments, as Triton writes it down."""

    device: int
    specialisation: str
    kernel: Any


@contextmanager
def noting() -> Iterator[list[Missing]]:
    """Within it launches whose kernels are not compiled are not made, in any thread, and yielded."""
    missing: list[Missing] = []
    others = knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        """Whether it is not to be compiled now. Kernels that are not the library's are none of ours."""
        if fn.module.rpartition(".")[0] != __package__:
            return bool(others and others(fn=fn, compile=compile, **rest))
        missing.append(Missing(compile["device"], compile["specialization_data"], fn.jit_function))
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield missing
    finally:
        knobs.runtime.jit_cache_hook = others


def compile_missing(missing: Iterable[Missing]) -> int:
    """Compiles and loads them in every core, by threads: Python is a third of a compilation; returns how many."""
    wanted = sorted(dict.fromkeys(missing), key=lambda each: each.device)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for device, part in groupby(wanted, lambda each: each.device):
            with _current(device), AsyncCompileMode(pool):
                kernels = [each.kernel.preload(each.specialisation) for each in part]
            # Up to Triton 3.7 what calls a kernel is C code of its own, compiled when it is loaded.
            list(pool.map(_load, kernels, [device] * len(kernels)))
    return len(wanted)


def _load(kernel: Any, device: int) -> None:
    """``run`` is found at the first look at it, with all that it needs."""
    with _current(device):
        kernel.result().run  # noqa: B018


def _current(device: int) -> Any:
    """In it ``device`` is the thread's; nothing where there is no GPU."""
    return torch.cuda.device(device if torch.cuda.is_available() else -1)
