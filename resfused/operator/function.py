"""The autograd function behind every fused operation."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import require_kernels
from ..kernels.activation import IDENTITY, Activation
from ..kernels.call import Gradients, Kept, Norm, to_keep
from ..kernels.geometry import with_strides
from ..reference import activate, takes_first_slope
from . import direct, traced
from .last_phase import LastPhase
from .packed import NO_RUNNING, Numbers, norms_of, wanted_of


class FusedResidualBlock(torch.autograd.Function):
    """The tail of a residual block, activation(batch_norm(input) + s), in one forward and one backward node.

    ``apply(input, residual, weight, bias, residual_weight, residual_bias, running, numbers, training, activation,
    forked)``; ``running`` is (running_mean, running_var, residual_running_mean, residual_running_var), ``numbers`` is
    (momentum, eps, norm_residual, residual_momentum, residual_eps), ``activation`` is (name, negative_slope).

    s is nothing where ``residual`` is None, the batch norm of ``residual`` with ``norm_residual``, else ``residual``.
    Shapes: ``input`` and ``residual`` (N, C, *spatial), not empty; the others (C,) or None. Statistics, normalisation
    and gradients are those of Ioffe and Szegedy, "Batch Normalization", ICML 2015, sections 3 and 3.1.

    With ``forked`` the output comes twice, for two uses: the same memory under two names, whose gradients the backward
    adds as it reads them, where autograd would sum those of one name in a kernel of its own. Neither may be changed in
    place, nor shown to anyone who would ask for the gradient of just one.

    Saved for the backward: vectors over channels, and of full size the least that the gradients which are wanted are
    made of (see ``to_keep``): in training ``input`` (and ``residual`` with ``norm_residual``), with another residual a
    bit mask, or where the activation is smooth the residual. A second derivative is taken by PyTorch's own operators.

    It runs the kernels and checks nothing else: ``resfused.functional`` checks its arguments and falls back to PyTorch.
    Raises: RuntimeError where the kernels cannot run on ``input``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        *parameters, running, values, training, follows, forked = rest
        numbers, activation = Numbers(*values), Activation(*follows)
        run = direct if direct.is_plain(input, residual, *parameters, *running) else traced
        norms = norms_of(parameters, running, numbers)
        wanted = wanted_of(ctx.needs_input_grad)
        keep = to_keep(residual is not None, numbers.norm_residual, training, activation, wanted)
        y, mask, stats = run.forward(input, residual, *norms, activation, training, keep.mask)
        ctx.numbers, ctx.activation = numbers, activation
        ctx.dtypes = input.dtype, None if residual is None else residual.dtype
        ctx.strides = None if keep.x else y.stride()
        # Running statistics change before the backward: it wants those that it depends on alone.
        ctx.save_for_backward(
            input if keep.x else None, residual if keep.residual else None, mask, stats,
            *parameters, *(NO_RUNNING if training else running),
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            ctx.last_phase = LastPhase(stats, *norms, activation)
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if forked else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_fork: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy_fork = dy_fork, None
        if dy is None:
            return (None,) * 11
        wanted = wanted_of(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        input, residual, mask, stats, *vectors = saved
        norms = norms_of(vectors[:4], vectors[4:], ctx.numbers)
        x_dtype, residual_dtype = ctx.dtypes
        kept = Kept(input, x_dtype, residual, residual_dtype, mask, stats, *norms, ctx.activation)
        if ctx.strides is not None:
            dy = with_strides(dy, ctx.strides)
            dy_fork = None if dy_fork is None else with_strides(dy_fork, ctx.strides)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(dy if dy_fork is None else dy + dy_fork, kept, wanted)
            return *gradients, None, None, None, None, None
        passed_on = wanted.residual and passes_on(kept.activation, ctx.numbers.norm_residual, dy_fork)
        needed = wanted._replace(residual=False) if passed_on else wanted
        found = Gradients(*(None,) * 6)
        if any(needed):
            run = direct if direct.is_plain(dy, dy_fork, *saved) else traced
            found = run.backward(dy, dy_fork, kept, needed)
        if passed_on:
            found = found._replace(residual=dy.to(residual_dtype))
        return *found, None, None, None, None, None


def passes_on(activation: Activation, norm_residual: bool, dy_fork: Tensor | None) -> bool:
    """Whether a residual's gradient is the one that came in: of an addition that nothing follows."""
    return activation == IDENTITY and not norm_residual and dy_fork is None


def _differentiable_backward(dy: Tensor, kept: Kept, wanted: Gradients) -> list[Tensor | None]:
    """The wanted gradients in differentiable PyTorch operators, for ``create_graph=True``.

    The activation makes dz of dy; what is left is the gradient of a batch norm.
    """
    input, x_dtype, residual, residual_dtype, _, stats, norm, second, _ = kept
    training = stats is not None

    def of(x: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        # Where it was not kept no gradient depends on it.
        return torch.zeros_like(dy, dtype=dtype, requires_grad=True) if x is None else x

    def batch_norm(x: Tensor, norm: Norm) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps
        )

    x = of(input, x_dtype)
    second_x = None if second is None else of(residual, residual_dtype)
    outputs = [batch_norm(x, norm)]
    if second is not None:
        outputs.append(batch_norm(cast(Tensor, second_x), second))
    dz = _before_activation(dy, outputs, kept)
    # A residual without a norm is none of these: its gradient is dz.
    of_inputs = Gradients(x, second_x, norm.weight, norm.bias, *((None, None) if second is None else second[:2]))
    leaves = [t for t, want in zip(of_inputs, wanted, strict=True) if want and t is not None]
    dzs = [dz.to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, leaves, dzs, create_graph=True) if leaves else ())
    return [
        None if not want else dz.to(residual_dtype) if t is None else next(found)
        for t, want in zip(of_inputs, wanted, strict=True)
    ]


def _before_activation(dy: Tensor, outputs: list[Tensor], kept: Kept) -> Tensor:
    """dz, by the bits of the mask or from z, the sum of the norms' ``outputs`` and of a residual that has none."""
    activation, mask = kept.activation, kept.mask
    if activation == IDENTITY:
        return dy
    if mask is None:
        alone = kept.residual if kept.residual_norm is None else None
        z = sum(outputs[1:] if alone is None else [alone], outputs[0])
        if activation.slopes is None:
            return torch.autograd.grad(activate(z, activation), z, dy, create_graph=True)[0]
        first = takes_first_slope(z, activation)
    else:
        first = require_kernels(dy).unpack_mask(mask, dy if kept.x is None else kept.x)
    slope, other_slope = cast(tuple[float, float], activation.slopes)
    # A select: 0·inf would be NaN.
    return torch.where(first, dy * slope, dy * other_slope if other_slope else 0)
