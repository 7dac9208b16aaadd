"""The second phase of the backward: the inputs' gradients that waited for the merged sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from .launching import Backward, activation_options, tile_options
from .plans import Made
from .reduce import (
    Gradient,
    InputGradients,
    Saved,
    activation_gradient,
    load_bits,
    load_centred,
    load_gradient,
    shortcut,
)
from .tile import (
    NormVectors,
    Order,
    TileNorm,
    Tiling,
    affine,
    aligned,
    by_channel,
    channels_of,
    first_place,
    in_order,
    load_norm,
    locate,
    next_place,
    second_walk,
    store,
)


class Sums(NamedTuple):
    """A pointer to the channel sums of dz, dz·x̂ and dz·ŝ, and over how many values they were taken."""

    sums: Any
    M: Any


@triton.jit
def _mean_of(sums, row, C, c, c_inside, tiling: tl.constexpr):
    """Over a tile, the mean of what a row of ``sums`` adds up."""
    at = sums.sums + row * (C // tiling.PLANE) + c // tiling.PLANE
    return by_channel(tl.load(at, mask=c_inside, other=0) / sums.M, tiling.CHANNELS_LAST)


@triton.jit
def _line(sums, row, r, scale, C, c, c_inside, tiling: tl.constexpr):
    """(slope, offset) with weight·rstd·(dz - Σdz/M - x̂·Σ(dz·x̂)/M) = scale·dz + (slope·centred + offset)."""
    slope = -scale * r * _mean_of(sums, row, C, c, c_inside, tiling)
    return slope, -scale * _mean_of(sums, 0, C, c, c_inside, tiling)


@triton.jit
def apply(
    gradient, saved, sums, out, norm, second, walk,
    IS_DZ: tl.constexpr, activation: tl.constexpr, order: tl.constexpr, tiling: tl.constexpr,
):  # fmt: skip
    """The inputs' gradients that waited for the merged sums, from ``gradient``: dz where IS_DZ, else dy (in two)."""
    c, c_inside = channels_of(walk.channel_block, walk.C, tiling.BLOCK_C)
    own = load_norm(norm, c, c_inside, 0.0, False, tiling)
    other = TileNorm(None, None, None, None)
    slope, offset = _line(sums, 1, own.rstd, own.scale, walk.C, c, c_inside, tiling)
    if second.mean is not None:
        other = load_norm(second, c, c_inside, 0.0, False, tiling)
        residual_slope, residual_offset = _line(sums, 2, other.rstd, other.scale, walk.C, c, c_inside, tiling)

    next_group, next_block = first_place(walk.program, walk.blocks, tiling.CHANNELS_LAST)
    for _ in tl.range(walk.program, walk.tiles, walk.programs, num_stages=tiling.STAGES):
        group, block = in_order(next_group, next_block, walk, order.REVERSED, tiling.CHANNELS_LAST)
        next_group, next_block = next_place(next_group, next_block, walk.stride, tiling.CHANNELS_LAST)
        start, local, inside = locate(group, block, walk, tiling)
        bits = None if IS_DZ else load_bits(saved.mask, group, block, walk, activation, tiling)
        z = None
        if saved.x is not None:
            x = load_centred(saved.x, start, local, inside, own, order.EVICT, tiling.ACC)
            z = affine(x, own.scale, own.shift)
        if saved.residual is not None:
            residual = load_centred(saved.residual, start, local, inside, other, order.EVICT, tiling.ACC)
            if saved.x is not None:
                z += shortcut(residual, other)
        dz = load_gradient(gradient, start, local, inside, order.EVICT, tiling.ACC)
        if not IS_DZ:
            dz = activation_gradient(dz, z, bits, inside, activation)
        if out.dz is not None:
            store(out.dz + start + local, dz, inside)
        if out.dx is not None:
            store(out.dx + start + local, affine(dz, own.scale, affine(x, slope, offset)), inside)
        if out.dresidual is not None:
            line = affine(residual, residual_slope, residual_offset)
            store(out.dresidual + start + local, affine(dz, other.scale, line), inside)


@triton.jit
def _apply_kernel(
    gradient, gradient_fork, x, residual, mask, sums, dx, dresidual,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    M, G, S, C,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, IS_DZ: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``apply`` as a launch of its own."""
    gradients = Gradient(gradient, gradient_fork)
    saved = Saved(x, residual, mask)
    out = InputGradients(None, dx, dresidual)
    norm = NormVectors(mean, rstd, weight, bias)
    second = NormVectors(residual_mean, residual_rstd, residual_weight, residual_bias)
    activation: tl.constexpr = Activation(ACTIVATION, SLOPE)
    order: tl.constexpr = Order(REVERSED, EVICT)
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    walk = second_walk(G, S, C, CHANNEL_MAJOR, REVERSED, tiling)
    apply(gradients, saved, Sums(sums, M), out, norm, second, walk, IS_DZ, activation, order, tiling)


def launch_apply(
    call: Backward, dz: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, sums: Tensor, values: int
) -> None:
    """Fills the inputs' gradients, from ``sums`` over so many ``values`` of each channel."""
    g = call.g
    # dz is dy already masked (and added up), unless it was rounded to a narrower dtype.
    is_dz = dz is not None and dz.dtype is call.gradients[0].dtype
    # Without a norm the residual is kept for z alone.
    residual = None if is_dz and call.rows == 2 else call.residual

    def made() -> Made:
        forked = call.gradients[1] is not None
        launch, options = tile_options("apply", g, call.acc, call.like.device, call.rows - 1, forked)
        numbers = {"IS_DZ": is_dz} | activation_options(call.activation)
        return Made(launch.grid, (values, g.groups, g.positions, g.columns), numbers | options)

    call.plan.launch(
        _apply_kernel, made, *((dz, None) if is_dz else call.gradients), call.x, residual, call.mask, sums,
        dx, dresidual, *call.vectors,
    )  # fmt: skip
