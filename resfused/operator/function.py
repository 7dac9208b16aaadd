"""The autograd function behind every fused operation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import require_kernels
from ..kernels.call import Gradients, Kept, Norm
from . import direct, traced
from .packed import NO_RUNNING, Numbers, norms_of, wanted_of


class FusedResidualBlock(torch.autograd.Function):
    """The tail of a residual block, relu(batch_norm(input) + s), in one forward and one backward node.

    ``apply(input, residual, weight, bias, residual_weight, residual_bias, running, numbers, training, forked)``;
    ``running`` is (running_mean, running_var, residual_running_mean, residual_running_var), ``numbers`` is
    (momentum, eps, norm_residual, residual_momentum, residual_eps).

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
        *parameters, running, values, training, forked = rest
        numbers = Numbers(*values)
        run = direct if direct.is_plain(input, residual, *parameters, *running) else traced
        norms = norms_of(parameters, running, numbers)
        masked = residual is not None and not numbers.norm_residual
        y, mask, stats = run.forward(input, residual, *norms, training, masked)
        ctx.numbers = numbers
        ctx.residual_dtype = None if residual is None else residual.dtype
        kept = residual if numbers.norm_residual else None
        # Running statistics change before the backward: it wants those that it depends on alone.
        ctx.save_for_backward(input, kept, mask, stats, *parameters, *(NO_RUNNING if training else running))
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if forked else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_fork: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy_fork = dy_fork, None
        if dy is None:
            return (None,) * 10
        wanted = wanted_of(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        input, residual, mask, stats, *vectors = saved
        norms = norms_of(vectors[:4], vectors[4:], ctx.numbers)
        kept = Kept(input, None, residual, ctx.residual_dtype, mask, stats, *norms)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = _differentiable_backward(dy if dy_fork is None else dy + dy_fork, kept, wanted)
        else:
            run = direct if direct.is_plain(dy, dy_fork, *saved) else traced
            gradients = run.backward(dy, dy_fork, kept, wanted)
        return *gradients, None, None, None, None


def _differentiable_backward(dy: Tensor, kept: Kept, wanted: Gradients) -> list[Tensor | None]:
    """The wanted gradients in differentiable PyTorch operators, for ``create_graph=True``.

    The ReLU passes dy where the forward let z through; what is left is the gradient of a batch norm.
    """
    input, _, residual, residual_dtype, mask, stats, norm, second, _ = kept
    training = stats is not None

    def batch_norm(x: Tensor, norm: Norm) -> Tensor:
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps
        )

    z = batch_norm(input, norm)
    outputs = [z]
    if second is not None:
        outputs.append(batch_norm(residual, second))
        z = z + outputs[1]
    on = require_kernels(input).unpack_mask(mask, input) if mask is not None else ~(z.detach() <= 0)
    dz = torch.where(on, dy, 0)
    # A residual without a norm is none of these: its gradient is dz.
    of = Gradients(input, residual, norm.weight, norm.bias, *((None, None) if second is None else second[:2]))
    leaves = [t for t, want in zip(of, wanted, strict=True) if want and t is not None]
    dzs = [dz.to(o.dtype) for o in outputs]
    found = iter(torch.autograd.grad(outputs, leaves, dzs, create_graph=True) if leaves else ())
    return [
        None if not want else dz.to(residual_dtype) if t is None else next(found)
        for t, want in zip(of, wanted, strict=True)
    ]
