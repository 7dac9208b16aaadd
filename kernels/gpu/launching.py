"""What launches are given: tensors in one layout with all that belongs to them, compile-time arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..activation import IDENTITY, Activation
from ..call import Kept, Norm, accumulator, check_mask
from ..geometry import Geometry, dense, in_layout_of
from . import launch_table
from .plans import Plan, plan_for


class Forward(NamedTuple):
    """What every launch of one forward is given."""

    x: Tensor
    residual: Tensor | None
    norm: Norm
    residual_norm: Norm | None
    activation: Activation
    g: Geometry
    acc: torch.dtype
    plan: Plan

    @classmethod
    def of(
        cls,
        phase: str,
        x: Tensor,
        residual: Tensor | None,
        norm: Norm,
        residual_norm: Norm | None,
        activation: Activation = IDENTITY,
        *rest: Any,
    ) -> Forward:
        """``phase`` and ``rest`` tell what is launched for such arguments from all else that is."""
        *vectors, _, eps = norm if residual_norm is None else (*norm[:4], *residual_norm)
        found = plan_for(phase, (x, residual), vectors, norm.eps, eps, activation, *rest)
        if not found.ready:
            x = dense(x)
            residual = None if residual is None else in_layout_of(residual, x)
            return cls.of(phase, x, residual, norm, residual_norm, activation, *rest)
        return cls(x, residual, norm, residual_norm, activation, found.g, accumulator(x, residual), found)

    @property
    def second(self) -> Norm:
        """The residual's norm, or where there is none a stand-in that no kernel reads."""
        return self.norm if self.residual_norm is None else self.residual_norm

    @property
    def norms(self) -> int:
        return 1 if self.residual_norm is None else 2


class Backward(NamedTuple):
    """What every launch of one backward is given.

    ``like``: what all activations lie as, x or where it is not kept dy; ``dtypes``: of the gradients of x and of the
    residual; ``vectors``: see ``norm_vectors``; ``rows``: of sums a channel.
    """

    gradients: tuple[Tensor, Tensor | None]
    x: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    like: Tensor
    dtypes: tuple[torch.dtype | None, torch.dtype | None]
    activation: Activation
    vectors: tuple[Tensor | None, ...]
    eps: tuple[float | None, float | None]
    rows: int
    g: Geometry
    acc: torch.dtype
    plan: Plan

    @classmethod
    def of(cls, phase: str, dy: Tensor, dy_fork: Tensor | None, kept: Kept, *rest: Any) -> Backward:
        """``phase`` and ``rest`` tell what is launched for such arguments from all else that is."""
        x, x_dtype, residual, residual_dtype, mask, stats, norm, residual_norm, activation = kept
        like = dy if x is None else x
        dtypes = (
            x_dtype if x is None else x.dtype,
            residual_dtype if residual is None else residual.dtype,
        )
        *vectors, _, eps = norm if residual_norm is None else (*norm[:4], *residual_norm)
        found = plan_for(
            phase, (like, residual, dy, dy_fork), (mask, stats, *vectors), norm.eps, eps, x is None, dtypes, activation,
            *rest,
        )  # fmt: skip
        if not found.ready:
            like = dense(like)
            residual, dy_fork = (None if t is None else in_layout_of(t, like) for t in (residual, dy_fork))
            kept = kept._replace(x=None if x is None else like, residual=residual)
            return cls.of(phase, in_layout_of(dy, like), dy_fork, kept, *rest)
        check_mask(mask, found.g.mask_numel)
        return cls(
            (dy, dy_fork),
            x,
            residual,
            mask,
            like,
            dtypes,
            activation,
            norm_vectors(stats, norm, residual_norm),
            (norm.eps, norm.eps if residual_norm is None else residual_norm.eps),
            2 if residual_norm is None else 3,
            found.g,
            accumulator(like, residual, dy),
            found,
        )

    def rooms(self, of_x: bool, of_residual: bool) -> tuple[Tensor | None, Tensor | None]:
        """Room for the wanted gradients of x and of the residual."""
        dx = torch.empty_like(self.like, dtype=self.dtypes[0]) if of_x else None
        return dx, torch.empty_like(self.like, dtype=self.dtypes[1]) if of_residual else None


