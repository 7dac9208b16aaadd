"""Launches in Triton's interpreter with their programs interleaved, watched for races and deadlocks.

The interpreter runs the programs of a launch one after the other, so nothing that needs two at once can go wrong in it.
Within ``interleaved(schedule)`` each hands over before every load, store, atomic and barrier, as ``scheduler`` says;
``detector`` says what is a race.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from detector import Access, Detector, Fresh, Launched, Log
from scheduler import Schedule, Scheduler, Spin
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


class _Launch:
    """Stands for a kernel's function: keeps the programs that the interpreter calls it for, and with the last runs all.

    So whatever the interpreter does with the arguments before and after the programs is its own.
    """

    def __init__(self, fn: Any, tensors: dict[str, Tensor], schedule: Schedule, fresh: Fresh, log: Log) -> None:
        self.__globals__, self.__name__, self.__signature__ = fn.__globals__, fn.__name__, inspect.signature(fn)
        self._fn, self._tensors, self._schedule, self._fresh, self._log = fn, tensors, schedule, fresh, log
        self._programs: list[tuple[int, ...]] = []
        self._scheduler: Any = None
        self._detector: Any = None

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self._programs.append(builder.grid_idx)
        total = len(self._programs)
        if total == math.prod(builder.grid_dim):
            self._detector = Detector(self.__name__, self._tensors, total, self._fresh, self._log)
            self._scheduler = Scheduler(
                self.__name__, total, lambda: self._run(arguments), self._schedule, len(self._log.launches)
            )
            self._scheduler.run()
            self._log.launches.append(
                Launched(self.__name__, total, self._detector.operations, self._scheduler.switches)
            )

    def _run(self, arguments: dict[str, Any]) -> None:
        self._resume()
        self._fn(**arguments)

    def _resume(self) -> int:
        number = self._scheduler.running
        interpreter.interpreter_builder.grid_idx = self._programs[number]
        return number

    def operate(self, access: str, pointers: Any, mask: Any, operation: Callable[[], Any], order: Any = None) -> Any:
        """An operation of the running program, in its turn; ``order``: an atomic's semantics."""
        self._scheduler.pause()
        program = self._resume()
        # Computed masks can be integers, which would pick elements by number.
        lanes = np.broadcast_to(mask, pointers.data.shape).astype(bool)
        addresses = pointers.data[lanes].astype(np.int64)
        size, site = max(8, pointers.get_element_ty().primitive_bitwidth) // 8, _site()
        self._detector.access(program, Access(access, addresses, size, site))
        if order is not None:
            self._detector.synchronise(program, addresses, order)
        found = None
        if addresses.size == 1 and access != "store":
            found = Spin(site, addresses.item(), ctypes.string_at(addresses.item(), size))
        result = operation()
        self._scheduler.found(found if found is not None and found.lasts() else None)
        return result

    def barrier(self) -> None:
        self._scheduler.pause()
        self._detector.barrier(self._resume())


def _site() -> str:
    """Where in the kernels' source the operation under way stands."""
    frame: Any = sys._getframe(1)
    while "/triton/" in frame.f_code.co_filename or frame.f_globals["__name__"] == __name__:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _tensors(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments:
        if isinstance(value, Tensor) and value.numel():
            yield name, value
        elif isinstance(value, tuple):
            yield from _tensors((f"{name}[{i}]", each) for i, each in enumerate(value))


def _operations(current: list[_Launch]) -> dict[str, Callable[..., Any]]:
    """Of the interpreter's builder, those that the last of the launches under way is to be told of."""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    rmw, cas = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_atomic_cas

    def masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return current[-1].operate("load", pointers, mask.data, lambda: load(builder, pointers, mask, *rest))

    def masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return current[-1].operate("store", pointers, mask.data, lambda: store(builder, pointers, value, mask, *rest))

    def atomic_rmw(builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *order: Any) -> Any:
        return atomic(pointers, mask.data, *order, lambda: rmw(builder, op, pointers, value, mask, *order))

    def atomic_cas(builder: Any, pointers: Any, expected: Any, value: Any, *order: Any) -> Any:
        return atomic(pointers, True, *order, lambda: cas(builder, pointers, expected, value, *order))

    def atomic(pointers: Any, mask: Any, semantics: Any, scope: Any, operation: Callable[[], Any]) -> Any:
        if scope == ir.MEM_SYNC_SCOPE.CTA:
            return current[-1].operate("store", pointers, mask, operation)
        return current[-1].operate("atomic", pointers, mask, operation, semantics)

    def barrier(builder: Any) -> None:
        current[-1].barrier()

    return {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_rmw": atomic_rmw,
        "create_atomic_cas": atomic_cas,
        "create_barrier": barrier,
    }


@contextmanager
def interleaved(schedule: Schedule) -> Iterator[Log]:
    """Within it every launch runs by ``schedule``; what is found is in the log it yields.

    Launches raise: DeadlockError; IndexError for an access outside a launch's arguments; what a kernel raises.
    """
    log, fresh = Log(), Fresh()
    current: list[_Launch] = []
    run_grid = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        executor.fn = _Launch(executor.fn, dict(_tensors(given.items())), schedule, fresh, log)
        current.append(executor.fn)
        try:
            run_grid(executor, *args, **kwargs)
        except InterpreterError as error:
            raise _cause(error) from None
        finally:
            current.pop()

    with ExitStack() as stack:
        stack.enter_context(patch.multiple(InterpreterBuilder, **_operations(current)))
        stack.enter_context(patch.object(GridExecutor, "__call__", launch))
        for owner, name in _ALLOCATORS:
            stack.enter_context(patch.object(owner, name, fresh.poisoned(getattr(owner, name))))
        yield log


def _cause(error: BaseException) -> BaseException:
    """What a kernel has raised, which every call of a device function has wrapped."""
    while isinstance(error, InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error
