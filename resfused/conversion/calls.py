"""What the code that ``fuse_`` generates calls: the fused operations, or what the module computed before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..kernels.activation import Activation
from ..norms import forked_tail
from ..reference import activate


def tail_pair(
    norm: _BatchNorm,
    input: Tensor,
    residual: Tensor | None,
    residual_norm: _BatchNorm | None,
    activation: Activation,
    kept: str | None,
    forked: bool,
) -> tuple[Tensor, Tensor]:
    """activation(norm(input) + s) twice, see ``forked_tail``; plain PyTorch where the addition broadcasts.

    ``kept``: ``"input"`` or ``"residual"`` where the sum has the dtype of that addend, which an addition in place
    changes; None where it has the promoted one.
    """
    if residual is None:
        return forked_tail(norm, input, activation=activation, forked=forked)
    dtype = _dtype(input, residual, kept)
    if residual.shape != input.shape:
        z = norm(input) + (residual if residual_norm is None else residual_norm(residual))
        y = activate(z, activation).to(dtype)
        return y, y
    y, twin = forked_tail(norm, input, residual, residual_norm, activation, forked)
    return (y, twin) if y.dtype is dtype else (y.to(dtype), twin.to(dtype))


def functional_tail(
    own: tuple[Any, ...],
    residual: Tensor | None,
    other: tuple[Any, ...] | None,
    activation: Activation,
    kept: str | None,
) -> Tensor:
    """activation(F.batch_norm(*own) + s), s being nothing, ``residual`` or F.batch_norm(*other); ``kept`` as above."""
    input, mean, var, weight, bias, training, momentum, eps = own
    if other is not None and (other[0].shape != input.shape or other[5] != training):
        residual, other = F.batch_norm(*other), None
    if other is not None:
        residual, *second, _, residual_momentum, residual_eps = other
        residual_mean, residual_var, residual_weight, residual_bias = second
        y = functional.batch_norm_add_batch_norm_act(
            input, residual, mean, var, residual_mean, residual_var, weight, bias, residual_weight, residual_bias,
            training, momentum, eps, residual_momentum, residual_eps, activation,
        )  # fmt: skip
    elif residual is None or residual.shape == input.shape:
        y = functional.batch_norm_act(input, mean, var, weight, bias, training, momentum, eps, activation, residual)
    else:
        y = activate(F.batch_norm(*own) + residual, activation)
    return y if residual is None else y.to(_dtype(input, residual, kept))


def _dtype(input: Tensor, residual: Tensor, kept: str | None) -> torch.dtype:
    if kept is None:
        return torch.promote_types(input.dtype, residual.dtype)
    return input.dtype if kept == "input" else residual.dtype
