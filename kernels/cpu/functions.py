"""The calls of the C++ kernels: tensors in, one record to the library, tensors out."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activation import ACTIVATIONS, IDENTITY, RELU, Activation
from ..call import (
    NOTHING_BUT_STATISTICS,
    Gradients,
    Kept,
    Norm,
    accumulator,
    check_mask,
    outputs,
    parameter_gradients,
)
from ..geometry import Geometry, in_layout_of, in_one_layout
from . import build

# The records of call.h, and the numbers of its enums.
_NORM = "8q2d"
_FORWARD = struct.Struct(f"=7q 2q 6q 2q {_NORM} {_NORM} qd")
_BACKWARD = struct.Struct(f"=7q 2q 14q 3q {_NORM} {_NORM} 8q qd")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NARROW = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_FUNCTIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_FROM_BATCH, _MOMENTS, _GIVEN, _RUNNING = range(4)
_ALL, _SUMS, _INPUTS, _LOCAL = range(4)


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    training: bool,
    masked: bool,
    activation: Activation = RELU,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As ``kernels.gpu.forward``."""
    g, (x, residual) = in_one_layout(x, residual)
    y, mask = outputs(x, residual, g.mask_numel, masked)
    stats = _room(x, 2 if residual_norm is None else 4, accumulator(x, residual)) if training else None
    statistics = _FROM_BATCH if training else _RUNNING
    _call_forward(g, statistics, x, residual, y, mask, stats, norm, residual_norm, activation)
    return y, mask, stats


def local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    """As ``kernels.gpu.local_statistics``."""
    g, (x, residual) = in_one_layout(x, residual)
    stats = _room(x, 4 if norm_residual else 2, accumulator(x, residual))
    second = NOTHING_BUT_STATISTICS if norm_residual else None
    _call_forward(g, _MOMENTS, x, residual, x, None, stats, NOTHING_BUT_STATISTICS, second, RELU)
    return stats


def normalise(
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    masked: bool,
    activation: Activation = RELU,
) -> tuple[Tensor, Tensor | None]:
    """As ``kernels.gpu.normalise``."""
    g, (x, residual) = in_one_layout(x, residual)
    y, mask = outputs(x, residual, g.mask_numel, masked)
    _call_forward(g, _GIVEN, x, residual, y, mask, stats.contiguous(), norm, residual_norm, activation)
    return y, mask


