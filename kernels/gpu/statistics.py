"""The first phase of the forward: every channel's mean and M2, and their merge over the programs."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..call import Norm
from . import launch_table
from .launching import Forward, tile_options
from .plans import Made
from .tile import (
    Tiling,
    aligned,
    by_channel,
    by_position,
    channels_of,
    first_place,
    first_walk,
    inside_block,
    locate_partials,
    merge_lanes,
    next_place,
    store,
    stride_of,
    welford,
    within_tile,
)


class Running(NamedTuple):
    """Pointers to one norm's running statistics, and the momentum of their update in two float32 parts."""

    mean: Any
    var: Any
    momentum: Any
    momentum_rest: Any


class Quads(NamedTuple):
    """Steps of four tiles, ``stride`` from one to the next: ``inner`` whole ones side by side in each ``outer``.

    ``ragged``: after them another one that not all of is inside.
    """

    outer: Any
    inner: Any
    ragged: Any
    outer_stride: Any
    inner_stride: Any
    stride: Any


class Merging(NamedTuple):
    """How partial results are merged: so many columns a channel, programs side by side, channels of a program."""

    PLANE: Any
    BLOCK_P: Any
    BLOCK_C: Any
    ACC: Any


@triton.jit
def quads_of(walk, BY_GROUPS: tl.constexpr, tiling: tl.constexpr):
    """A walk in steps of four tiles: neighbours along the positions, or with BY_GROUPS the same of four groups."""
    C = tl.cast(walk.C, tl.int64)
    group = C * walk.S
    row = C * tiling.BLOCK_S if tiling.CHANNELS_LAST else tl.cast(tiling.BLOCK_S, tl.int64)
    if BY_GROUPS:
        inner = tl.cast(walk.S // tiling.BLOCK_S, tl.int32)
        return Quads(walk.groups // 4, inner, inner < walk.blocks, 4 * group, row, group)
    else:
        inner = tl.cast(walk.S // (4 * tiling.BLOCK_S), tl.int32)
        ragged = tl.cast(walk.S % (4 * tiling.BLOCK_S), tl.int32) > 0
        return Quads(walk.groups, inner, ragged, group, 4 * row, row)


@triton.jit
def room_for_partials(programs, C, channel_blocks):
    """What one norm's means, M2 and counts take of the partial results."""
    return programs * (2 * C + channel_blocks)


@triton.jit
def take_statistics(x, partials, walk, BY_GROUPS: tl.constexpr, WHOLE: tl.constexpr, tiling: tl.constexpr):
    """A program's mean, M2 and count of each channel of its block, over every P-th four tiles.

    Whole quads of tiles first, without a mask over positions, their lanes in step: Chan's pairwise tree within a quad,
    then the quad's mean into the lane's. Ragged ones after them, value by value.
    """
    TILE: tl.constexpr = (tiling.BLOCK_S, tiling.BLOCK_C) if tiling.CHANNELS_LAST else (tiling.BLOCK_C, tiling.BLOCK_S)
    quads = quads_of(walk, BY_GROUPS, tiling)
    c0 = tl.cast(walk.channel_block, tl.int64) * tiling.BLOCK_C
    of_block = x + c0 * (1 if tiling.CHANNELS_LAST else walk.S)
    local = within_tile(walk.S, walk.C, tiling.CHANNELS_LAST, tiling.BLOCK_S, tiling.BLOCK_C, tiling.WIDE)
    c, c_inside = channels_of(walk.channel_block, walk.C, tiling.BLOCK_C)
    lanes = None if WHOLE else tl.broadcast_to(by_channel(c_inside, tiling.CHANNELS_LAST), TILE)
    mean = tl.zeros(TILE, tiling.ACC)
    m2 = tl.zeros(TILE, tiling.ACC)
    m2_pairs = tl.zeros(TILE, tiling.ACC)
    taken = tl.cast(0, tiling.ACC)

    steps = quads.outer * quads.inner
    stride = stride_of(walk.programs, tl.maximum(quads.inner, 1), tiling.CHANNELS_LAST)
    outer, inner = first_place(walk.program, stride.in_group, tiling.CHANNELS_LAST)
    for _ in tl.range(walk.program, steps, walk.programs, num_stages=tiling.STAGES):
        at = of_block + outer * quads.outer_stride + inner * quads.inner_stride
        # Channels that do not exist may hold anything.
        v0 = tl.load(at + local, mask=lanes).to(tiling.ACC)
        v1 = tl.load(at + quads.stride + local, mask=lanes).to(tiling.ACC)
        v2 = tl.load(at + 2 * quads.stride + local, mask=lanes).to(tiling.ACC)
        v3 = tl.load(at + 3 * quads.stride + local, mask=lanes).to(tiling.ACC)
        outer, inner = next_place(outer, inner, stride, tiling.CHANNELS_LAST)
        share = 1 / (taken + 1)
        first, second = v0 - v1, v2 - v3
        m2 += first * first
        m2 += second * second
        first, second = v0 + v1, v2 + v3
        between = first - second
        m2_pairs += between * between
        delta = (first + second) * 0.25 - mean
        mean += delta * share
        # Of a quad's mean 4·taken·share, twice, as of two values' difference. In this order never 0·Inf.
        m2 += delta * (delta * (8 * taken * share))
        taken += 1
    m2 = m2 * 0.5 + m2_pairs * 0.25
    count = tl.zeros((tiling.BLOCK_S,), tiling.ACC) + 4 * taken

    # The programs that had a quad less begin.
    following = (walk.program + walk.programs - steps % walk.programs) % walk.programs
    for outer in range(following, tl.where(quads.ragged, quads.outer, 0), walk.programs):
        at = of_block + outer * quads.outer_stride + quads.inner * quads.inner_stride
        block = quads.inner if BY_GROUPS else quads.inner * 4
        # A channels_last tensor has one such quad, a contiguous one may have no others.
        for tile in tl.range(4, loop_unroll_factor=1 if tiling.CHANNELS_LAST else 4):
            s_inside = inside_block(block if BY_GROUPS else block + tile, walk.S, tiling.BLOCK_S)
            inside = by_position(s_inside, tiling.CHANNELS_LAST) & by_channel(c_inside, tiling.CHANNELS_LAST)
            value = tl.load(at + tile * quads.stride + local, mask=inside, other=0).to(tiling.ACC)
            count, mean, m2 = welford(value, s_inside, count, mean, m2, tiling.CHANNELS_LAST)

    total, centre, spread = merge_lanes(count, mean, m2, tiling.CHANNELS_LAST)
    row = walk.programs * walk.C
    tl.store(partials + walk.program * walk.C + c, centre, mask=c_inside)
    tl.store(partials + row + walk.program * walk.C + c, spread, mask=c_inside)
    tl.store(partials + 2 * row + walk.channel_block * walk.programs + walk.program, total)


@triton.jit
def _update(running, new, momentum, momentum_rest, c, c_inside):
    """running <- (1 - momentum)·running + momentum·new, in place, in the precision of ``new``."""
    old = tl.load(running + c, mask=c_inside, other=0).to(new.dtype)
    factor = tl.cast(momentum, new.dtype) + tl.cast(momentum_rest, new.dtype)
    store(running + c, (1 - factor) * old + factor * new, c_inside)


@triton.jit
def merge_statistics(
    partials, counts, stats, running, M, C, programs, channel_block, EPS: tl.constexpr, merging: tl.constexpr
):  # fmt: skip
    """One norm's partials (mean, M2) merged into ``stats``, and its running statistics updated.

    ``stats`` is (mean, rstd), or where EPS is None (mean, M2), for a merge with what other processes found.
    """
    c, c_inside = channels_of(channel_block, C, merging.BLOCK_C)
    count = tl.zeros((merging.BLOCK_P,), merging.ACC)
    mean = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    m2 = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    for first in range(0, programs * merging.PLANE, merging.BLOCK_P):
        at, inside, p, p_inside = locate_partials(first, c, c_inside, C, programs, merging.PLANE, merging.BLOCK_P)
        added = tl.load(counts + p, mask=p_inside, other=0)
        count += added
        # Chan's update of (count, mean, M2), lane by lane; a lane without values adds nothing.
        share = (added / tl.where(count > 0, count, 1))[:, None]
        delta = tl.where(inside, tl.load(partials + at, mask=inside, other=0) - mean, 0)
        m2 += tl.load(partials + programs * C * merging.PLANE + at, mask=inside, other=0)
        # In this order an overflow is Inf, and never 0·Inf.
        m2 += delta * (delta * share * (count - added)[:, None])
        mean += delta * share
    _, mean, m2 = merge_lanes(count, mean, m2, True)
    tl.store(stats + c, mean, mask=c_inside)
    if EPS is None:
        tl.store(stats + C + c, m2, mask=c_inside)
    else:
        tl.store(stats + C + c, 1 / tl.sqrt(m2 / M + EPS), mask=c_inside)
    if running.mean is not None:
        _update(running.mean, mean, running.momentum, running.momentum_rest, c, c_inside)
    if running.var is not None:
        _update(running.var, m2 / (M - 1), running.momentum, running.momentum_rest, c, c_inside)


@triton.jit
def _statistics_kernel(
    x, residual, partials,
    G, S, C,
    BY_GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``take_statistics`` as a launch of its own, of ``residual`` too in a half of the grid of its own."""
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    number = tl.program_id(0)
    if residual is None:
        walk = first_walk(number, tl.num_programs(0), G, S, C, CHANNEL_MAJOR, tiling)
        take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
    else:
        half = tl.num_programs(0) // 2
        walk = first_walk(number % half, half, G, S, C, CHANNEL_MAJOR, tiling)
        of_residual = partials + room_for_partials(walk.programs, C, tl.cdiv(C, BLOCK_C))
        if x.dtype == residual.dtype:
            # The same code for both takes fewer registers.
            if number >= half:
                x = residual
                partials = of_residual
            take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
        elif number < half:
            take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
        else:
            take_statistics(residual, of_residual, walk, BY_GROUPS, WHOLE, tiling)


@triton.jit
def _merge_statistics_kernel(
    partials, stats,
    running_mean, running_var, residual_running_mean, residual_running_var,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest,
    M, C, programs, tile_blocks,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr,
    PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``merge_statistics`` for one norm, or for two in the halves of the grid."""
    merging: tl.constexpr = Merging(PLANE, BLOCK_P, BLOCK_C, ACC)
    # The programs of every channel block have the same counts: those of the first serve all.
    counts = partials + 2 * programs * C * PLANE
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel_block = tl.program_id(0)
    if channel_block < channel_blocks:
        running = Running(running_mean, running_var, momentum, momentum_rest)
        merge_statistics(partials, counts, stats, running, M, C, programs, channel_block, EPS, merging)
    elif NORMS == 2:
        room = room_for_partials(programs, C * PLANE, tile_blocks)
        running = Running(residual_running_mean, residual_running_var, residual_momentum, residual_momentum_rest)
        merge_statistics(
            partials + room, counts + room, stats + 2 * C, running, M, C, programs,
            channel_block - channel_blocks, RESIDUAL_EPS, merging,
        )  # fmt: skip


def launch_statistics(call: Forward, stats: Tensor) -> None:
    """Fills ``stats`` and updates the running statistics, in two launches."""
    norm, second, g, acc = call.norm, call.second, call.g, call.acc
    launch, options = tile_options("statistics", g, acc, call.x.device, call.norms)
    partials = partial_statistics(call, launch)

    def made() -> Made:
        return Made(launch.grid, (g.groups, g.positions, g.columns), options)

    def merge_made() -> Made:
        merge = launch_table.merge(launch.programs * g.plane, g.channels)
        constants = {
            "EPS": norm.eps, "RESIDUAL_EPS": second.eps, "NORMS": call.norms, "PLANE": g.plane,
            "BLOCK_P": merge.block_programs, "BLOCK_C": merge.block_channels, "ACC": options["ACC"],
            "num_warps": merge.warps,
        }  # fmt: skip
        integers = g.values, g.channels, launch.programs, launch.channel_blocks
        return Made((merge.channel_blocks * call.norms,), integers, constants)

    residual = None if call.residual_norm is None else call.residual
    call.plan.launch(_statistics_kernel, made, call.x, residual, partials)
    call.plan.launch(
        _merge_statistics_kernel, merge_made, partials, stats, norm.running_mean, norm.running_var,
        second.running_mean, second.running_var, *momentum_parts(norm), *momentum_parts(second),
    )  # fmt: skip


def partial_statistics(call: Forward, launch: launch_table.Launch | launch_table.OneLaunch) -> Tensor:
    """Room for each norm's programs: the mean and M2 of their channels, and their counts."""
    return call.x.new_empty(call.norms * launch.programs * (2 * call.g.columns + launch.channel_blocks), dtype=call.acc)


def momentum_parts(norm: Norm) -> tuple[float, float]:
    """The momentum as two float32 numbers: Triton passes a float as one, too coarse for float64 statistics."""
    high = ctypes.c_float(norm.momentum).value
    return high, norm.momentum - high
