"""Fused batch norm, residual addition and activation, with the signatures of ``torch.nn.functional.batch_norm``.

Every function takes activations of shape (N, C, *spatial), rank 2 or more, float16, bfloat16, float32 or float64, and
vectors of C elements in the activation's dtype, or float32 for a half-precision one. Values are those of the composite
of the same name in ``resfused.reference``, computed in float32 (float64 for float64) and rounded once; gradients are
PyTorch's, at every kink: a ReLU passes one where not (z <= 0). With ``training`` the running statistics, where given,
are updated in place.

Errors, raised before anything is changed: TypeError for what is not a tensor, a number or a bool; IndexError for a rank
under 2; NotImplementedError for an integer or complex dtype; ValueError for one value per channel in training, eps <= 0
in training (< 0 otherwise), or only one of the running statistics; RuntimeError for any other shape, dtype or device,
and for missing running statistics without ``training``; of an activation those of ``batch_norm_act``.
"""

from __future__ import annotations

from torch import Tensor

from .kernels.activation import RELU, Activation, activation_of
from .kernels.call import Norm
from .operator.arguments import check_call, check_tensor
from .operator.dispatch import normalise_add_activate


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | Activation = "relu",
    residual: Tensor | None = None,
    negative_slope: float = 0.01,
    approximate: str = "none",
) -> Tensor:
    """activation(batch_norm(input) + residual), ``residual`` of the shape of ``input`` or nothing.

    ``activation`` is one of ``resfused.ACTIVATIONS``, by its name in ``torch.nn.functional``; ``negative_slope`` is
    ``leaky_relu``'s, ``approximate`` ("none" or "tanh") ``gelu``'s. Errors: TypeError for one of another type,
    ValueError for an unknown one; otherwise see the module.
    """
    follows = activation_of(activation, negative_slope, approximate)
    if residual is not None:
        check_tensor("residual", residual)
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    check_call(input, residual, norm, None, training)
    return normalise_add_activate(input, residual, norm, None, follows, training)[0]


def batch_norm_add_batch_norm_act(
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
    activation: str | Activation = "relu",
    negative_slope: float = 0.01,
    approximate: str = "none",
) -> Tensor:
    """activation(batch_norm(input) + batch_norm(residual)): the tail of a block with a projection shortcut.

    ``residual`` is the projection's output before its norm, of the shape of ``input``; the ``residual_`` arguments are
    that norm's. Running statistics that share memory are updated one after the other, ``input``'s first. Errors: see
    ``batch_norm_act``.
    """
    follows = activation_of(activation, negative_slope, approximate)
    check_tensor("residual", residual)
    norm = Norm(weight, bias, running_mean, running_var, momentum, eps)
    residual_norm = Norm(
        residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps
    )
    check_call(input, residual, norm, residual_norm, training)
    return normalise_add_activate(input, residual, norm, residual_norm, follows, training)[0]


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
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, RELU)


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
    return batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps, RELU, residual)


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
    """relu(batch_norm(input) + batch_norm(residual)): ``batch_norm_add_batch_norm_act`` with a ReLU."""
    return batch_norm_add_batch_norm_act(
        input, residual, running_mean, running_var, residual_running_mean, residual_running_var, weight, bias,
        residual_weight, residual_bias, training, momentum, eps, residual_momentum, residual_eps, RELU,
    )  # fmt: skip
