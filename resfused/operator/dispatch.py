"""The one way from a checked call to its result: choice of the backend, autograd or not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..backend import backend_for
from ..kernels.activation import IDENTITY, Activation
from ..kernels.call import Norm
from . import direct, traced
from .function import FusedResidualBlock
from .packed import arguments


def normalise_add_activate(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    training: bool,
    forked: bool = False,
) -> tuple[Tensor, Tensor]:
    """activation(norm(input) + s), s being nothing, ``residual`` or ``residual_norm(residual)``, for two uses.

    With ``forked`` the two are tensors of their own where the kernels run (see ``FusedResidualBlock``), else one and
    the same. The arguments have passed ``check_call``.
    """
    if _is_transformed() or backend_for(input) == "torch":
        y = _plain(input, residual, norm, residual_norm, activation, training)
        return y, y
    weight, bias, residual_weight, residual_bias, running, numbers = arguments(norm, residual_norm)
    parameters = weight, bias, residual_weight, residual_bias
    differentiable = input, residual, *parameters
    if torch.is_grad_enabled() and _any_wants_gradient(*differentiable):
        needs_z = residual is not None and activation.slopes is None
        if needs_z and not training and not _any_wants_gradient(*parameters):
            # z alone is kept then, not both that it was made of.
            z = normalise_add_activate(input, residual, norm, residual_norm, IDENTITY, training)[0]
            y = reference.activate(z, activation)
            return y, y
        y = FusedResidualBlock.apply(*differentiable, running, numbers, training, activation, forked)
        return y if forked else (y, y)
    run = direct if direct.is_plain(*differentiable, *running) else traced
    y = run.forward(input, residual, norm, residual_norm, activation, training, False)[0]
    return y, y


def _any_wants_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _is_transformed() -> bool:
    """Whether torch.func transforms the call, or it is differentiated forwards: PyTorch's operators know how."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _plain(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    training: bool,
) -> Tensor:
    weight, bias, mean, var, momentum, eps = norm
    if residual is None or residual_norm is None:
        return reference.batch_norm_act(input, mean, var, weight, bias, training, momentum, eps, activation, residual)
    residual_weight, residual_bias, residual_mean, residual_var, residual_momentum, residual_eps = residual_norm
    return reference.batch_norm_add_batch_norm_act(
        input, residual, mean, var, residual_mean, residual_var, weight, bias, residual_weight, residual_bias,
        training, momentum, eps, residual_momentum, residual_eps, activation,
    )  # fmt: skip
