"""Triton's interpreter at more than three times its speed, for the processes of tests and benchmarks."""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from unittest.mock import patch

T = TypeVar("T")


class _Kept:
    """A patch that stays."""

    def restore(self) -> None:
        pass


def speed_up() -> bool:
    """Leaves out of Triton's interpreter what takes two thirds of an interpreted launch.

    Triton walks all of ``triton.language`` at every call of a device function, to patch it: now once for each module of
    kernels, and it stays so. It makes a table of dtypes wherever it needs one of them: now they are kept. It computes
    every 32-bit integer again in 64 bits, which tensors that fit an interpreter cannot overflow: now it does not. In a
    process whose kernels are interpreted none can be compiled afterwards; in any other, and where this Triton has not
    what is expected, it is left alone: False.
    """
    try:
        from triton import knobs
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        options = replace(builder.options, sanitize_overflow=False)
        dtype_of: Callable[[Any], Any] = interpreter._get_np_dtype
        patch: Callable[[Any], Any] = interpreter._patch_lang
        if not knobs.runtime.interpret or list(inspect.signature(patch).parameters) != ["fn"]:
            return False
    except (ImportError, AttributeError, TypeError):
        return False
    patched: set[str] = set()
    of_scalar = cache(dtype_of)

    def patch_once(fn: Any) -> _Kept:
        module = fn.__globals__["__name__"]
        if module not in patched:
            patch(fn)
            patched.add(module)
        return _Kept()

    interpreter._patch_lang = patch_once
    # Types of pointers have no hash.
    interpreter._get_np_dtype = lambda t: dtype_of(t) if t.scalar.is_ptr() else of_scalar(t.scalar)
    builder.options = options
    return True


def interpreted(work: Callable[[], T]) -> T:
    """What ``work`` returns in a process of its own, in which Triton's kernels are interpreted."""
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(1, context, speed_up) as pool:
        return pool.submit(work).result()
