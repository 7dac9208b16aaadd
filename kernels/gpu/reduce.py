"""The first phase of the backward: the channel sums of the gradient, their merge, and gradients that need no sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from .activation import gradient_at, gradient_by_bits
from .launching import Backward, activation_options, tile_options
from .merging import Merging, counters_for, is_final, locate_parts, round_of, rounds_of
from .normalise import Spread
from .plans import Made
from .tickets import is_last_to_arrive
from .tile import (
    NormVectors,
    TileNorm,
    Tiling,
    affine,
    aligned,
    by_channel,
    channels_of,
    first_place,
    first_walk,
    load_norm,
    load_rstd,
    locate,
    locate_bits,
    next_place,
    store,
    unpack_bits,
)


class Gradient(NamedTuple):
    """Pointers to the output's gradient, and where it was forked to that of its second copy."""

    dy: Any
    dy_fork: Any


class Saved(NamedTuple):
    """Pointers to what the forward has kept, None where it has not: x, the residual, the mask."""

    x: Any
    residual: Any
    mask: Any


class InputGradients(NamedTuple):
    """Pointers to room for the gradients of full size, None where one is not wanted or not yet known."""

    dz: Any
    dx: Any
    dresidual: Any


class ParameterGradients(NamedTuple):
    """Pointers to room for the parameters' gradients, None where one is not wanted."""

    weight: Any
    bias: Any
    residual_weight: Any
    residual_bias: Any


