"""The phases of a training node in plain PyTorch: each as the operator of the same name in ``ops``.

The dtype of the arithmetic is that of the kernels. An empty batch has statistics and sums of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local_statistics(x: Tensor, residual: Any, norm_residual: bool) -> Tensor:
    """Every channel's (mean, M2) in ``x``, with ``norm_residual`` followed by those in ``residual``: (2 or 4, C)."""
    wide = any(t is not None and t.dtype is torch.float64 for t in (x, residual))
    rows = []
    for t in (x, residual) if norm_residual else (x,):
        value = t.to(torch.float64 if wide else torch.float32)
        mean = _sum(value) / max(x.numel() // x.shape[1], 1)
        rows += [mean, _sum((value - _by_channel(mean, x)).square())]
    return torch.stack(rows)


def normalise(x: Tensor, residual: Any, stats: Tensor, *affine: Any) -> tuple[Tensor, Tensor]:
    """(relu(norm(x) + s), where it let something through), with given (mean, rstd[, mean, rstd])."""
    weight, bias, norm_residual, residual_weight, residual_bias = affine
    z = _affine(_normalised(x, stats[:2]), weight, bias)
    if norm_residual:
        z = z + _affine(_normalised(residual, stats[2:]), residual_weight, residual_bias)
    elif residual is not None:
        z = z + residual
    # NaN is not <= 0: it stays, as in torch.relu.
    on = ~(z <= 0)
    return torch.where(on, z, 0).to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)), on


def local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Any,
    residual_dtype: torch.dtype | None,
    mask: Tensor,
    stats: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """Every channel's sums of dz, dz·x̂ and, where the residual is normed, dz·ŝ; the wanted gradients that are local."""
    weight, bias, norm_residual, residual_weight, residual_bias, wanted = rest
    dz = _masked(dy, dy_fork, mask, stats)
    rows = [_sum(dz), _sum(dz * _normalised(x, stats[:2]))]
    if norm_residual:
        rows.append(_sum(dz * _normalised(residual, stats[2:])))
    local = [dz.to(residual_dtype)] if wanted[0] and not norm_residual else []
    parameters = (weight, 1), (bias, 0), (residual_weight, 2), (residual_bias, 0)
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
    x: Tensor,
    residual: Any,
    mask: Tensor,
    stats: Tensor,
    means: Tensor,
    *rest: Any,
) -> list[Tensor]:
    """weight·rstd·(dz - mean of dz - x̂·mean of dz·x̂), and the same of a normed residual, where wanted."""
    weight, _, _, residual_weight, _, wanted = rest
    centred = _masked(dy, dy_fork, mask, stats) - _by_channel(means[0], x)

    def gradient(t: Tensor, own: Tensor, weight: Tensor | None, mean: Tensor) -> Tensor:
        rest = centred - _normalised(t, own) * _by_channel(mean, t)
        return _affine(rest * _by_channel(own[1], t), weight, None).to(t.dtype)

    found = [gradient(x, stats[:2], weight, means[1])] if wanted[0] else []
    return [*found, gradient(residual, stats[2:], residual_weight, means[2])] if wanted[1] else found


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


def _masked(dy: Tensor, dy_fork: Tensor | None, mask: Tensor, stats: Tensor) -> Tensor:
    """dz: a select, as 0·inf would be NaN."""
    dy = dy.to(stats.dtype)
    return torch.where(mask, dy if dy_fork is None else dy + dy_fork, 0)
