"""The second phase of the forward: y = activation(norm(x) + s), and the bits of the activation's derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from .activation import activate, takes_first_slope
from .launching import Forward, activation_options, norm_vectors, tile_options
from .plans import Made
from .tile import (
    NormVectors,
    Order,
    Tiling,
    affine,
    aligned,
    channels_of,
    first_place,
    in_order,
    load_norm,
    locate,
    locate_bits,
    next_place,
    pack_bits,
    second_walk,
    store,
)


class Spread(NamedTuple):
    """What ``NormVectors.rstd`` points at: FROZEN, the variance, to which a norm's eps is added. For the compiler."""

    FROZEN: Any
    EPS: Any
    RESIDUAL_EPS: Any


@triton.jit
def normalise(
    x, residual, y, mask, norm, second, walk,
    activation: tl.constexpr, spread: tl.constexpr, order: tl.constexpr, tiling: tl.constexpr,
):  # fmt: skip
    """y = activation(norm(x) + s), s nothing, ``residual`` or its ``second`` norm, and the bits of the derivative."""
    c, c_inside = channels_of(walk.channel_block, walk.C, tiling.BLOCK_C)
    m, _, scale, shift = load_norm(norm, c, c_inside, spread.EPS, spread.FROZEN, tiling)
    if second.mean is not None:
        residual_m, _, residual_scale, residual_shift = load_norm(
            second, c, c_inside, spread.RESIDUAL_EPS, spread.FROZEN, tiling
        )

    next_group, next_block = first_place(walk.program, walk.blocks, tiling.CHANNELS_LAST)
    for _ in tl.range(walk.program, walk.tiles, walk.programs, num_stages=tiling.STAGES):
        group, block = in_order(next_group, next_block, walk, order.REVERSED, tiling.CHANNELS_LAST)
        next_group, next_block = next_place(next_group, next_block, walk.stride, tiling.CHANNELS_LAST)
        start, local, inside = locate(group, block, walk, tiling)
        value = tl.load(x + start + local, mask=inside, other=0, eviction_policy=order.EVICT)
        z = affine(value.to(tiling.ACC) - m, scale, shift)
        if residual is not None:
            s = tl.load(residual + start + local, mask=inside, other=0, eviction_policy=order.EVICT).to(tiling.ACC)
            if second.mean is not None:
                s = affine(s - residual_m, residual_scale, residual_shift)
            z += s
        activated = activate(z, activation)
        store(y + start + local, activated, inside)
        if mask is not None:
            start, local, inside = locate_bits(group, block, walk, tiling)
            tl.store(mask + start + local, pack_bits(takes_first_slope(z, activation)), mask=inside)


@triton.jit
def _normalise_kernel(
    x, residual, y, mask,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    G, S, C,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``normalise`` as a launch of its own."""
    norm = NormVectors(mean, rstd, weight, bias)
    second = NormVectors(residual_mean, residual_rstd, residual_weight, residual_bias)
    activation: tl.constexpr = Activation(ACTIVATION, SLOPE)
    spread: tl.constexpr = Spread(FROZEN, EPS, RESIDUAL_EPS)
    order: tl.constexpr = Order(REVERSED, EVICT)
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    walk = second_walk(G, S, C, CHANNEL_MAJOR, REVERSED, tiling)
    normalise(x, residual, y, mask, norm, second, walk, activation, spread, order, tiling)


def launch_normalise(call: Forward, stats: Tensor | None, y: Tensor, mask: Tensor | None) -> None:
    """Fills ``y`` and ``mask``, with the batch's statistics or, without them, the running ones."""
    g = call.g

    def made() -> Made:
        launch, options = tile_options("normalise", g, call.acc, call.x.device, call.norms)
        numbers = {"EPS": call.norm.eps, "RESIDUAL_EPS": call.second.eps, "FROZEN": stats is None}
        numbers |= activation_options(call.activation)
        return Made(launch.grid, (g.groups, g.positions, g.columns), numbers | options)

    vectors = norm_vectors(stats, call.norm, call.residual_norm)
    call.plan.launch(_normalise_kernel, made, call.x, call.residual, y, mask, *vectors)
