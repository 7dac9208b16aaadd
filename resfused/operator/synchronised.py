"""Batch statistics over the batches of several processes, as ``torch.nn.SyncBatchNorm`` takes them, in a fused node."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import backend_for
from ..kernels.activation import Activation
from ..kernels.call import Norm, to_keep
from ..kernels.geometry import with_strides
from . import ops, phases
from .function import passes_on
from .last_phase import LastPhase
from .packed import Affine, Numbers, arguments, norms_of, wanted_of, where_wanted

# The newer name of the same collective; the older one is deprecated where there are both.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def normalise_add_activate(
    input: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    activation: Activation,
    process_group: Any,
    forked: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dispatch.normalise_add_activate`` in training, with the statistics of all batches of the group's processes.

    Every process of the group makes the same calls in the same order; any of them may have an empty batch.
    """
    y = SynchronisedResidualBlock.apply(
        input, residual, *arguments(norm, residual_norm), activation, forked, process_group
    )
    return y if forked else (y, y)


class SynchronisedResidualBlock(torch.autograd.Function):
    """``FusedResidualBlock`` in training, with statistics over the batches of a process group.

    ``apply`` takes the arguments of that one up to ``numbers``, then ``activation``, ``forked`` and ``process_group``.

    One collective in the forward, which gathers every process's count, means and M2 of both norms, and one in the
    backward, which adds up their sums, where ``input`` or a normed ``residual`` needs a gradient. The gradients of the
    parameters are the process's own, as those of ``torch.nn.SyncBatchNorm``: DistributedDataParallel averages them.

    Counts stay on the device. A process without values is the only one to look at the total: where it too is zero,
    it raises a ValueError. Other totals are not checked: as in ``torch.nn.SyncBatchNorm``, with one value per channel
    in all, the unbiased variance that goes into ``running_var`` is NaN.

    Raises: ValueError as above; RuntimeError where a second derivative is asked for (``create_graph=True``).
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, *rest: Any) -> Tensor | tuple[Tensor, Tensor]:
        weight, bias, *residual_affine, running, values, follows, forked, process_group = rest
        numbers = Numbers(*values)
        affine = Affine(weight, bias, numbers.norm_residual, *residual_affine, *follows)
        keep = to_keep(
            residual is not None, numbers.norm_residual, True, affine.follows, wanted_of(ctx.needs_input_grad)
        )
        ctx.backend = backend_for(input)
        phase = _phases(ctx.backend)
        count = input.numel() // input.shape[1]
        local = phase.local_statistics(input, residual, numbers.norm_residual)
        total, means, m2s = _merge(*_gather(local, count, process_group))
        # Who computes nothing can wait for the device.
        if count == 0 and not torch.compiler.is_compiling() and total.item() == 0:
            raise ValueError("Expected more than 1 value per channel when training, got none in any process")
        every = [norm for norm in norms_of((weight, bias, *residual_affine), running, numbers) if norm is not None]
        stats = torch.stack(
            [row for i, n in enumerate(every) for row in (means[i], torch.rsqrt(m2s[i] / total + n.eps))]
        )
        for i, n in enumerate(every):
            _update(n.running_mean, means[i], n.momentum)
            _update(n.running_var, m2s[i] / (total - 1), n.momentum)
        y, mask = phase.normalise(input, residual, stats, *affine, keep.mask)
        ctx.process_group = process_group
        ctx.norm_residual, ctx.follows = numbers.norm_residual, follows
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.output = y.shape, y.stride(), y.dtype
        ctx.save_for_backward(
            input if keep.x else None, residual if keep.residual else None, mask, stats, total, weight, bias,
            *residual_affine,
        )  # fmt: skip
        if ctx.backend != "torch" and not torch.compiler.is_compiling():
            ctx.last_phase = LastPhase(stats, *affine.norms(), affine.follows)
        ctx.set_materialize_grads(False)
        return (y, y.detach()) if forked else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dy_fork: Tensor | None = None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("second derivatives of synchronised statistics are not supported")
        input, residual, mask, stats, total, weight, bias, *residual_affine = ctx.saved_tensors
        affine = Affine(weight, bias, ctx.norm_residual, *residual_affine, *ctx.follows)
        shape, strides, dtype = ctx.output
        if dy is None:
            dy, dy_fork = dy_fork, None
        if dy is None:
            # The other processes wait for this one's sums, be they zero.
            dy = stats.new_zeros((), dtype=dtype).expand(shape)
        if input is None:
            dy = with_strides(dy, strides)
            dy_fork = None if dy_fork is None else with_strides(dy_fork, strides)
        phase = _phases(ctx.backend)
        needs = wanted_of(ctx.needs_input_grad)
        # The parameters' gradients, and that of a residual without a norm, are the process's own.
        passed_on = needs.residual and passes_on(affine.follows, ctx.norm_residual, dy_fork)
        local = [needs.residual and not (ctx.norm_residual or passed_on), *needs[2:]]
        sums, *gradients = phase.local_sums(
            dy, dy_fork, input, residual, ctx.residual_dtype, mask, stats, *affine, local
        )
        dz, *parameters = where_wanted(gradients, local)
        waiting = [needs.x, needs.residual and ctx.norm_residual]
        dx = dresidual = None
        if any(waiting):
            dist.all_reduce(sums, group=ctx.process_group)
            gradients = phase.input_gradients(
                dy, dy_fork, dz, input, residual, mask, stats, sums / total, *affine, waiting
            )
            dx, dresidual = where_wanted(gradients, waiting)
        if passed_on:
            dz = dy.to(ctx.residual_dtype)
        return dx, dresidual if dz is None else dz, *parameters, None, None, None, None, None


def _phases(backend: str) -> Any:
    return phases if backend == "torch" else ops


def _gather(local: Tensor, count: int, process_group: Any) -> tuple[Tensor, Tensor]:
    """Every process's count, (P, 1, 1), and ``local`` (mean, M2[, mean, M2]), (P, 2 or 4, C), by rank."""
    own = torch.cat([local.flatten(), local.new_full((1,), count)])
    processes = dist.get_world_size(process_group)
    gathered = own.new_empty(processes * own.numel())
    _all_gather(gathered, own, group=process_group)
    gathered = gathered.view(processes, -1)
    return gathered[:, -1].view(-1, 1, 1), gathered[:, :-1].view(processes, *local.shape)


def _merge(counts: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The total count, and the means and M2 of one norm or two: Chan's update, of all processes at once.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 37, 1983. The mean
    is corrected by the mean of the deviations from it, which keeps it exact to rounding where mean >> std.
    """
    means, m2s = stats[:, 0::2], stats[:, 1::2]
    total = counts.sum()
    shares = counts / total
    mean = (means * shares).sum(0)
    mean = mean + ((means - mean) * shares).sum(0)
    return total, mean, (m2s + counts * (means - mean).square()).sum(0)


def _update(running: Tensor | None, new: Tensor, momentum: float) -> None:
    """running <- (1 - momentum)·running + momentum·new, in place."""
    if running is not None:
        running.lerp_(new.to(running.dtype), momentum)
