"""Launch plans: what is found once for tensors that lie alike, and kernels launched as they were compiled for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ..geometry import Geometry, dense, geometry, in_layout_of
from . import launch_table

# Those whose compiled kernels are known to be called so.
_CALLS_COMPILED = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8)


class Made(NamedTuple):
    """What a launch has beside tensors and floats: its grid, and the kernel's arguments that follow those."""

    grid: tuple[int, ...]
    integers: tuple[int, ...]
    constants: dict[str, Any]


class _Compiled(NamedTuple):
    kernel: CompiledKernel
    grid: tuple[int, ...]
    rest: tuple[Any, ...]


class Plan:
    """The geometry and the launches of one direction, for tensors that Triton compiles alike for.

    Triton looks a kernel up anew at every launch, by every argument, which takes longer than the launch itself. What
    the arguments are follows from the plan's key: a kernel is looked up once.
    """

    def __init__(self, device: torch.device, activations: Sequence[Tensor | None]):
        """``activations``: ones that lie as those of the call, without memory; the first decides on the geometry."""
        x = dense(cast(Tensor, activations[0]))
        self.ready = x is activations[0] and all(t is None or t is in_layout_of(t, x) for t in activations)
        self.g: Geometry = geometry(x)
        self._device = device.index
        self._compiled: dict[int, _Compiled] = {}

    def launch(self, kernel: Any, make: Callable[[], Made], *args: Tensor | float | None) -> None:
        """Launches ``kernel`` with ``args``, and with what ``make`` makes, which is always the same."""
        found = self._compiled.get(id(kernel))
        if found is None or _is_observed(kernel):
            self._look_up(kernel, make(), args)
            return
        compiled, grid, rest = found
        given = [v if v is None or type(v) is float else v.data_ptr() for v in args]  # type: ignore[union-attr]
        stream = driver.active.get_current_stream(self._device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *given, *rest)

    def _look_up(self, kernel: Any, made: Made, args: Sequence[Any]) -> None:
        """Launches it as Triton does, and keeps what it launched."""
        compiled = kernel[made.grid](*args, *made.integers, **made.constants)
        # Nothing comes of an interpreted kernel, and one that was only compiled has no module.
        if _CALLS_COMPILED and isinstance(compiled, CompiledKernel) and compiled.module is not None:
            names = kernel.arg_names[len(args) + len(made.integers) :]
            rest = *made.integers, *(made.constants[name] for name in names)
            self._compiled[id(kernel)] = _Compiled(compiled, (*made.grid, 1, 1)[:3], rest)


def _is_observed(kernel: Any) -> bool:
    """Whether somebody has asked Triton to be told of launches."""
    runtime = knobs.runtime
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or runtime.add_stages_inspection_hook
        or kernel.pre_run_hooks
    )


def plan_for(
    phase: str, activations: Sequence[Tensor | None], vectors: Sequence[Tensor | None], *rest: Hashable
) -> Plan:
    """The plan of a phase, for activations of which the first is there and decides on the layout.

    ``vectors`` are all other tensors that a caller hands in, ``rest`` whatever else tells launches apart. Tensors that
    are made on the way lie as the allocator gives them, at whole 16 bytes.
    """
    low = 0
    kinds: list[Any] = []
    for t in activations:
        if t is None:
            kinds.append(None)
        else:
            kinds.append((t.stride(), t.dtype))
            low |= t.data_ptr()
    for t in vectors:
        if t is None:
            kinds.append(None)
        else:
            kinds.append(t.dtype)
            low |= t.data_ptr()
    x = cast(Tensor, activations[0])
    alignment = tuple(t is not None and t.data_ptr() % 16 for t in (*activations, *vectors)) if low & 15 else None
    return _plan(phase, len(activations), alignment, x.device, x.shape, *kinds, *rest)


@launch_table.cached
def _plan(phase: str, count: int, alignment: Any, device: torch.device, shape: torch.Size, *rest: Any) -> Plan:
    made = [
        None if kind is None else torch.empty_strided(shape, kind[0], dtype=kind[1], device="meta")
        for kind in rest[:count]
    ]
    return Plan(device, made)
