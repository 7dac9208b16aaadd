"""The kernels as operators of the dispatcher, so that torch.compile, fake tensors and export see through them.

They know nothing of autograd: ``FusedResidualBlock`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..backend import require_kernels
from ..kernels.call import Gradients, Kept, Norm, parameter_gradients, promoted
from . import direct
from .packed import Affine, unflatten

_NORM = (
    "Tensor? {0}weight, Tensor? {0}bias, Tensor{1}? {0}running_mean, Tensor{2}? {0}running_var, "
    "float {0}momentum, float {0}eps"
)
_ACTIVATION = "str activation, float negative_slope"
_FROZEN = f"{_NORM.format('', '', '')}, bool norm_residual, {_NORM.format('residual_', '', '')}, {_ACTIVATION}"
_TRAINED = (
    f"{_NORM.format('', '(a!)', '(b!)')}, bool norm_residual, {_NORM.format('residual_', '(c!)', '(d!)')}, "
    f"{_ACTIVATION}"
)
_AFFINE = (
    f"Tensor? weight, Tensor? bias, bool norm_residual, Tensor? residual_weight, Tensor? residual_bias, {_ACTIVATION}"
)
_SCHEMAS = (
    f"forward_training(Tensor x, Tensor? residual, {_TRAINED}, bool masked) -> (Tensor y, Tensor mask, Tensor stats)",
    f"forward_frozen(Tensor x, Tensor? residual, {_FROZEN}, bool masked) -> (Tensor y, Tensor mask)",
    "backward(Tensor dy, Tensor? dy_fork, Tensor? x, ScalarType? x_dtype, Tensor? residual, "
    f"ScalarType? residual_dtype, Tensor? mask, Tensor? stats, {_FROZEN}, bool[6] wanted) -> Tensor[]",
    # The phases of a training node on their own, for statistics over several processes.
    "local_statistics(Tensor x, Tensor? residual, bool norm_residual) -> Tensor",
    f"normalise(Tensor x, Tensor? residual, Tensor stats, {_AFFINE}, bool masked) -> (Tensor y, Tensor mask)",
    "local_sums(Tensor dy, Tensor? dy_fork, Tensor? x, Tensor? residual, ScalarType? residual_dtype, Tensor mask, "
    f"Tensor stats, {_AFFINE}, bool[5] wanted) -> Tensor[]",
    "input_gradients(Tensor dy, Tensor? dy_fork, Tensor? dz, Tensor? x, Tensor? residual, Tensor mask, Tensor stats, "
    f"Tensor means, {_AFFINE}, bool[2] wanted) -> Tensor[]",
)


def _or_empty(mask: Tensor | None, x: Tensor) -> Tensor:
    """An operator returns a tensor whether there is a mask or not."""
    return x.new_empty(0, dtype=torch.uint8) if mask is None else mask


def _forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *values, masked = rest
    y, mask, stats = direct.forward(x, residual, *unflatten(values), True, masked)
    return y, _or_empty(mask, x), cast(Tensor, stats)


def _forward_frozen(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, masked = rest
    y, mask, _ = direct.forward(x, residual, *unflatten(values), False, masked)
    return y, _or_empty(mask, x)


def _backward(dy: Tensor, dy_fork: Tensor | None, *rest: Any) -> list[Tensor]:
    *saved, wanted = rest
    kept = Kept(*saved[:6], *unflatten(saved[6:]))
    return [g for g in direct.backward(dy, dy_fork, kept, Gradients(*wanted)) if g is not None]


def _local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    with direct.on_device_of(x):
        return require_kernels(x).local_statistics(x, residual, norm_residual)


def _normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, masked = rest
    affine = Affine(*values)
    y, mask = direct.normalise(x, residual, stats, *affine.norms(), affine.follows, masked)
    return y, _or_empty(mask, x)


def _kept_with(
    affine: Affine, x: Tensor | None, residual: Tensor | None, dtype: Any, mask: Tensor, stats: Tensor
) -> Kept:
    mask_or_none = mask if mask.numel() else None
    norms = map(direct.prepared, affine.norms())
    return Kept(x, None, residual, dtype, mask_or_none, stats, *norms, affine.follows)


def _local_sums(dy: Tensor, dy_fork: Tensor | None, *rest: Any) -> list[Tensor]:
    *saved, wanted = rest
    kept = _kept_with(Affine(*saved[5:]), *saved[:5])
    with direct.on_device_of(dy):
        sums, gradients = require_kernels(dy).local_sums(dy, dy_fork, kept, Gradients(False, *wanted))
    return [sums, *(g for g in gradients if g is not None)]


def _input_gradients(
    dy: Tensor,
    dy_fork: Tensor | None,
    dz: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    mask: Tensor,
    stats: Tensor,
    means: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *affine, wanted = rest
    kept = _kept_with(Affine(*affine), x, residual, None, mask, stats)
    with direct.on_device_of(dy):
        gradients = require_kernels(dy).input_gradients(dy, dy_fork, dz, kept, means, wanted)
    return [g for g in gradients if g is not None]


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, residual, rest[-1])


def _fake_outputs(x: Tensor, residual: Tensor | None, masked: bool) -> tuple[Tensor, Tensor]:
    kernels = require_kernels(x)
    dense = kernels.dense(x)
    mask = x.new_empty(kernels.geometry(dense).mask_numel if masked else 0, dtype=torch.uint8)
    return torch.empty_like(dense, dtype=promoted(x, residual)), mask


def _fake_forward_training(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mask = _fake_forward(x, residual, *rest)
    rows = 2 if unflatten(rest[:-1])[1] is None else 4
    stats = x.new_empty((rows, x.shape[1]), dtype=require_kernels(x).accumulator(x, residual))
    return y, mask, stats


def _fake_backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor | None,
    x_dtype: torch.dtype | None,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    dense = require_kernels(dy).dense(dy if x is None else x)
    dx = [torch.empty_like(dense, dtype=x_dtype if x is None else x.dtype)] if wanted[0] else []
    dtype = residual_dtype if residual is None else residual.dtype
    dresidual = [torch.empty_like(dense, dtype=dtype)] if wanted[1] else []
    return [*dx, *dresidual, *_fake_parameter_gradients(*unflatten(values)[:2], wanted)]


def _fake_parameter_gradients(norm: Norm, residual_norm: Norm | None, wanted: Sequence[bool]) -> list[Tensor]:
    return [p for p in parameter_gradients(norm, residual_norm, Gradients(*wanted)) if p is not None]


def _fake_local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    accumulator = require_kernels(x).accumulator(x, residual)
    return x.new_empty((4 if norm_residual else 2, x.shape[1]), dtype=accumulator)


def _fake_normalise(x: Tensor, residual: Tensor | None, stats: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_outputs(x, residual, rest[-1])


def _fake_local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *values, wanted = rest
    affine = Affine(*values)
    kernels = require_kernels(dy)
    rows = 3 if affine.norm_residual else 2
    sums = dy.new_empty((rows, dy.shape[1]), dtype=kernels.accumulator(x, residual, dy))
    dense = kernels.dense(dy if x is None else x)
    dz = [torch.empty_like(dense, dtype=residual_dtype)] if wanted[0] and not affine.norm_residual else []
    return [sums, *dz, *_fake_parameter_gradients(*affine.norms(), (False, *wanted))]


def _fake_input_gradients(
    dy: Tensor, dy_fork: Tensor | None, dz: Tensor | None, x: Tensor | None, residual: Tensor | None, *rest: Any
) -> list[Tensor]:
    dense = require_kernels(dy).dense(dy if x is None else x)
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
