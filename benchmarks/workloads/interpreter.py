"""Triton's interpreter at more than twice its speed, for the processes of tests and benchmarks."""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


class _Kept:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def keep_patches() -> bool:
    """Lets Triton's language be patched for the interpreter once for each module of kernels, and stay so.

    Triton walks all of ``triton.language`` at every call of a device function, which takes more than half of an
    interpreted launch. In a process whose kernels are interpreted none can be compiled afterwards; in any other, and
    where this Triton has not what is expected, it is left alone: False.
    """
    try:
        from triton import knobs
        from triton.runtime import interpreter

        patch: Callable[[Any], Any] = interpreter._patch_lang
        if not knobs.runtime.interpret or list(inspect.signature(patch).parameters) != ["fn"]:
            return False
    except (ImportError, AttributeError, TypeError):
        return False
    patched: set[str] = set()

    def patch_once(fn: Any) -> _Kept:
        module = fn.__globals__["__name__"]
        if module not in patched:
            patch(fn)
            patched.add(module)
        return _Kept()

    interpreter._patch_lang = patch_once
    return True


def interpreted(work: Callable[[], T]) -> T:
    """What ``work`` returns in a process of its own, in which Triton's kernels are interpreted."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, context, keep_patches) as pool:
        return pool.submit(work).result()
