"""The autograd function behind every fused operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import kernels, require_kernels

if kernels is not None:
    from . import ops


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
        *norms, training, forked = rest
        ctx.norm_residual = norms[6]
        ctx.numbers = (norms[4:6], norms[11:13])
        ctx.residual_dtype = None if residual is None else residual.dtype
        if training:
            y, mask, stats = ops.forward_training(input, residual, *norms, True)
            vectors = (*norms[:2], None, None, *norms[7:9], None, None)
        else:
            y, mask = ops.forward_frozen(input, residual, *norms, True)
            stats = None
            vectors = (*norms[:4], *norms[7:11])
        kept = residual if ctx.norm_residual else None
        ctx.has_mask = residual is not None and not ctx.norm_residual
        ctx.save_for_backward(input, kept, mask if ctx.has_mask else None, stats, *vectors)
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if forked else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_fork: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy_fork = dy_fork, None
        if dy is None:
            return (None,) * 17
        input, residual, mask, stats, *vectors = ctx.saved_tensors
        numbers, residual_numbers = ctx.numbers
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 9, 10)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(ctx, dy if dy_fork is None else dy + dy_fork, wanted)
        else:
            norms = (*vectors[:4], *numbers, ctx.norm_residual, *vectors[4:], *residual_numbers)
            gradients = ops.backward(dy, dy_fork, input, residual, ctx.residual_dtype, mask, stats, *norms, wanted)
        found = iter(gradients)
        dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias = [next(found) if w else None for w in wanted]
        return (
            dx, dresidual, dweight, dbias, None, None, None, None,
            None, dresidual_weight, dresidual_bias, None, None, None, None, None, None,
        )  # fmt: skip


def _differentiable_backward(ctx: Any, dy: Tensor, wanted: list[bool]) -> list[Tensor]:
    """The wanted gradients in differentiable PyTorch operators, for ``create_graph=True``.

    The ReLU passes dy where the forward let z through; what is left is the gradient of a batch norm.
    """
    input, residual, mask, stats, *vectors = ctx.saved_tensors
    training = stats is not None

    def batch_norm(x: Tensor, vectors: list[Tensor | None], eps: float) -> Tensor:
        weight, bias, running_mean, running_var = vectors
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)

    z = batch_norm(input, vectors[:4], ctx.numbers[0][1])
    outputs, inputs = [z], [input, None, *vectors[:2], None, None]
    if ctx.norm_residual:
        shortcut = batch_norm(residual, vectors[4:], ctx.numbers[1][1])
        outputs, inputs = [z, shortcut], [input, residual, *vectors[:2], *vectors[4:6]]
        z = z + shortcut
    on = require_kernels(input).unpack_mask(mask, input) if mask is not None else ~(z.detach() <= 0)
    dz = torch.where(on, dy, 0)
    leaves = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    dzs = [dz.to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, leaves, dzs, create_graph=True) if leaves else ())
    return [
        dz.to(ctx.residual_dtype) if t is None else next(found) for t, want in zip(inputs, wanted, strict=True) if want
    ]
