"""Fused batch norm, residual addition and ReLU, with the signatures of ``torch.nn.functional.batch_norm``.

Every function takes activations of shape (N, C, *spatial), rank 2 or more, float16, bfloat16, float32 or float64, and
vectors of C elements in the activation's dtype, or float32 for a half-precision one. Values are those of the composite
of the same name in ``resfused.reference``, computed in float32 (float64 for float64) and rounded once; a gradient is
passed where not (z <= 0). With ``training`` the running statistics, where given, are updated in place.

Errors, raised before anything is changed: TypeError for what is not a tensor; IndexError for a rank under 2;
NotImplementedError for an integer or complex dtype; ValueError for one value per channel in training, eps <= 0 in
training (< 0 otherwise), or only one of the running statistics; RuntimeError for any other shape, dtype or device, and
for missing running statistics without ``training``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import backend_for, kernels
from .checks import check_activation, check_norm, check_residual
from .function import FusedResidualBlock

if kernels is not None:
    from . import ops


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input)): what follows the first convolutions of a block. Errors: see the module."""
    check_activation(input)
    check_norm(input, running_mean, running_var, weight, bias, training, eps)
    if backend_for(input) == "torch":
        return reference.batch_norm_relu(input, running_mean, running_var, weight, bias, training, momentum, eps)
    norm = (weight, bias, running_mean, running_var, momentum, eps)
    return _fused(input, None, norm, None, training)


def batch_norm_add_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input) + residual): the tail of a block with an identity shortcut.

    ``residual`` has the shape of ``input``; where their dtypes differ the result has the promoted one. Errors: see the
    module.
    """
    check_activation(input)
    check_residual(residual, input)
    check_norm(input, running_mean, running_var, weight, bias, training, eps)
    if backend_for(input) == "torch":
        return reference.batch_norm_add_relu(
            input, residual, running_mean, running_var, weight, bias, training, momentum, eps
        )
    norm = (weight, bias, running_mean, running_var, momentum, eps)
    return _fused(input, residual, norm, None, training)


def batch_norm_add_batch_norm_relu(
    input: Tensor,
    residual: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual_running_mean: Tensor | None,
    residual_running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual_momentum: float = 0.1,
    residual_eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(input) + batch_norm(residual)): the tail of a block with a projection shortcut.

    ``residual`` is the projection's output before its norm, of the shape of ``input``; the ``residual_`` arguments are
    that norm's. Errors: see the module.
    """
    check_activation(input)
    check_residual(residual, input)
    check_norm(input, running_mean, running_var, weight, bias, training, eps)
    check_norm(
        residual, residual_running_mean, residual_running_var, residual_weight, residual_bias,
        training, residual_eps, prefix="residual_",
    )  # fmt: skip
    # Two norms that share their buffers update them one after the other, which one launch for both would not.
    shared = training and running_mean is not None and running_mean is residual_running_mean
    if shared or backend_for(input) == "torch":
        return reference.batch_norm_add_batch_norm_relu(
            input, residual, running_mean, running_var, residual_running_mean, residual_running_var,
            weight, bias, residual_weight, residual_bias, training, momentum, eps, residual_momentum, residual_eps,
        )  # fmt: skip
    norm = (weight, bias, running_mean, running_var, momentum, eps)
    residual_norm = (
        residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
    )  # fmt: skip
    return _fused(input, residual, norm, residual_norm, training)


_Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float]
_NO_NORM: _Norm = (None, None, None, None, 0.0, 0.0)


def _fused(input: Tensor, residual: Tensor | None, norm: _Norm, residual_norm: _Norm | None, training: bool) -> Tensor:
    norms = (*norm, residual_norm is not None, *(_NO_NORM if residual_norm is None else residual_norm))
    differentiable = (input, residual, norm[0], norm[1], norms[7], norms[8])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return FusedResidualBlock.apply(input, residual, *norms, training)
    forward = ops.forward_training if training else ops.forward_frozen
    return forward(input, residual, *norms, False)[0]