def backward(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> Gradients:
    """As ``kernels.gpu.backward``."""
    g, activations = _activations(dy, dy_fork, kept)
    dx, dresidual = _inputs_gradients(activations, kept, wanted[:2])
    dz = None
    if kept.residual_norm is None:
        dz, dresidual = dresidual, None
    parameters = parameter_gradients(kept.norm, kept.residual_norm, wanted)
    phases = _ALL if kept.stats is not None else _LOCAL
    _call_backward(g, phases, activations, kept, (dz, dx, dresidual), None, parameters)
    return Gradients(dx, dresidual if dz is None else dz, *parameters)


def local_sums(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> tuple[Tensor, Gradients]:
    """As ``kernels.gpu.local_sums``."""
    g, activations = _activations(dy, dy_fork, kept)
    _, dz = _inputs_gradients(activations, kept, (False, wanted.residual and kept.residual_norm is None))
    parameters = parameter_gradients(kept.norm, kept.residual_norm, wanted)
    sums = _room(dy, 2 if kept.residual_norm is None else 3, accumulator(*activations))
    _call_backward(g, _SUMS, activations, kept, (dz, None, None), sums, parameters)
    return sums, Gradients(None, dz, *parameters)


def input_gradients(
    dy: Tensor, dy_fork: Tensor | None, dz: Tensor | None, kept: Kept, means: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As ``kernels.gpu.input_gradients``."""
    g, activations = _activations(dy, dy_fork, kept)
    dx, dresidual = _inputs_gradients(activations, kept, wanted)
    # dz is dy already masked (and added up), unless it was rounded to a narrower dtype.
    dz = in_layout_of(dz, activations[2]) if dz is not None and dz.dtype is dy.dtype else None
    _call_backward(g, _INPUTS, activations, kept, (dz, dx, dresidual), means, [None] * 4)
    return dx, dresidual


def _room(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """For so many values of every channel."""
    return x.new_empty((rows, x.shape[1]), dtype=dtype)


def _activations(dy: Tensor, dy_fork: Tensor | None, kept: Kept) -> tuple[Geometry, Any]:
    """(x, residual, dy, dy_fork) in one layout, and their geometry."""
    if kept.x is not None:
        return in_one_layout(kept.x, kept.residual, dy, dy_fork)
    assert kept.mask is not None or kept.activation == IDENTITY
    g, (dy, residual, dy_fork) = in_one_layout(dy, kept.residual, dy_fork)
    return g, (None, residual, dy, dy_fork)


def _inputs_gradients(activations: Any, kept: Kept, wanted: Any) -> tuple[Tensor | None, Tensor | None]:
    """Room for those of x and of the residual."""
    x, residual, dy, _ = activations
    like = dy if x is None else x
    dtypes = kept.x_dtype if x is None else x.dtype, kept.residual_dtype if residual is None else residual.dtype
    dx, dresidual = (torch.empty_like(like, dtype=d) if w else None for d, w in zip(dtypes, wanted, strict=True))
    return dx, dresidual


def _call_forward(
    g: Geometry,
    statistics: int,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mask: Tensor | None,
    stats: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
) -> None:
    norms = 1 if residual_norm is None else 2
    record = _FORWARD.pack(
        *_shape(g), *_machine(), norms, statistics, *_tensor(x), *_tensor(residual), *_tensor(y), _address(mask),
        _address(stats), *_norm(norm), *_norm(residual_norm), *_function(activation),
    )  # fmt: skip
    _run(_library(activation, _kind(x, residual, y)).resfused_forward, record)


def _call_backward(
    g: Geometry,
    phases: int,
    activations: Any,
    kept: Kept,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    sums: Tensor | None,
    parameters: list[Tensor | None],
) -> None:
    """``activations`` are (x, residual, dy, dy_fork), ``gradients`` (dz, dx, the normed residual's)."""
    x, residual, dy, dy_fork = activations
    dz, dx, dresidual = gradients
    mask, stats, norm, residual_norm = kept.mask, kept.stats, kept.norm, kept.residual_norm
    check_mask(mask, g.mask_numel)
    acc = accumulator(x, residual, dy, dy_fork, dz)
    stats = None if stats is None else stats.to(acc).contiguous()
    sums = None if sums is None else sums.to(acc).contiguous()
    norms = 1 if residual_norm is None else 2
    dweight, dbias, dresidual_weight, dresidual_bias = parameters
    record = _BACKWARD.pack(
        *_shape(g), *_machine(), norms, phases,
        *_tensor(dy), *_tensor(dy_fork), *_tensor(x), *_tensor(residual), *_tensor(dz), *_tensor(dx),
        *_tensor(dresidual), _address(mask), _address(stats), _address(sums), *_norm(norm), *_norm(residual_norm),
        *_tensor(dweight), *_tensor(dbias), *_tensor(dresidual_weight), *_tensor(dresidual_bias),
        *_function(kept.activation),
    )  # fmt: skip
    kind = _kind(dy, dy_fork, x, residual, dz, dx, dresidual)
    _run(_library(kept.activation, kind).resfused_backward, record)


def _shape(g: Geometry) -> tuple[int, int, int, int]:
    if g.channels_last:
        return 1, 1, g.positions, g.columns
    return 0, g.groups, g.positions, g.columns


def _tensor(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), _DTYPES[t.dtype])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _norm(n: Norm | None) -> tuple[float, ...]:
    if n is None:
        return (0,) * 10
    vectors = (*_tensor(n.weight), *_tensor(n.bias), *_tensor(n.running_mean), *_tensor(n.running_var))
    return *vectors, n.momentum, n.eps or 0.0


def _function(activation: Activation) -> tuple[int, float]:
    return _FUNCTIONS[activation.name], activation.negative_slope


def _machine() -> tuple[int, int, int]:
    return torch.get_num_threads(), *_caches()


@lru_cache(maxsize=1)
def _caches() -> tuple[int, int]:
    """Bytes of the cache of one core, and of the last one; what is common where the system does not say."""
    found = {2: 2**20, 3: 2**25}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            found[level] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return found[2], found[3]


def _kind(*tensors: Tensor | None) -> str:
    """What a library is compiled for that has these dtypes."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if torch.float64 in dtypes:
        return "wide"
    return _NARROW.get(dtypes.pop(), "mixed") if len(dtypes) == 1 else "mixed"


@lru_cache(maxsize=64)
def _library(activation: Activation, kind: str) -> Any:
    library = build.load(build.library_of(activation, kind))
    if (library.resfused_forward_size(), library.resfused_backward_size()) != (_FORWARD.size, _BACKWARD.size):
        raise RuntimeError("the records of functions.py and call.h differ")
    for function in (library.resfused_forward, library.resfused_backward):
        function.argtypes = [ctypes.c_char_p]
    return library


def _run(function: Any, record: bytes) -> None:
    if function(record) != 0:
        raise MemoryError("no memory for the partial results of a node")
