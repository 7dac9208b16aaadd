"""What each kernel launch reads and writes, recorded on the CPU in Triton's interpreter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from resfused.backend import load_kernels


@dataclass
class Argument:
    """A tensor argument of a launch, and how many of its bytes the launch read and wrote."""

    name: str
    numel: int
    dtype: torch.dtype
    nbytes: int
    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Launch:
    kernel: str
    arguments: list[Argument]


class _Accesses:
    """Addresses accessed in one launch, by the size of the element that begins there."""

    def __init__(self) -> None:
        self._addresses: dict[int, list[np.ndarray]] = defaultdict(list)

    def add(self, pointers: Any, mask: Any) -> None:
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        # Computed masks can be integers, which would pick elements by number.
        self._addresses[size].append(pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)])

    def unique_bytes(self) -> np.ndarray:
        """The address of every byte accessed at least once, ascending; forgets them."""
        accessed = [np.zeros(0, np.uint64)]
        for size, addresses in self._addresses.items():
            first = np.unique(np.concatenate(addresses))
            accessed.append((first[:, None] + np.arange(size, dtype=np.uint64)).ravel())
        self._addresses.clear()
        return np.unique(np.concatenate(accessed))


def _touched(addresses: np.ndarray, tensors: dict[str, Tensor], kernel: str) -> dict[str, int]:
    """How many of the byte ``addresses`` lie in each tensor; one that lies in several belongs to the first.

    Raises: IndexError for an address that lies in none.
    """
    touched = {}
    for name, t in tensors.items():
        last = sum((extent - 1) * stride for extent, stride in zip(t.shape, t.stride(), strict=True))
        span = np.array([t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()], np.uint64)
        first, end = np.searchsorted(addresses, span)
        touched[name] = int(end - first)
        addresses = np.delete(addresses, slice(first, end))
    if addresses.size:
        raise IndexError(f"{kernel} accessed {addresses.size} bytes outside its arguments")
    return touched


@contextmanager
def record(execute: bool = True) -> Iterator[list[Launch]]:
    """Within it every launch is appended to the list it yields, with the bytes that it read and wrote.

    Only lanes whose mask is true count; an atomic operation reads and writes. Without ``execute`` launches run nothing
    and count nothing: what remains is their names and the sizes of their arguments.

    Raises: RuntimeError where the kernels are not interpreted.
    """
    require_interpreter()
    launches: list[Launch] = []
    reads, writes = _Accesses(), _Accesses()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas
    run_grid = GridExecutor.__call__

    def masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        reads.add(pointers, mask.data)
        return load(builder, pointers, mask, *rest)

    def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        writes.add(pointers, mask.data)
        return store(builder, pointers, value, mask, *rest)

    def atomic_rmw(builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        reads.add(pointers, mask.data)
        writes.add(pointers, mask.data)
        return rmw(builder, operation, pointers, value, mask, *rest)

    def atomic_cas(builder: Any, pointers: Any, *rest: Any) -> Any:
        reads.add(pointers, True)
        writes.add(pointers, True)
        return cas(builder, pointers, *rest)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        kernel = executor.fn.__name__
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if execute:
            run_grid(executor, *args, **kwargs)
        read = _touched(reads.unique_bytes(), tensors, kernel)
        written = _touched(writes.unique_bytes(), tensors, kernel)
        arguments = [Argument(n, t.numel(), t.dtype, t.nbytes, read[n], written[n]) for n, t in tensors.items()]
        launches.append(Launch(kernel, arguments))

    observed = patch.multiple(
        InterpreterBuilder,
        create_masked_load=masked_load,
        create_masked_store=masked_store,
        create_atomic_rmw=atomic_rmw,
        create_atomic_cas=atomic_cas,
    )
    with observed, patch.object(GridExecutor, "__call__", launch):
        yield launches


def require_interpreter() -> None:
    """RuntimeError where the kernels are not interpreted."""
    kernels = load_kernels()
    if kernels is None or not kernels.INTERPRETED:
        raise RuntimeError("traffic is counted in Triton's interpreter: start the process with TRITON_INTERPRET=1")
