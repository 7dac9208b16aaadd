"""``direct`` by way of the dispatcher's operators, for whatever traces or observes a call."""

from __future__ import annotations

from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.call import Gradients, Kept, Norm
from . import ops
from .packed import NO_NORM, flatten, where_wanted


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    training: bool,
    masked: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``direct.forward`` by way of the dispatcher."""
    values = *flatten(norm, residual_norm, activation), masked
    if training:
        y, mask, stats = ops.forward_training(x, residual, *values)
    else:
        y, mask = ops.forward_frozen(x, residual, *values)
        stats = None
    return y, mask if masked else None, stats


def normalise(
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    masked: bool,
) -> tuple[Tensor, Tensor | None]:
    """``direct.normalise`` by way of the dispatcher."""
    second = residual_norm or NO_NORM
    affine = *norm[:2], residual_norm is not None, *second[:2], *activation
    y, mask = ops.normalise(x, residual, stats, *affine, masked)
    return y, mask if masked else None


def backward(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> Gradients:
    """``direct.backward`` by way of the dispatcher."""
    *saved, norm, residual_norm, activation = kept
    found = ops.backward(dy, dy_fork, *saved, *flatten(norm, residual_norm, activation), wanted)
    return Gradients(*where_wanted(found, wanted))
