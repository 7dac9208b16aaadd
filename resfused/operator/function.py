"""The autograd function behind every fused operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import require_kernels
from . import ops
from .arguments import Norm
from .packed import (
    Arguments,
    Differentiable,
    Norms,
    gradients_of_arguments,
    own_norm,
    second_norm,
    tensors,
    wanted_of,
    where_wanted,
    with_tensors,
    without_running_statistics,
)


class FusedResidualBlock(torch.autograd.Function):
    """The tail of a residual block, relu(batch_norm(input) + s), in one forward and one backward node.

    ``apply(input, residual, weight, bias, running_mean, running_var, momentum, eps, norm_residual, residual_weight,
    residual_bias, residual_running_mean, residual_running_var, residual_momentum, residual_eps, training, forked)``

    s is nothing where ``residual`` is None, the batch norm of ``residual`` with ``norm_residual``, else ``residual``.
    Shapes: ``input`` and ``residual`` (N, C, *spatial), not empty; the others (C,) or None. Statistics, normalisation
    and gradients are those of Ioffe and Szegedy, "Batch Normalization", ICML 2015, sections 3 and 3.1.

    With ``forked`` the output comes twice, for two uses: the same memory under two names, whose gradients the backward
    adds as it reads them, where autograd would sum those of one name in a kernel of its own. Neither may be changed in
    place, nor shown to anyone who would ask for the gradient of just one.

    Saved for the backward: ``input`` (and ``residual`` with ``norm_residual``), a bit mask where the residual is not
    saved, vectors over channels. A second derivative is taken by PyTorch's own batch norm.

    It runs the kernels and checks nothing else: ``resfused.functional`` checks its arguments and falls back to PyTorch.
    Raises: RuntimeError where the kernels cannot run on ``input``.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        require_kernels(input)
        *values, training, forked = rest
        norms = Norms(*values)
        ctx.numbers = with_tensors(norms, (None,) * 8)
        ctx.residual_dtype = None if residual is None else residual.dtype
        if training:
            y, mask, stats = ops.forward_training(input, residual, *norms, True)
            vectors = tensors(without_running_statistics(norms))
        else:
            y, mask = ops.forward_frozen(input, residual, *norms, True)
            stats = None
            vectors = tensors(norms)
        kept = residual if norms.norm_residual else None
        ctx.has_mask = residual is not None and not norms.norm_residual
        ctx.save_for_backward(input, kept, mask if ctx.has_mask else None, stats, *vectors)
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if forked else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_fork: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy_fork = dy_fork, None
        if dy is None:
            return tuple(Arguments())
        wanted = wanted_of(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(ctx, dy if dy_fork is None else dy + dy_fork, wanted)
        else:
            input, residual, mask, stats, *vectors = ctx.saved_tensors
            norms = with_tensors(ctx.numbers, vectors)
            gradients = ops.backward(dy, dy_fork, input, residual, ctx.residual_dtype, mask, stats, *norms, wanted)
        return gradients_of_arguments(Differentiable(*where_wanted(gradients, wanted)))


def _differentiable_backward(ctx: Any, dy: Tensor, wanted: Differentiable) -> list[Tensor]:
    """The wanted gradients in differentiable PyTorch operators, for ``create_graph=True``.

    The ReLU passes dy where the forward let z through; what is left is the gradient of a batch norm.
    """
    input, residual, mask, stats, *vectors = ctx.saved_tensors
    norms = with_tensors(ctx.numbers, vectors)
    training = stats is not None

    def batch_norm(x: Tensor, norm: Norm) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps
        )

    z = batch_norm(input, own_norm(norms))
    outputs = [z]
    second = second_norm(norms)
    if second is not None:
        outputs.append(batch_norm(residual, second))
        z = z + outputs[1]
    on = require_kernels(input).unpack_mask(mask, input) if mask is not None else ~(z.detach() <= 0)
    dz = torch.where(on, dy, 0)
    # A residual without a norm is none of these: its gradient is dz.
    of = Differentiable(input, residual, norms.weight, norms.bias, norms.residual_weight, norms.residual_bias)
    leaves = [t for t, want in zip(of, wanted, strict=True) if want and t is not None]
    dzs = [dz.to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, leaves, dzs, create_graph=True) if leaves else ())
    return [dz.to(ctx.residual_dtype) if t is None else next(found) for t, want in zip(of, wanted, strict=True) if want]
