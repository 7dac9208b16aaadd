"""Both norms of a call in one flat tuple with names: operators and autograd Functions take nothing nested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .arguments import Norm


class Norms(NamedTuple):
    """A ``Norm``, whether the residual is normed, and the residual's ``Norm``, of Nones and zeros where it is not."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.0
    eps: float = 0.0
    norm_residual: bool = False
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None
    residual_running_mean: Tensor | None = None
    residual_running_var: Tensor | None = None
    residual_momentum: float = 0.0
    residual_eps: float = 0.0


class Affine(NamedTuple):
    """What the phases of synchronised statistics take of both norms."""

    weight: Tensor | None
    bias: Tensor | None
    norm_residual: bool
    residual_weight: Tensor | None
    residual_bias: Tensor | None


class Arguments(NamedTuple):
    """What ``FusedResidualBlock.apply`` takes, or as much for each: whether it needs a gradient, or its gradient."""

    input: Any = None
    residual: Any = None
    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    momentum: Any = None
    eps: Any = None
    norm_residual: Any = None
    residual_weight: Any = None
    residual_bias: Any = None
    residual_running_mean: Any = None
    residual_running_var: Any = None
    residual_momentum: Any = None
    residual_eps: Any = None
    training: Any = None
    forked: Any = None


class Differentiable(NamedTuple):
    """Of each argument that can have a gradient: whether it is wanted, or it. In the order of the operators."""

    input: Any
    residual: Any
    weight: Any
    bias: Any
    residual_weight: Any
    residual_bias: Any


def pack(norm: Norm, residual_norm: Norm | None) -> Norms:
    if residual_norm is None:
        return Norms(*norm)
    return Norms(*norm, True, *residual_norm)


def own_norm(norms: Norms) -> Norm:
    return Norm(norms.weight, norms.bias, norms.running_mean, norms.running_var, norms.momentum, norms.eps)


def second_norm(norms: Norms) -> Norm | None:
    if not norms.norm_residual:
        return None
    return Norm(
        norms.residual_weight,
        norms.residual_bias,
        norms.residual_running_mean,
        norms.residual_running_var,
        norms.residual_momentum,
        norms.residual_eps,
    )


def affine_of(norms: Norms) -> Affine:
    return Affine(norms.weight, norms.bias, norms.norm_residual, norms.residual_weight, norms.residual_bias)


def tensors(norms: Norms) -> tuple[Tensor | None, ...]:
    """Those of the one norm, then those of the other."""
    return (
        norms.weight, norms.bias, norms.running_mean, norms.running_var,
        norms.residual_weight, norms.residual_bias, norms.residual_running_mean, norms.residual_running_var,
    )  # fmt: skip


def with_tensors(norms: Norms, found: Sequence[Tensor | None]) -> Norms:
    """The numbers of ``norms`` and other tensors, in the order of ``tensors``."""
    weight, bias, mean, var, residual_weight, residual_bias, residual_mean, residual_var = found
    return norms._replace(
        weight=weight,
        bias=bias,
        running_mean=mean,
        running_var=var,
        residual_weight=residual_weight,
        residual_bias=residual_bias,
        residual_running_mean=residual_mean,
        residual_running_var=residual_var,
    )


def without_running_statistics(norms: Norms) -> Norms:
    return norms._replace(
        running_mean=None, running_var=None, residual_running_mean=None, residual_running_var=None
    )  # fmt: skip


def wanted_of(needs: Sequence[bool]) -> Differentiable:
    """From ``ctx.needs_input_grad``."""
    n = Arguments(*needs)
    return Differentiable(n.input, n.residual, n.weight, n.bias, n.residual_weight, n.residual_bias)


def where_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Any]:
    """The gradients that an operator returned, with None between for those that were not wanted."""
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]


def gradients_of_arguments(found: Differentiable) -> tuple[Any, ...]:
    """What a backward returns: a gradient, or None, for every argument."""
    return tuple(
        Arguments(
            input=found.input,
            residual=found.residual,
            weight=found.weight,
            bias=found.bias,
            residual_weight=found.residual_weight,
            residual_bias=found.residual_bias,
        )
    )