@launch_table.cached
def tile_options(
    kernel: str, g: Geometry, acc: torch.dtype, device: torch.device, norms: int, forked: bool = False
) -> tuple[launch_table.Launch, dict[str, Any]]:
    """The launch and the compile-time arguments of a streaming kernel; see ``launch_table.streaming``."""
    wide, multiprocessors = acc is torch.float64, launch_table.multiprocessors(device)
    launch = launch_table.streaming(kernel, g, wide, norms, multiprocessors, forked)
    constants = _tile_constants(g, acc, launch)
    constants["CHANNEL_MAJOR"] = launch.channel_major
    if kernel == "statistics":
        constants |= quad_options(launch, g)
    if kernel in ("statistics", "reduce"):
        constants |= _merge_constants(launch.merge)
    return launch, constants | _order_constants() if kernel in ("normalise", "apply") else constants


def quad_options(launch: launch_table.Launch | launch_table.OneLaunch, g: Geometry) -> dict[str, bool]:
    """What is known of the statistics' steps. WHOLE: no block of channels ends beyond the last."""
    return {"BY_GROUPS": launch_table.takes_groups(g), "WHOLE": g.columns % launch.block_channels == 0}


def activation_options(activation: Activation) -> dict[str, Any]:
    """What every kernel that knows of the activation takes of it."""
    return {"ACTIVATION": activation.name, "SLOPE": activation.negative_slope}


@launch_table.cached
def one_launch_options(launch: launch_table.OneLaunch, g: Geometry, acc: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments that both one-launch kernels take."""
    constants = _tile_constants(g, acc, launch)
    return constants | _order_constants() | {"BLOCK_P": launch.block_programs}


def _merge_constants(merge: launch_table.Merge) -> dict[str, Any]:
    return {"GROUP": launch_table.MERGED_PROGRAMS, "MERGED": merge.elements, "SHARE": merge.channels}


def _order_constants() -> dict[str, Any]:
    return {
        "REVERSED": launch_table.SECOND_PHASE_REVERSED,
        "EVICT": "evict_first" if launch_table.SECOND_PHASE_EVICTS_FIRST else "",
    }


def _tile_constants(
    g: Geometry, acc: torch.dtype, launch: launch_table.Launch | launch_table.OneLaunch
) -> dict[str, Any]:
    return {
        "PLANE": g.plane,
        "CHANNELS_LAST": g.channels_last,
        "ALIGN": math.gcd(g.inner, 16),
        "BLOCK_S": launch.block_positions,
        "BLOCK_C": launch.block_channels,
        "WIDE": launch_table.needs_wide_offsets(g, launch.block_positions, launch.block_channels),
        "ACC": tl.float64 if acc is torch.float64 else tl.float32,
        "STAGES": launch.stages,
        "num_warps": launch.warps,
    }


def norm_vectors(stats: Tensor | None, norm: Norm, residual_norm: Norm | None) -> tuple[Tensor | None, ...]:
    """(mean, rstd, weight, bias) of both norms: of the batch, or the running ones with the variance for rstd."""
    if stats is None:
        mean, rstd = norm.running_mean, norm.running_var
    else:
        mean, rstd, *residual_stats = stats.unbind()
    if residual_norm is None:
        return mean, rstd, norm.weight, norm.bias, None, None, norm.weight, norm.bias
    residual_mean, residual_rstd = (
        (residual_norm.running_mean, residual_norm.running_var) if stats is None else residual_stats
    )
    return (
        mean, rstd, norm.weight, norm.bias,
        residual_mean, residual_rstd, residual_norm.weight, residual_norm.bias,
    )  # fmt: skip
