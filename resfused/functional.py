"""Fused batch norm, residual addition and ReLU, with the signatures of ``torch.nn.functional.batch_norm``.

Every function takes activations of shape (N, C, *spatial), rank 2 or more, float16, bfloat16, float32 or float64, and
vectors of C elements in the activation's dtype, or float32 for a half-precision one. Values are those of the composite
of the same name in ``resfused.reference``, computed in float32 (float64 for float64) and rounded once; a gradient is
passed where not (z <= 0). With ``training`` the running statistics, where given, are updated in place.

Errors, raised before anything is changed: TypeError for what is not a tensor, a number or a bool; IndexError for a rank
under 2; NotImplementedError for an integer or complex dtype; ValueError for one value per channel in training, eps <= 0
in training (< 0 otherwise), or only one of the running statistics; RuntimeError for any other shape, dtype or device,
and for missing running statistics without ``training``.
"""

from __future__ import annotations

from torch import Tensor

from .kernels.call import Norm
from .operator.arguments import check_call, check_tensor
from .operator.dispatch import normalise_add_relu


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
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    check_call(input, None, norm, None, training)
    return normalise_add_relu(input, None, norm, None, training)[0]


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
    check_tensor("residual", residual)
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    check_call(input, residual, norm, None, training)
    return normalise_add_relu(input, residual, norm, None, training)[0]


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
    that norm's. Running statistics that share memory are updated one after the other, ``input``'s first. Errors: see
    the module.
    """
    check_tensor("residual", residual)
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    residual_norm = Norm(
        residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
    )
    check_call(input, residual, norm, residual_norm, training)
    return normalise_add_relu(input, residual, norm, residual_norm, training)[0]
