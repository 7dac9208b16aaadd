"""The kernels as operators of the dispatcher, so that torch.compile, fake tensors and export see through them.

They know nothing of autograd: ``FusedResidualBlock`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .backend import require_kernels

_NORM = (
    "Tensor? {0}weight, Tensor? {0}bias, Tensor{1}? {0}running_mean, Tensor{2}? {0}running_var, "
    "float {0}momentum, float {0}eps"
)
_FROZEN = f"{_NORM.format('', '', '')}, bool norm_residual, {_NORM.format('residual_', '', '')}"
_TRAINED = f"{_NORM.format('', '(a!)', '(b!)')}, bool norm_residual, {_NORM.format('residual_', '(c!)', '(d!)')}"
_SCHEMAS = (
    f"forward_training(Tensor x, Tensor? residual, {_TRAINED}, bool save_mask)"
    " -> (Tensor y, Tensor mask, Tensor stats)",
    f"forward_frozen(Tensor x, Tensor? residual, {_FROZEN}, bool save_mask) -> (Tensor y, Tensor mask)",
    "backward(Tensor dy, Tensor? dy_fork, Tensor x, Tensor? residual, ScalarType? residual_dtype, Tensor? mask, "
    f"Tensor? stats, {_FROZEN}, bool[6] wanted) -> Tensor[]",
)


def _norms(kernels: Any, values: Sequence[Any]) -> tuple[Any, Any]:
    """(Norm, Norm or None) from the arguments of ``_NORM``, ``norm_residual`` and ``_NORM`` again."""
    values = [v.contiguous() if isinstance(v, Tensor) else v for v in values]
    return kernels.Norm(*values[:6]), kernels.Norm(*values[7:13]) if values[6] else None


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


def _fake_forward(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *values, save_mask = rest
    kernels = require_kernels(x)
    dense = kernels.dense(x)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    masked = save_mask and residual is not None and not values[6]
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
    parameters = (*values[:2], *values[7:9])
    return [g for g, want in zip(gradients, wanted[:2], strict=True) if want] + [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        for p, want in zip(parameters, wanted[2:], strict=True)
        if want
    ]


_library = torch.library.Library("resfused", "DEF")
for _schema, _kernel, _fake in zip(
    _SCHEMAS,
    (_forward_training, _forward_frozen, _backward),
    (_fake_forward_training, _fake_forward, _fake_backward),
    strict=True,
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"resfused::{_name}", cast(Callable[..., Any], _fake), lib=_library)

forward_training = torch.ops.resfused.forward_training.default
forward_frozen = torch.ops.resfused.forward_frozen.default
backward = torch.ops.resfused.backward.default
