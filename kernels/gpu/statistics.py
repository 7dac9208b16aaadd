"""The first phase of the forward: every channel's mean and M2, merged over the programs."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..call import Norm
from . import launch_table
from .launching import Forward, tile_options
from .merging import Merging, counters_for, is_final, locate_parts, room_for_counters, round_of, rounds_of
from .plans import Made
from .tickets import is_last_to_arrive
from .tile import (
    Tiling,
    aligned,
    by_channel,
    by_position,
    channels_of,
    first_place,
    first_walk,
    inside_block,
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
def merge_statistics(partials, counts, parts, walk, c, c_inside, merging: tl.constexpr):
    """(count, mean, M2) of channels ``c`` from some of the partial results, in a fixed order."""
    count = tl.zeros((merging.BLOCK_P,), merging.ACC)
    mean = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    m2 = tl.zeros((merging.BLOCK_P, merging.BLOCK_C), merging.ACC)
    for begin in range(0, parts.count * merging.PLANE, merging.BLOCK_P):
        at, inside, p, p_inside = locate_parts(begin, parts, c, c_inside, walk.C, merging)
        added = tl.load(counts + p, mask=p_inside, other=0)
        count += added
        # Chan's update of (count, mean, M2), lane by lane; a lane without values adds nothing.
        share = (added / tl.where(count > 0, count, 1))[:, None]
        delta = tl.where(inside, tl.load(partials + at, mask=inside, other=0) - mean, 0)
        m2 += tl.load(partials + walk.programs * walk.C + at, mask=inside, other=0)
        # In this order an overflow is Inf, and never 0·Inf.
        m2 += delta * (delta * share * (count - added)[:, None])
        mean += delta * share
    return merge_lanes(count, mean, m2, True)


@triton.jit
def _keep_merged(partials, counts, parts, walk, total, mean, m2, c, c_inside):
    """The statistics of a group of programs, in the place of its first."""
    to = partials + parts.first * walk.C + c
    tl.store(to, mean, mask=c_inside)
    tl.store(to + walk.programs * walk.C, m2, mask=c_inside)
    tl.store(counts + parts.first, total)


@triton.jit
def publish_statistics(stats, running, mean, m2, M, C, c, c_inside, EPS: tl.constexpr):
    """One norm's merged statistics into ``stats``, and its running ones updated.

    ``stats`` is (mean, rstd), or where EPS is None (mean, M2), for a merge with what other processes found.
    """
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
    x, residual, partials, stats, counters,
    running_mean, running_var, residual_running_mean, residual_running_var,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest,
    G, S, C,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr, BY_GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, MERGED: tl.constexpr, SHARE: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``take_statistics`` and their merge, of two norms in halves of the grid of their own."""
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    merging: tl.constexpr = Merging(PLANE, MERGED // SHARE, SHARE, ACC)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    of_norm = tl.num_programs(0) // NORMS
    number = tl.program_id(0)
    walk = first_walk(number % of_norm, of_norm, G, S, C, CHANNEL_MAJOR, tiling)
    is_second = number >= of_norm
    if NORMS == 2:
        # The same code for both takes fewer registers.
        partials += is_second.to(tl.int32) * room_for_partials(walk.programs, C, tl.cdiv(C, BLOCK_C))
        counters += is_second.to(tl.int32) * room_for_counters(walk, BLOCK_C, GROUP, merging)
        if x.dtype == residual.dtype:
            if is_second:
                x = residual
            take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
        elif is_second:
            take_statistics(residual, partials, walk, BY_GROUPS, WHOLE, tiling)
        else:
            take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
    else:
        take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)

    first = Running(running_mean, running_var, momentum, momentum_rest)
    second = Running(residual_running_mean, residual_running_var, residual_momentum, residual_momentum_rest)
    M = tl.cast(G, tl.int64) * S * PLANE
    begin, end = rounds_of(walk, BLOCK_C, GROUP, merging)
    goes_on = begin < end
    for number in range(begin, end):
        if goes_on:
            turn = round_of(counters, number, walk, BLOCK_C, GROUP, merging)
            goes_on = is_last_to_arrive(turn.counter, turn.arrivals)
            if goes_on:
                channels = C // PLANE
                c, c_inside = channels_of(turn.share, channels, SHARE)
                # The programs of all blocks that have some of a share have the same counts.
                counts = partials + 2 * walk.programs * C + walk.channel_block * walk.programs
                total, mean, m2 = merge_statistics(partials, counts, turn.parts, walk, c, c_inside, merging)
                if not is_final(number, merging):
                    _keep_merged(partials, counts, turn.parts, walk, total, mean, m2, c, c_inside)
                elif NORMS == 2 and is_second:
                    publish_statistics(
                        stats + 2 * channels, second, mean, m2, M, channels, c, c_inside, RESIDUAL_EPS
                    )  # fmt: skip
                else:
                    publish_statistics(stats, first, mean, m2, M, channels, c, c_inside, EPS)
            goes_on |= PLANE > 1


def launch_statistics(call: Forward, stats: Tensor) -> None:
    """Fills ``stats`` and updates the running statistics, in one launch."""
    norm, second, g, acc, device = call.norm, call.second, call.g, call.acc, call.x.device
    launch, options = tile_options("statistics", g, acc, device, call.norms)

    def made() -> Made:
        numbers = {"EPS": norm.eps, "RESIDUAL_EPS": second.eps, "NORMS": call.norms}
        return Made(launch.grid, (g.groups, g.positions, g.columns), numbers | options)

    residual = None if call.residual_norm is None else call.residual
    call.plan.launch(
        _statistics_kernel, made, call.x, residual, partial_statistics(call, launch), stats,
        counters_for(launch.merge, device),
        norm.running_mean, norm.running_var, second.running_mean, second.running_var,
        *momentum_parts(norm), *momentum_parts(second),
    )  # fmt: skip


def partial_statistics(call: Forward, launch: launch_table.Launch | launch_table.OneLaunch) -> Tensor:
    """Room for each norm's programs: the mean and M2 of their channels, and their counts."""
    return call.x.new_empty(call.norms * launch.programs * (2 * call.g.columns + launch.channel_blocks), dtype=call.acc)


def momentum_parts(norm: Norm) -> tuple[float, float]:
    """The momentum as two float32 numbers: Triton passes a float as one, too coarse for float64 statistics."""
    high = ctypes.c_float(norm.momentum).value
    return high, norm.momentum - high
