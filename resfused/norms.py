"""BatchNorm modules with the residual addition and the ReLU fused in; drop-ins for ``torch.nn.BatchNorm*d``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments import Norm, check_call
from .dispatch import normalise_add_relu


def _call(norm: _BatchNorm) -> tuple[bool, Norm]:
    """What ``nn.BatchNorm.forward`` passes to ``F.batch_norm``: whether to take the batch's statistics, the rest."""
    mean, var = norm.running_mean, norm.running_var
    batch_statistics = norm.training or (mean is None and var is None)
    if norm.training and not norm.track_running_stats:
        mean = var = None
    momentum = norm.momentum
    if momentum is None:
        # The cumulative average, of this batch too. It is counted once the arguments have been checked.
        counter = _counter(norm)
        momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
    return batch_statistics, Norm(norm.weight, norm.bias, mean, var, momentum, norm.eps)


def _counter(norm: _BatchNorm) -> Tensor | None:
    """``num_batches_tracked`` where this call counts."""
    return norm.num_batches_tracked if norm.training and norm.track_running_stats else None


def _count(norm: _BatchNorm | None) -> None:
    counter = None if norm is None else _counter(norm)
    if counter is not None:
        counter.add_(1)


def is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than running its forward: hooks, a call of its own, compilation."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or type(module).__call__ is not nn.Module.__call__
    )


def _is_transparent(norm: nn.Module) -> bool:
    """Whether nobody can tell a call of ``norm`` from the same arithmetic elsewhere: no hooks, no synchronisation."""
    return not is_watched(norm) and not isinstance(norm, nn.SyncBatchNorm)


def _fuses_with(norm: _BatchNorm, residual_norm: _BatchNorm) -> bool:
    same_mode = _call(norm)[0] == _call(residual_norm)[0]
    return same_mode and norm is not residual_norm and _is_transparent(norm) and _is_transparent(residual_norm)


def tail(
    norm: _BatchNorm, input: Tensor, residual: Tensor | None = None, residual_norm: _BatchNorm | None = None
) -> Tensor:
    """relu(norm(input) + s) with the bookkeeping of the modules: modes, running statistics, num_batches_tracked.

    s is nothing, ``residual``, or ``residual_norm(residual)``. Shapes, dtypes and errors are those of
    ``resfused.functional``, with the modules' own rank check (ValueError). Modules with hooks, ``nn.SyncBatchNorm``,
    and two norms in different modes are called as they are, unfused.
    """
    return forked_tail(norm, input, residual, residual_norm, forked=False)[0]


def forked_tail(
    norm: _BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    residual_norm: _BatchNorm | None = None,
    forked: bool = True,
) -> tuple[Tensor, Tensor]:
    """``tail`` for two uses of its output: see ``FusedResidualBlock`` for what ``forked`` asks of them."""
    if residual is not None and residual_norm is not None and not _fuses_with(norm, residual_norm):
        residual, residual_norm = residual_norm(residual), None
    if not _is_transparent(norm):
        y = norm(input)
        y = F.relu(y if residual is None else y + residual)
        return y, y
    norm._check_input_dim(input)
    training, own = _call(norm)
    residual_own = None
    if residual_norm is not None:
        residual_norm._check_input_dim(residual)
        _, residual_own = _call(residual_norm)
    check_call(input, residual, own, residual_own, training)
    for each in (norm, residual_norm):
        _count(each)
    return normalise_add_relu(input, residual, own, residual_own, training, forked)


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


FUSED_NORMS = (_BatchNormReLU, _BatchNormAddReLU)
