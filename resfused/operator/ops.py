"""The kernels as operators of the dispatcher, so that torch.compile, fake tensors and export see through them.

They know nothing of autograd: ``FusedResidualBlock`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..backend import require_kernels

_NORM = (
    "Tensor? {0}weight, Tensor? {0}bias, Tensor{1}? {0}running_mean, Tensor{2}? {0}running_var, "
    "float {0}momentum, float {0}eps"
)
_FROZEN = f"{_NORM.format('', '', '')}, bool norm_residual, {_NORM.format('residual_', '', '')}"
_TRAINED = f"{_NORM.format('', '(a!)', '(b!)')}, bool norm_residual, {_NORM.format('residual_', '(c!)', '(d!)')}"
_AFFINE = "Tensor? weight, Tensor? bias, bool norm_residual, Tensor? residual_weight, Tensor? residual_bias"
_SCHEMAS = (
    f"forward_training(Tensor x, Tensor? residual, {_TRAINED}, bool save_mask)"
    " -> (Tensor y, Tensor mask, Tensor stats)",
    f"forward_frozen(Tensor x, Tensor? residual, {_FROZEN}, bool save_mask) -> (Tensor y, Tensor mask)",
    "backward(Tensor dy, Tensor? dy_fork, Tensor x, Tensor? residual, ScalarType? residual_dtype, Tensor? mask, "
    f"Tensor? stats, {_FROZEN}, bool[6] wanted) -> Tensor[]",
    # The phases of a training node on their own, for statistics over several processes.
    "local_statistics(Tensor x, Tensor? residual, bool norm_residual) -> Tensor",
    f"normalise(Tensor x, Tensor? residual, Tensor stats, {_AFFINE}) -> (Tensor y, Tensor mask)",
    "local_sums(Tensor dy, Tensor? dy_fork, Tensor x, Tensor? residual, ScalarType? residual_dtype, Tensor mask, "
    f"Tensor stats, {_AFFINE}, bool[5] wanted) -> Tensor[]",
    "input_gradients(Tensor dy, Tensor? dy_fork, Tensor? dz, Tensor x, Tensor? residual, Tensor mask, Tensor stats, "
    f"Tensor means, {_AFFINE}, bool[2] wanted) -> Tensor[]",
)


def _norms(kernels: Any, values: Sequence[Any]) -> tuple[Any, Any]:
    """(Norm, Norm or None) from the arguments of ``_NORM``, ``norm_residual`` and ``_NORM`` again."""
    values = [v.contiguous() if isinstance(v, Tensor) else v for v in values]
    return kernels.Norm(*values[:6]), kernels.Norm(*values[7:13]) if values[6] else None


def _affine_norms(kernels: Any, values: Sequence[Any]) -> tuple[Any, Any]:
    """(Norm, Norm or None) from the arguments of ``_AFFINE``, for kernels that are given the statistics."""
    weight, bias, norm_residual, *residual_affine = values
    rest = (None, None, 0.0, 0.0)
    return _norms(kernels, (weight, bias, *rest, norm_residual, *residual_affine, *rest))


def _write_back(given: Sequence[Tensor | None], used: Any) -> None:
    """Running statistics that were updated in a contiguous copy, and what autograd must know of the others."""
    if used is None:
        return
    for buffer, updated in zip(given, (used.running_mean, used.running_var), strict=True):
        if buffer is None:
            continue
        if buffer is updated:
            torch.autograd.graph.increment_version(buffer)
        else:
            buffer.copy_(updated)


def _forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *values, save_mask = rest
    kernels = require_kernels(x)
    norm, residual_norm = _norms(kernels, values)
    with torch.cuda.device_of(x):
        y, mask, stats = kernels.forward(x, residual, norm, residual_norm, True, save_mask)
    for given, used in zip((values[2:4], values[9:11]), (norm, residual_norm), strict=True):
        _write_back(given, used)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask, stats


def _forward_frozen(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, save_mask = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        y, mask, _ = kernels.forward(x, residual, *_norms(kernels, values), False, save_mask)
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    kernels = require_kernels(x)
    norm, residual_norm = _norms(kernels, values)
    with torch.cuda.device_of(x):
        gradients = kernels.backward(
            dy, dy_fork, x, residual, residual_dtype, mask, stats, norm, residual_norm, kernels.Gradients(*wanted)
        )
    return [g for g in gradients if g is not None]


def _local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    with torch.cuda.device_of(x):
        return require_kernels(x).local_statistics(x, residual, norm_residual)


def _normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        y, mask = kernels.normalise(x, residual, stats, *_affine_norms(kernels, affine))
    return y, x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        sums, gradients = kernels.local_sums(
            dy, dy_fork, x, residual, residual_dtype, mask if mask.numel() else None, stats,
            *_affine_norms(kernels, affine), kernels.Gradients(False, *wanted),
        )  # fmt: skip
    return [sums, *(g for g in gradients if g is not None)]


def _input_gradients(
    dy: Tensor,
    dy_fork: Tensor | None,
    dz: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor,
    stats: Tensor,
    means: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kernels = require_kernels(x)
    with torch.cuda.device_of(x):
        gradients = kernels.input_gradients(
            dy, dy_fork, dz, x, residual, mask if mask.numel() else None, stats, means,
            *_affine_norms(kernels, affine), wanted,
        )  # fmt: skip
    return [g for g in gradients if g is not None]


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, save_mask = rest
    return _fake_outputs(x, residual, save_mask and residual is not None and not values[6])


def _fake_outputs(x: Tensor, residual: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    kernels = require_kernels(x)
    dense = kernels.dense(x)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = x.new_empty(kernels.geometry(dense).mask_numel if masked else 0, dtype=torch.uint8)
    return torch.empty_like(dense, dtype=dtype), mask


def _fake_forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mask = _fake_forward(x, residual, *rest)
    stats = x.new_empty((4 if rest[6] else 2, x.shape[1]), dtype=require_kernels(x).accumulator(x, residual))
    return y, mask, stats


def _fake_backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    dense = require_kernels(x).dense(x)
    dtype = residual_dtype if residual is None else residual.dtype
    gradients = [torch.empty_like(dense), torch.empty_like(dense, dtype=dtype)]
    parameters = _fake_parameter_gradients((*values[:2], *values[7:9]), wanted[2:])
    return [g for g, want in zip(gradients, wanted[:2], strict=True) if want] + parameters


def _fake_parameter_gradients(parameters: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, want in zip(parameters, wanted, strict=True)
        if want
    ]


def _fake_local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    accumulator = require_kernels(x).accumulator(x, residual)
    return x.new_empty((4 if norm_residual else 2, x.shape[1]), dtype=accumulator)


def _fake_normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, residual, residual is not None and not affine[2])


def _fake_local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kernels = require_kernels(x)
    sums = x.new_empty((3 if affine[2] else 2, x.shape[1]), dtype=kernels.accumulator(x, residual, dy))
    dz = [torch.empty_like(kernels.dense(x), dtype=residual_dtype)] if wanted[0] and not affine[2] else []
    return [sums, *dz, *_fake_parameter_gradients((*affine[:2], *affine[3:]), wanted[1:])]


def _fake_input_gradients(
    dy: Tensor, dy_fork: Tensor | None, dz: Tensor | None, x: Tensor, residual: Tensor | None, *rest: Any
) -> list[Tensor]:
    dense = require_kernels(x).dense(x)
    return [
        torch.empty_like(dense, dtype=t.dtype)
        for t, want in zip((x, residual), rest[-1], strict=True)
        if want and t is not None
    ]


_library = torch.library.Library("resfused", "DEF")
for _schema, _kernel, _fake in zip(
    _SCHEMAS,
    (_forward_training, _forward_frozen, _backward, _local_statistics, _normalise, _local_sums, _input_gradients),
    (
        _fake_forward_training, _fake_forward, _fake_backward,
        _fake_local_statistics, _fake_normalise, _fake_local_sums, _fake_input_gradients,
    ),
    strict=True,
):  # fmt: skip
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"resfused::{_name}", cast(Callable[..., Any], _fake), lib=_library)

forward_training = torch.ops.resfused.forward_training.default
forward_frozen = torch.ops.resfused.forward_frozen.default
backward = torch.ops.resfused.backward.default
local_statistics = torch.ops.resfused.local_statistics.default
normalise = torch.ops.resfused.normalise.default
local_sums = torch.ops.resfused.local_sums.default
input_gradients = torch.ops.resfused.input_gradients.default
