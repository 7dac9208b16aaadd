"""BatchNorm modules with the residual addition and the ReLU fused in; drop-ins for ``torch.nn.BatchNorm*d``."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional as fused


class _Call(NamedTuple):
    """What ``nn.BatchNorm.forward`` would pass to ``F.batch_norm``."""

    running_mean: Tensor | None
    running_var: Tensor | None
    batch_statistics: bool
    momentum: float


def _call(norm: _BatchNorm) -> _Call:
    mean, var = norm.running_mean, norm.running_var
    batch_statistics = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    momentum = norm.momentum
    if momentum is None:
        # The cumulative average. The count goes up only once the call has succeeded.
        counter = _counter(norm)
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    return _Call(mean, var, batch_statistics, momentum)


def _counter(norm: _BatchNorm) -> Tensor | None:
    """``num_batches_tracked`` where this call counts."""
    return norm.num_batches_tracked if norm.training and norm.track_running_stats else None


def _count(norm: _BatchNorm) -> None:
    counter = _counter(norm)
    if counter is not None:
        counter.add_(1)


def _is_transparent(norm: nn.Module) -> bool:
    """Whether nobody can tell a call of ``norm`` from the same arithmetic elsewhere: no hooks, no synchronisation."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    return not any(hooks) and not isinstance(norm, nn.SyncBatchNorm)


def _fuses_with(norm: _BatchNorm, residual_norm: _BatchNorm) -> bool:
    same_mode = _call(norm).batch_statistics == _call(residual_norm).batch_statistics
    return same_mode and norm is not residual_norm and _is_transparent(norm) and _is_transparent(residual_norm)


def tail(
    norm: _BatchNorm, input: Tensor, residual: Tensor | None = None, residual_norm: _BatchNorm | None = None
) -> Tensor:
    """relu(norm(input) + s) with the bookkeeping of the modules: modes, running statistics, num_batches_tracked.

    s is nothing, ``residual``, or ``residual_norm(residual)``. Shapes, dtypes and errors are those of
    ``resfused.functional``, with the modules' own rank check (ValueError). Modules with hooks, ``nn.SyncBatchNorm``,
    and two norms in different modes are called as they are, unfused.
    """
    if residual is not None and residual_norm is not None and not _fuses_with(norm, residual_norm):
        residual, residual_norm = residual_norm(residual), None
    if not _is_transparent(norm):
        y = norm(input)
        return F.relu(y if residual is None else y + residual)
    norm._check_input_dim(input)
    mean, var, training, momentum = _call(norm)
    own = (norm.weight, norm.bias, training, momentum, norm.eps)
    if residual is None:
        y = fused.batch_norm_relu(input, mean, var, *own)
    elif residual_norm is None:
        y = fused.batch_norm_add_relu(input, residual, mean, var, *own)
    else:
        residual_norm._check_input_dim(residual)
        residual_mean, residual_var, _, residual_momentum = _call(residual_norm)
        y = fused.batch_norm_add_batch_norm_relu(
            input, residual, mean, var, residual_mean, residual_var,
            norm.weight, norm.bias, residual_norm.weight, residual_norm.bias,
            training, momentum, norm.eps, residual_momentum, residual_norm.eps,
        )  # fmt: skip
        _count(residual_norm)
    _count(norm)
    return y


class _BatchNormReLU(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return tail(self, input)


class _BatchNormAddReLU(_BatchNorm):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return tail(self, input, residual)


class BatchNormReLU1d(_BatchNormReLU, nn.BatchNorm1d):
    """relu(BatchNorm1d(input)), (N, C) or (N, C, L); arguments, state_dict and errors of ``torch.nn.BatchNorm1d``."""


class BatchNormReLU2d(_BatchNormReLU, nn.BatchNorm2d):
    """relu(BatchNorm2d(input)), (N, C, H, W); arguments, state_dict and errors of ``torch.nn.BatchNorm2d``."""


class BatchNormReLU3d(_BatchNormReLU, nn.BatchNorm3d):
    """relu(BatchNorm3d(input)), (N, C, D, H, W); arguments, state_dict and errors of ``torch.nn.BatchNorm3d``."""


class BatchNormAddReLU1d(_BatchNormAddReLU, nn.BatchNorm1d):
    """relu(BatchNorm1d(input) + residual), both (N, C) or (N, C, L); otherwise as ``torch.nn.BatchNorm1d``."""


class BatchNormAddReLU2d(_BatchNormAddReLU, nn.BatchNorm2d):
    """relu(BatchNorm2d(input) + residual), both (N, C, H, W); otherwise as ``torch.nn.BatchNorm2d``."""


class BatchNormAddReLU3d(_BatchNormAddReLU, nn.BatchNorm3d):
    """relu(BatchNorm3d(input) + residual), both (N, C, D, H, W); otherwise as ``torch.nn.BatchNorm3d``."""
