"""Which implementation a tensor takes: the Triton kernels, or plain PyTorch operators."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VARIABLE = "RESFUSED_BACKEND"
_HAS_TRITON = find_spec("triton") is not None


def _checked(name: object, source: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    if name == "triton" and not _HAS_TRITON:
        raise RuntimeError(f"{source} is 'triton', which needs the triton package, and it is not installed")
    return name


_chosen = _checked(os.environ.get(_VARIABLE, "auto"), _VARIABLE)


def get_backend() -> Backend:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"torch"``."""
    return _chosen


def set_backend(name: Backend) -> None:
    """Chooses what every later call runs on; the environment variable ``RESFUSED_BACKEND`` sets the start value.

    ``"auto"``: the Triton kernels for CUDA and ROCm tensors, and for CPU tensors in a process started with
    ``TRITON_INTERPRET=1``; plain PyTorch operators elsewhere. ``"triton"``: the kernels, or a RuntimeError where they
    cannot run. ``"torch"``: plain PyTorch operators.

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


def backend_for(x: Tensor) -> Literal["triton", "torch"]:
    """``"triton"`` or ``"torch"``: what an activation ``x`` takes under the backend in force.

    Raises: TypeError where ``x`` is not a tensor; RuntimeError where ``"triton"`` is forced and ``x`` cannot take it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, but got {type(x).__name__}")
    if _chosen == "torch":
        return "torch"
    obstacle = _obstacle(x)
    if obstacle is None:
        return "triton"
    # There is nothing to launch for an empty tensor: that is no reason to refuse it.
    if _chosen == "triton" and x.numel() > 0:
        raise RuntimeError(f"the backend 'triton' was forced, but input {obstacle}")
    return "torch"


def require_kernels(x: Tensor) -> Any:
    """The kernels, for an activation ``x`` that they can take; RuntimeError for any other."""
    obstacle = _obstacle(x)
    if obstacle is not None:
        raise RuntimeError(f"the Triton kernels cannot run: input {obstacle}")
    return load_kernels()


def load_kernels() -> Any:
    """The module of Triton kernels, imported at first need; None where Triton is not installed."""
    if not _HAS_TRITON:
        return None
    # A statement, which torch.compile sees through.
    from .kernels import gpu

    return gpu


def _obstacle(x: Tensor) -> str | None:
    """Why the kernels cannot take ``x``, as the end of a sentence about it; None where they can."""
    if not _HAS_TRITON:
        return "needs the triton package, which is not installed"
    if not x.is_cuda and not (x.device.type == "cpu" and load_kernels().INTERPRETED):
        return f"is on {x.device}, and needs a CUDA or ROCm device, or the CPU with TRITON_INTERPRET=1"
    if x.dtype not in FLOATS:
        return f"has dtype {x.dtype}, and needs one of {', '.join(map(str, FLOATS))}"
    if x.numel() == 0:
        return f"is empty, of shape {tuple(x.shape)}"
    return None
