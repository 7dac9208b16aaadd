"""Compiles the library's own launches for a GPU that is not there. Needs a process without TRITON_INTERPRET."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from resfused.kernels import gpu
from resfused.kernels.activation import Activation
from resfused.kernels.call import to_keep
from resfused.kernels.geometry import geometry
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Other activations: from z, of one tensor and of two, from bits, and with no need of either.
OTHER_FORMS = ("norm+silu", "norm+add+silu", "norm+add+relu6", "norm+add(norm)+identity")
FORWARD, BACKWARD, FORKED, EVAL = PHASES = (
    "training forward", "training backward", "training backward of a fork", "eval forward"
)  # fmt: skip
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


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


def architecture_of(device: torch.device) -> str | None:
    """As above; None where it is no GPU of NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


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


@contextmanager
def compiler_environment() -> Iterator[None]:
    """Processes started within it compile, whatever this one does, and find nothing compiled before."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def compile_launches(form: str, phase: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """Makes the launches of one form and phase, on tensors that have no data. A form ends in its activation's name."""
    *added, name = form.split("+")[1:]
    has_residual, norm_residual, activation = bool(added), added == ["add(norm)"], Activation(name)

    def tensor() -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=LAYOUTS[layout])

    def norm() -> gpu.Norm:
        vectors = [torch.empty(shape[1], dtype=accumulator, device="meta") for _ in range(4)]
        return gpu.Norm(*vectors, momentum=0.1, eps=1e-5)

    x = tensor()
    accumulator = gpu.accumulator(x)
    residual = tensor() if has_residual else None
    norms = norm(), norm() if norm_residual else None
    # The gradients of every input that there is.
    wanted = gpu.Gradients(True, has_residual, True, True, norm_residual, norm_residual)
    keep = to_keep(has_residual, norm_residual, True, activation, wanted)
    if phase in (FORWARD, EVAL):
        training = phase == FORWARD
        gpu.forward(x, residual, *norms, training, keep.mask and training, activation)
        return
    kept = gpu.Kept(
        x if keep.x else None,
        dtype,
        residual if keep.residual else None,
        dtype,
        torch.empty(geometry(x).mask_numel, dtype=torch.uint8, device="meta") if keep.mask else None,
        torch.empty((4 if norm_residual else 2, shape[1]), dtype=accumulator, device="meta"),
        *norms,
        activation,
    )
    gpu.backward(tensor(), tensor() if phase == FORKED else None, kept, wanted)


class Fills(TorchDispatchMode):
    """Within it PyTorch's own kernels beside ours are counted: what it fills or copies, and not what it only makes."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.launches += name.endswith("_") or "zeros" in name or "ones" in name or name in ("full", "clone", "cat")
        return function(*args, **(kwargs or {}))
