"""Which implementation a tensor takes: the Triton kernels, those in C++ for CPUs, or plain PyTorch operators."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .kernels import cpu

Backend = Literal["auto", "triton", "native", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VARIABLE = "RESFUSED_BACKEND"
_warned = False
_HAS_TRITON = find_spec("triton") is not None
_GPU = f"{__package__}.kernels.gpu"


def _checked(name: object, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    if name == "triton" and not _HAS_TRITON:
        raise RuntimeError(f"{source} is 'triton', which needs the triton package, and it is not installed")
    return name


_chosen = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


def get_backend() -> Backend:
    """The backend in force: ``"auto"``, ``"triton"``, ``"native"`` or ``"torch"``."""
    return _chosen


def set_backend(name: Backend) -> None:
    """Chooses what every later call runs on; the environment variable ``RESFUSED_BACKEND`` sets the start value.

    ``"auto"``: the Triton kernels for CUDA and ROCm tensors; for CPU tensors the kernels in C++, which the first call
    compiles (``python -m resfused.build`` does it ahead), or Triton's in a process started with ``TRITON_INTERPRET=1``;
    plain PyTorch operators elsewhere, and with a warning where nothing can be compiled. ``"triton"``, ``"native"``: the
    Triton kernels, or those in C++, or a RuntimeError where they cannot run. ``"torch"``: plain PyTorch operators.

    Raises: ValueError for another name, RuntimeError for ``"triton"`` where Triton is not installed.
    """
    global _chosen
    _chosen = _checked(name, "backend")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """``set_backend`` for the duration of a ``with`` block."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def backend_for(x: Tensor) -> Literal["triton", "native", "torch"]:
    """``"triton"``, ``"native"`` or ``"torch"``: what an activation ``x`` takes under the backend in force.

    Raises: TypeError where ``x`` is not a tensor; RuntimeError where a backend is forced that ``x`` cannot take.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, but got {type(x).__name__}")
    if _chosen == "torch":
        return "torch"
    name, obstacle = _kernels_for(x)
    if obstacle is None:
        return name
    # There is nothing to launch for an empty tensor: that is no reason to refuse it.
    if _chosen != "auto" and x.numel() > 0:
        raise RuntimeError(f"the backend {_chosen!r} was forced, but input {obstacle}")
    return "torch"


def require_kernels(x: Tensor) -> Any:
    """The kernels, for an activation ``x`` that they can take; RuntimeError for any other."""
    name, obstacle = _kernels_for(x)
    if obstacle is not None:
        raise RuntimeError(f"the {name} kernels cannot run: input {obstacle}")
    return load_kernels() if name == "triton" else cpu


def _kernels_for(x: Tensor) -> tuple[Literal["triton", "native"], str | None]:
    """Whose turn ``x`` is, and why those kernels cannot take it, as the end of a sentence about it, or None."""
    if _chosen == "native" or (_chosen != "triton" and x.is_cpu and not _interpreted()):
        return "native", _native_obstacle(x)
    return "triton", _triton_obstacle(x)


def load_kernels() -> Any:
    """The module of Triton kernels, imported at first need; None where Triton is not installed."""
    if not _HAS_TRITON:
        return None
    if not torch.compiler.is_compiling():
        return _loaded()
    # A statement, which torch.compile sees through.
    from .kernels import gpu

    return gpu


@cache
def _loaded() -> Any:
    """A statement takes a microsecond though there is nothing left to import."""
    from .kernels import gpu

    return gpu


def _triton_obstacle(x: Tensor) -> str | None:
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed"
    if not x.is_cuda and not (x.is_cpu and (_interpreted() or load_kernels().INTERPRETED)):
        return f"is on {x.device}, and needs a CUDA or ROCm device, or the CPU with TRITON_INTERPRET=1"
    return _unfit(x)


def _native_obstacle(x: Tensor) -> str | None:
    """Compiles the kernels where nothing else is in their way."""
    if not x.is_cpu:
        return f"is on {x.device}, and needs the CPU"
    return _unfit(x) or _unbuilt(_chosen == "auto")


def _unfit(x: Tensor) -> str | None:
    """What no kernels take."""
    if x.dtype not in FLOATS:
        return f"has dtype {x.dtype}, and needs one of {', '.join(map(str, FLOATS))}"
    if x.numel() == 0:
        return f"is empty, of shape {tuple(x.shape)}"
    return None


def _unbuilt(warn: bool) -> str | None:
    """Compiles the kernels for CPUs, at the first call; what stands in the way."""
    global _warned
    reason = cpu.obstacle()
    if reason is None:
        return None
    if warn and not _warned:
        _warned = True
        warnings.warn(f"plain PyTorch operators run on the CPU, as its kernels cannot: {reason}", stacklevel=2)
    return f"needs kernels that cannot be had here: {reason}"


def _interpreted() -> bool:
    """Whether CPU tensors take Triton's interpreter. Triton is not imported to say that they do not."""
    defined = sys.modules.get(_GPU)
    if defined is None:
        return _asks_for_interpreter() and _HAS_TRITON and bool(load_kernels().INTERPRETED)
    return bool(defined.INTERPRETED)


@cache
def _asks_for_interpreter() -> bool:
    """The environment of the first call: to look at every one takes a microsecond."""
    return bool(os.environ.get("TRITON_INTERPRET"))


# torch.compile asks once and takes the answers for constants, as torch.compiler.assume_constant_result would have it;
# that function imports the whole compiler.
for _asked in (_unbuilt, _interpreted):
    vars(_asked)["_dynamo_marked_constant"] = True
