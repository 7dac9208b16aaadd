"""What the code that ``fuse_`` generates calls: the fused operations, or what the module computed before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..frozen import Frozen
from ..kernels.activation import Activation
from ..norms import forked_tail, normed_dtype
from ..reference import activate


def tail_pair(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    residual_norm: nn.Module | None,
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
    input = normed_dtype(norm, input)
    if residual_norm is not None:
        residual = normed_dtype(residual_norm, residual)
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


def frozen_batch_norm(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """What torchvision and those after it write for a norm whose statistics and parameters are fixed."""
    mean, var, weight, bias = (t.reshape(1, -1, 1, 1) for t in (running_mean, running_var, weight, bias))
    scale = weight * (var + eps).rsqrt()
    return input * scale + (bias - mean * scale)


def frozen_tail(
    own: tuple[Any, ...],
    residual: Tensor | None,
    other: tuple[Any, ...] | None,
    activation: Activation,
    kept: str | None,
) -> Tensor:
    """``functional_tail`` of frozen_batch_norm(*own), s being nothing, ``residual`` or frozen_batch_norm(*other)."""
    norm = _as_batch_norm(*own)
    second = None if other is None else _as_batch_norm(*other)
    if other is not None and (norm is None or second is None):
        residual, second = frozen_batch_norm(*other), None
    if norm is not None:
        return functional_tail(norm, residual, second, activation, kept)
    z = frozen_batch_norm(*own)
    if residual is None:
        return activate(z, activation)
    return activate(z + residual, activation).to(_dtype(z, residual, kept))


def _as_batch_norm(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Any, ...] | None:
    """The arguments of F.batch_norm that give it; None where it is something else."""
    frozen = Frozen(running_mean, running_var, weight, bias, eps, promotes=True)
    if not frozen.fits(input):
        return None
    input = input.to(frozen.dtype(input))
    norm = frozen.norm(input.dtype)
    return input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, norm.momentum, norm.eps


def _dtype(input: Tensor, residual: Tensor, kept: str | None) -> torch.dtype:
    if kept is None:
        return torch.promote_types(input.dtype, residual.dtype)
    return input.dtype if kept == "input" else residual.dtype