@triton.jit
def load_gradient(gradient, start, local, inside, EVICT: tl.constexpr, ACC: tl.constexpr):
    """dy, or where the output was forked the sum of the gradients of both its copies."""
    total = tl.load(gradient.dy + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
    if gradient.dy_fork is not None:
        total += tl.load(gradient.dy_fork + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
    return total


@triton.jit
def load_centred(pointer, start, local, inside, norm, EVICT: tl.constexpr, ACC: tl.constexpr):
    """A tile of what was kept, less its mean where it has a ``norm``."""
    value = tl.load(pointer + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
    return value if norm.mean is None else value - norm.mean


@triton.jit
def shortcut(residual, norm):
    """What is added to the norm of x, from the residual as ``load_centred`` gives it."""
    return residual if norm.mean is None else affine(residual, norm.scale, norm.shift)


@triton.jit
def load_bits(mask, group, block, walk, activation: tl.constexpr, tiling: tl.constexpr):
    """A tile's bytes of the mask, None where the derivative does not depend on them.

    Before a tile's other loads: what is so narrow comes in no stage ahead, and so is on its way while those are waited
    for.
    """
    if mask is None or activation.name == "identity":
        return None
    else:
        start, local, inside = locate_bits(group, block, walk, tiling)
        return tl.load(mask + start + local, mask=inside, other=0)


@triton.jit
def activation_gradient(dy, z, bits, inside, activation: tl.constexpr):
    """dy times the derivative of the activation, by its ``bits`` or, where the forward kept none, at the same z."""
    if activation.name == "identity":
        return dy
    elif bits is not None:
        return gradient_by_bits(dy, unpack_bits(bits), activation)
    else:
        return gradient_at(dy, z, inside, activation)


@triton.jit
def reduce(
    gradient, saved, out, partials, norm, second, walk,
    activation: tl.constexpr, spread: tl.constexpr, tiling: tl.constexpr,
):  # fmt: skip
    """A program's Σ dz, Σ dz·x̂ (and Σ dz·ŝ), and every gradient that needs no sum: dz, and all when FROZEN."""
    c, c_inside = channels_of(walk.channel_block, walk.C, tiling.BLOCK_C)
    own = load_norm(norm, c, c_inside, spread.EPS, spread.FROZEN, tiling)
    other = TileNorm(None, None, None, None)
    TILE: tl.constexpr = (tiling.BLOCK_S, tiling.BLOCK_C) if tiling.CHANNELS_LAST else (tiling.BLOCK_C, tiling.BLOCK_S)
    sum_dz = tl.zeros(TILE, tiling.ACC)
    sum_dz_x = tl.zeros(TILE, tiling.ACC)
    if second.mean is not None:
        other = load_norm(second, c, c_inside, spread.RESIDUAL_EPS, spread.FROZEN, tiling)
        sum_dz_residual = tl.zeros(TILE, tiling.ACC)

    next_group, next_block = first_place(walk.program, walk.blocks, tiling.CHANNELS_LAST)
    for _ in tl.range(walk.program, walk.tiles, walk.programs, num_stages=tiling.STAGES):
        group, block = next_group, next_block
        next_group, next_block = next_place(group, block, walk.stride, tiling.CHANNELS_LAST)
        start, local, inside = locate(group, block, walk, tiling)
        bits = load_bits(saved.mask, group, block, walk, activation, tiling)
        z = None
        if saved.x is not None:
            x = load_centred(saved.x, start, local, inside, own, "", tiling.ACC)
            z = affine(x, own.scale, own.shift)
        if saved.residual is not None:
            residual = load_centred(saved.residual, start, local, inside, other, "", tiling.ACC)
            if saved.x is not None:
                z += shortcut(residual, other)
        dz = load_gradient(gradient, start, local, inside, "", tiling.ACC)
        dz = activation_gradient(dz, z, bits, inside, activation)
        if out.dz is not None:
            store(out.dz + start + local, dz, inside)
        if out.dx is not None:
            store(out.dx + start + local, dz * own.scale, inside)
        if out.dresidual is not None:
            store(out.dresidual + start + local, dz * other.scale, inside)
        if partials is not None:
            sum_dz += dz
            if saved.x is not None:
                sum_dz_x += dz * x
            if second.mean is not None and saved.residual is not None:
                sum_dz_residual += dz * residual

    if partials is not None:
        AXIS: tl.constexpr = 0 if tiling.CHANNELS_LAST else 1
        row = walk.programs * walk.C
        to = partials + walk.program * walk.C + c
        tl.store(to, tl.sum(sum_dz, axis=AXIS), mask=c_inside)
        # Loaded anew, so that no register keeps it over the tiles. A sum with what is not kept stays 0.
        if saved.x is not None:
            r = load_rstd(norm, c, c_inside, spread.EPS, spread.FROZEN, tiling)
            sum_dz_x *= by_channel(r, tiling.CHANNELS_LAST)
        tl.store(to + row, tl.sum(sum_dz_x, axis=AXIS), mask=c_inside)
        if second.mean is not None:
            if saved.residual is not None:
                r = load_rstd(second, c, c_inside, spread.RESIDUAL_EPS, spread.FROZEN, tiling)
                sum_dz_residual *= by_channel(r, tiling.CHANNELS_LAST)
            tl.store(to + 2 * row, tl.sum(sum_dz_residual, axis=AXIS), mask=c_inside)


@triton.jit
def merge_sums(partials, parts, walk, c, c_inside, ROWS: tl.constexpr, merging: tl.constexpr):
    """Each row of sums of channels ``c``, of some of the partial results added up in a fixed order; two or three."""
    first = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    second = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    third = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    row = walk.programs * walk.C
    for begin in range(0, parts.count * merging.PLANE, merging.BLOCK_P):
        at, inside, _, _ = locate_parts(begin, parts, c, c_inside, walk.C, merging)
        first += tl.load(partials + at, mask=inside, other=0)
        second += tl.load(partials + row + at, mask=inside, other=0)
        if ROWS == 3:
            third += tl.load(partials + 2 * row + at, mask=inside, other=0)
    return tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0)


@triton.jit
def _store_sums(to, row, found, c, c_inside, ROWS: tl.constexpr):
    """Rows of sums of channels ``c``, so far apart."""
    for i in tl.static_range(ROWS):
        tl.store(to + i * row + c, found[i], mask=c_inside)


@triton.jit
def publish_sums(sums, out, found, C, c, c_inside, ROWS: tl.constexpr):
    """The merged sums, and the parameters' gradients, which they are."""
    _store_sums(sums, C, found, c, c_inside, ROWS)
    if out.bias is not None:
        store(out.bias + c, found[0], c_inside)
    if out.residual_bias is not None:
        store(out.residual_bias + c, found[0], c_inside)
    if out.weight is not None:
        store(out.weight + c, found[1], c_inside)
    if out.residual_weight is not None:
        store(out.residual_weight + c, found[2], c_inside)


@triton.jit
def _merge_in_rounds(
    partials, sums, parameters, counters, walk,
    BLOCK_C: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, merging: tl.constexpr,
):  # fmt: skip
    """What a program merges of the sums: of its group or of all, where it is the last to arrive."""
    begin, end = rounds_of(walk, BLOCK_C, GROUP, merging)
    goes_on = begin < end
    for number in range(begin, end):
        if goes_on:
            turn = round_of(counters, number, walk, BLOCK_C, GROUP, merging)
            goes_on = is_last_to_arrive(turn.counter, turn.arrivals)
            if goes_on:
                C = walk.C // merging.PLANE
                c, c_inside = channels_of(turn.share, C, merging.BLOCK_C)
                found = merge_sums(partials, turn.parts, walk, c, c_inside, ROWS, merging)
                if is_final(number, merging):
                    publish_sums(sums, parameters, found, C, c, c_inside, ROWS)
                else:
                    _store_sums(partials + turn.parts.first * C, walk.programs * C, found, c, c_inside, ROWS)
            goes_on |= merging.PLANE > 1


@triton.jit
def _reduce_kernel(
    dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials, sums, counters,
    dweight, dbias, dresidual_weight, dresidual_bias,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    G, S, C,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, MERGED: tl.constexpr, SHARE: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``reduce`` and the merge of its sums, where there are some."""
    gradient = Gradient(dy, dy_fork)
    saved = Saved(x, residual, mask)
    out = InputGradients(dz_out, dx, dresidual)
    norm = NormVectors(mean, rstd, weight, bias)
    second = NormVectors(residual_mean, residual_rstd, residual_weight, residual_bias)
    activation: tl.constexpr = Activation(ACTIVATION, SLOPE)
    spread: tl.constexpr = Spread(FROZEN, EPS, RESIDUAL_EPS)
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    walk = first_walk(tl.program_id(0), tl.num_programs(0), G, S, C, CHANNEL_MAJOR, tiling)
    reduce(gradient, saved, out, partials, norm, second, walk, activation, spread, tiling)

    if partials is not None:
        parameters = ParameterGradients(dweight, dbias, dresidual_weight, dresidual_bias)
        merging: tl.constexpr = Merging(PLANE, MERGED // SHARE, SHARE, ACC)
        _merge_in_rounds(partials, sums, parameters, counters, walk, BLOCK_C, GROUP, ROWS, merging)


def launch_sums(
    call: Backward,
    local: tuple[Tensor | None, Tensor | None, Tensor | None],
    parameters: list[Tensor | None],
    sums: Tensor | None,
    frozen: bool,
) -> None:
    """Fills ``local``, the gradients (dz, dx, residual's) that need no sum, and with ``sums`` those and ``parameters``,
    in one launch.
    """
    like, g = call.like, call.g
    launch, options = tile_options("reduce", g, call.acc, like.device, call.rows - 1)
    partials = counters = None
    if sums is not None:
        partials = like.new_empty((call.rows, launch.programs, g.columns), dtype=call.acc)
        counters = counters_for(launch.merge, like.device)

    def made() -> Made:
        numbers = {"EPS": call.eps[0], "RESIDUAL_EPS": call.eps[1], "FROZEN": frozen, "ROWS": call.rows}
        numbers |= activation_options(call.activation)
        return Made(launch.grid, (g.groups, g.positions, g.columns), numbers | options)

    call.plan.launch(
        _reduce_kernel, made, *call.gradients, call.x, call.residual, call.mask, *local, partials, sums, counters,
        *parameters, *call.vectors,
    )  # fmt: skip
