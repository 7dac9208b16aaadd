"""Both norms of a call and its activation as the flat lists that operators and autograd Functions take, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.call import Gradients, Norm

# (running_mean, running_var) of the one norm and of the other.
Running = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_RUNNING: Running = (None, None, None, None)
NO_NORM = Norm(None, None, None, None, 0.0, 0.0)


class Numbers(NamedTuple):
    """What is no tensor in both norms; zeros for a norm of the residual that is none."""

    momentum: float
    eps: float
    norm_residual: bool = False
    residual_momentum: float = 0.0
    residual_eps: float = 0.0


class Affine(NamedTuple):
    """What the phases of synchronised statistics take of both norms and of what follows them."""

    weight: Tensor | None
    bias: Tensor | None
    norm_residual: bool
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    activation: str
    negative_slope: float

    @property
    def follows(self) -> Activation:
        return Activation(self.activation, self.negative_slope)

    def norms(self) -> tuple[Norm, Norm | None]:
        second = Norm(self.residual_weight, self.residual_bias, None, None, 0.0, 0.0) if self.norm_residual else None
        return Norm(self.weight, self.bias, None, None, 0.0, 0.0), second


def arguments(norm: Norm, residual_norm: Norm | None) -> tuple[Any, ...]:
    """The parameters of both norms, their running statistics, their numbers: what the Functions take."""
    weight, bias, mean, var, momentum, eps = norm
    if residual_norm is None:
        return weight, bias, None, None, (mean, var, None, None), Numbers(momentum, eps)
    residual_weight, residual_bias, residual_mean, residual_var, residual_momentum, residual_eps = residual_norm
    return (
        weight, bias, residual_weight, residual_bias, (mean, var, residual_mean, residual_var),
        Numbers(momentum, eps, True, residual_momentum, residual_eps),
    )  # fmt: skip


def norms_of(parameters: Sequence[Tensor | None], running: Running, numbers: Numbers) -> tuple[Norm, Norm | None]:
    """The norms of such arguments."""
    weight, bias, residual_weight, residual_bias = parameters
    mean, var, residual_mean, residual_var = running
    norm = Norm(weight, bias, mean, var, numbers.momentum, numbers.eps)
    if not numbers.norm_residual:
        return norm, None
    return norm, Norm(
        residual_weight, residual_bias, residual_mean, residual_var, numbers.residual_momentum, numbers.residual_eps
    )  # fmt: skip


def flatten(norm: Norm, residual_norm: Norm | None, activation: Activation) -> tuple[Any, ...]:
    """All three as the operators take them."""
    return *norm, residual_norm is not None, *(residual_norm or NO_NORM), *activation


def unflatten(values: Sequence[Any]) -> tuple[Norm, Norm | None, Activation]:
    return Norm(*values[:6]), Norm(*values[7:13]) if values[6] else None, Activation(*values[13:])


def where_wanted(gradients: Sequence[Tensor], wanted: Sequence[Any]) -> list[Any]:
    """The gradients that an operator returned, with None between for those that were not wanted."""
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]


def wanted_of(needs: Sequence[bool]) -> Gradients:
    """From ``ctx.needs_input_grad`` of either Function."""
    return Gradients(*needs[:6])
