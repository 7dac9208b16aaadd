"""Compiles the library's own launches for a GPU that is not there. Needs a process without TRITON_INTERPRET."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """A kernel as it was compiled, and the grid that it was to run on."""

    kernel: CompiledKernel
    grid: tuple[int, ...]


class _Device:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        """Its own key for each target: Triton keeps what it compiled by device."""
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def target_of(architecture: str) -> GPUTarget:
    """``sm_90`` is NVIDIA's compute capability 9.0; ``gfx942`` is AMD's, with 64 lanes a warp."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


@contextmanager
def compiling_for(architecture: str) -> Iterator[list[Launch]]:
    """Within it, launches on CPU or meta tensors compile for ``architecture`` and run nothing; yields the launches."""
    launches: list[Launch] = []
    run = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(kernel, grid))
        return kernel

    previous = driver._active
    driver.set_active(_Device(target_of(architecture)))
    JITFunction.run = warm_up
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = previous
