"""The phases of a training node in plain PyTorch: each as the operator of the same name in ``ops``.

The dtype of the arithmetic is that of the kernels. An empty batch has statistics and sums of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.activation import IDENTITY
from ..reference import activate, takes_first_slope
from .packed import Affine


def local_statistics(x: Tensor, residual: Any, norm_residual: bool) -> Tensor:
    """Every channel's (mean, M2) in ``x``, with ``norm_residual`` followed by those in ``residual``: (2 or 4, C)."""
    wide = any(t is not None and t.dtype is torch.float64 for t in (x, residual))
    rows = []
    for t in (x, residual) if norm_residual else (x,):
        value = t.to(torch.float64 if wide else torch.float32)
        mean = _sum(value) / max(x.numel() // x.shape[1], 1)
        rows += [mean, _sum((value - _by_channel(mean, x)).square())]
    return torch.stack(rows)


def normalise(x: Tensor, residual: Any, stats: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(activation(norm(x) + s), where the derivative has its first value), with given (mean, rstd[, mean, rstd])."""
    *values, masked = rest
    affine = Affine(*values)
    z = _sum_of(x, residual, stats, affine)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    mask = takes_first_slope(z, affine.follows) if masked else z.new_empty(0, dtype=torch.bool)
    return activate(z, affine.follows).to(dtype), mask


def _sum_of(x: Tensor, residual: Any, stats: Tensor, affine: Affine) -> Tensor:
    """norm(x) + s"""
    z = _affine(_normalised(x, stats[:2]), affine.weight, affine.bias)
    if affine.norm_residual:
        return z + _affine(_normalised(residual, stats[2:]), affine.residual_weight, affine.residual_bias)
    return z if residual is None else z + residual


def local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Any,
    residual: Any,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """Every channel's sums of dz, dz·x̂ and, where the residual is normed, dz·ŝ; the wanted gradients that are local.

    A sum with a tensor that was not kept is zero.
    """
    *values, wanted = rest
    affine = Affine(*values)
    dz = _dz(dy, dy_fork, x, residual, mask, stats, affine)
    rows = [_sum(dz), _sum_with(dz, x, stats[:2])]
    if affine.norm_residual:
        rows.append(_sum_with(dz, residual, stats[2:]))
    local = [dz.to(residual_dtype)] if wanted[0] and not affine.norm_residual else []
    parameters: Any = (affine.weight, 1), (affine.bias, 0), (affine.residual_weight, 2), (affine.residual_bias, 0)
    return [
        torch.stack(rows),
        *local,
        *(
            rows[row].to(p.dtype, copy=True).view_as(p)
            for (p, row), want in zip(parameters, wanted[1:], strict=True)
            if want
        ),
    ]


def input_gradients(
    dy: Tensor,
    dy_fork: Tensor | None,
    dz: Tensor | None,
    x: Any,
    residual: Any,
    mask: Tensor,
    stats: Tensor,
    means: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """weight·rstd·(dz - mean of dz - x̂·mean of dz·x̂), and the same of a normed residual, where wanted."""
    *values, wanted = rest
    affine = Affine(*values)
    centred = _dz(dy, dy_fork, x, residual, mask, stats, affine) - _by_channel(means[0], dy)

    def gradient(t: Tensor, own: Tensor, weight: Tensor | None, mean: Tensor) -> Tensor:
        rest = centred - _normalised(t, own) * _by_channel(mean, t)
        return _affine(rest * _by_channel(own[1], t), weight, None).to(t.dtype)

    found = [gradient(x, stats[:2], affine.weight, means[1])] if wanted[0] else []
    return [*found, gradient(residual, stats[2:], affine.residual_weight, means[2])] if wanted[1] else found


def _by_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector over channels, broadcastable over an activation."""
    return vector.view(1, -1, *(1,) * (like.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    """Over everything but the channels."""
    return x.sum([d for d in range(x.dim()) if d != 1])


def _normalised(x: Tensor, stats: Tensor) -> Tensor:
    return (x.to(stats.dtype) - _by_channel(stats[0], x)) * _by_channel(stats[1], x)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * _by_channel(weight, x)
    return x if bias is None else x + _by_channel(bias, x)


def _sum_with(dz: Tensor, x: Any, stats: Tensor) -> Tensor:
    return torch.zeros_like(stats[0]) if x is None else _sum(dz * _normalised(x, stats))


def _dz(
    dy: Tensor, dy_fork: Tensor | None, x: Any, residual: Any, mask: Tensor, stats: Tensor, affine: Affine
) -> Tensor:
    """The gradient of what the activation was taken of: by the mask a select, as 0·inf would be NaN."""
    dy = dy.to(stats.dtype)
    dy = dy if dy_fork is None else dy + dy_fork
    if affine.follows == IDENTITY:
        return dy
    slopes = affine.follows.slopes
    if slopes is None:
        return _SMOOTH[affine.activation](dy, _sum_of(x, residual, stats, affine))
    # An empty batch has an empty mask.
    bits = (
        mask
        if mask.numel() or not dy.numel()
        else takes_first_slope(_sum_of(x, residual, stats, affine), affine.follows)
    )
    return torch.where(bits.view(dy.shape), dy * slopes[0], dy * slopes[1] if slopes[1] else 0)


_SMOOTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "hardswish": torch.ops.aten.hardswish_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "sigmoid": lambda dy, z: torch.ops.aten.sigmoid_backward(dy, torch.sigmoid(z)),
}
