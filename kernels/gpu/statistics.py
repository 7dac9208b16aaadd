"""The first phase of the forward: every channel's mean and M2, and their merge over the programs."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Norm
from . import launch_table
from .launching import Forward, tile_options
from .tile import (
    Tiling,
    aligned,
    channels_of,
    count_tile,
    first_walk,
    locate,
    locate_partials,
    merge_lanes,
    store,
    welford,
)


class Running(NamedTuple):
    """Pointers to one norm's running statistics, and the momentum of their update in two float32 parts."""

    mean: Any
    var: Any
    momentum: Any
    momentum_rest: Any


class Merging(NamedTuple):
    """How partial results are merged: so many columns a channel, programs side by side, channels of a program."""

    PLANE: Any
    BLOCK_P: Any
    BLOCK_C: Any
    ACC: Any


@triton.jit
def take_statistics(x, residual, partials, walk, tiling: tl.constexpr):
    """A program's mean, M2 and count of each channel of its block, over every P-th tile; of ``residual`` too."""
    TILE: tl.constexpr = (tiling.BLOCK_S, tiling.BLOCK_C) if tiling.CHANNELS_LAST else (tiling.BLOCK_C, tiling.BLOCK_S)
    count = tl.zeros((tiling.BLOCK_S,), tiling.ACC)
    mean = tl.zeros(TILE, tiling.ACC)
    m2 = tl.zeros(TILE, tiling.ACC)
    if residual is not None:
        residual_mean = tl.zeros(TILE, tiling.ACC)
        residual_m2 = tl.zeros(TILE, tiling.ACC)

    for tile in range(walk.program, walk.tiles, 2 * walk.programs):
        # Two tiles are on their way before either is used, with no more accumulators than for one.
        following = tile + walk.programs
        start, local, inside = locate(tile, walk, tiling)
        next_start, _, next_inside = locate(following, walk, tiling)
        # A select, as Triton 3.9's interpreter loses the type of a scalar's comparison in an and.
        next_inside = tl.where(following < walk.tiles, next_inside, False)
        value = tl.load(x + start + local, mask=inside, other=0)
        next_value = tl.load(x + next_start + local, mask=next_inside, other=0)
        if residual is not None:
            residual_value = tl.load(residual + start + local, mask=inside, other=0)
            next_residual_value = tl.load(residual + next_start + local, mask=next_inside, other=0)

        count, share = count_tile(count, tile, walk, tiling)
        mean, m2 = welford(value, inside, share, mean, m2)
        if residual is not None:
            residual_mean, residual_m2 = welford(residual_value, inside, share, residual_mean, residual_m2)
        count, share = count_tile(count, following, walk, tiling)
        mean, m2 = welford(next_value, next_inside, share, mean, m2)
        if residual is not None:
            residual_mean, residual_m2 = welford(next_residual_value, next_inside, share, residual_mean, residual_m2)

    c, c_inside = channels_of(walk.channel_block, walk.C, tiling.BLOCK_C)
    row = walk.programs * walk.C
    NORMS: tl.constexpr = 1 if residual is None else 2
    total, centre, spread = merge_lanes(count, mean, m2, tiling.CHANNELS_LAST)
    tl.store(partials + walk.program * walk.C + c, centre, mask=c_inside)
    tl.store(partials + row + walk.program * walk.C + c, spread, mask=c_inside)
    if residual is not None:
        _, centre, spread = merge_lanes(count, residual_mean, residual_m2, tiling.CHANNELS_LAST)
        tl.store(partials + 2 * row + walk.program * walk.C + c, centre, mask=c_inside)
        tl.store(partials + 3 * row + walk.program * walk.C + c, spread, mask=c_inside)
    tl.store(partials + 2 * NORMS * row + walk.channel_block * walk.programs + walk.program, total)


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
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``take_statistics`` as a launch of its own."""
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, ACC)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    take_statistics(x, residual, partials, first_walk(G, S, C, CHANNEL_MAJOR, tiling), tiling)


@triton.jit
def _merge_statistics_kernel(
    partials, stats,
    running_mean, running_var, residual_running_mean, residual_running_var,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest,
    M, C, programs,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr,
    PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``merge_statistics`` for one norm, or for two in the halves of the grid."""
    merging: tl.constexpr = Merging(PLANE, BLOCK_P, BLOCK_C, ACC)
    # The programs of every channel block have the same counts: those of the first serve all.
    counts = partials + 2 * NORMS * programs * C * PLANE
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel_block = tl.program_id(0)
    if channel_block < channel_blocks:
        running = Running(running_mean, running_var, momentum, momentum_rest)
        merge_statistics(partials, counts, stats, running, M, C, programs, channel_block, EPS, merging)
    elif NORMS == 2:
        running = Running(residual_running_mean, residual_running_var, residual_momentum, residual_momentum_rest)
        merge_statistics(
            partials + 2 * programs * C * PLANE, counts, stats + 2 * C, running, M, C, programs,
            channel_block - channel_blocks, RESIDUAL_EPS, merging,
        )  # fmt: skip


def launch_statistics(call: Forward, stats: Tensor) -> None:
    """Fills ``stats`` and updates the running statistics, in two launches."""
    norm, second, g, acc = call.norm, call.second, call.g, call.acc
    launch = launch_table.streaming("statistics", g, acc is torch.float64)
    grid, options = tile_options("statistics", g, acc)
    partials = partial_statistics(call, launch.programs, launch.channel_blocks)
    _statistics_kernel[grid](
        call.x, None if call.residual_norm is None else call.residual, partials,
        g.groups, g.positions, g.columns, **options,
    )  # fmt: skip
    merge = launch_table.merge(launch.programs * g.plane, g.channels)
    _merge_statistics_kernel[(merge.channel_blocks * call.norms,)](
        partials, stats, norm.running_mean, norm.running_var, second.running_mean, second.running_var,
        *momentum_parts(norm), *momentum_parts(second), g.values, g.channels, launch.programs,
        EPS=norm.eps, RESIDUAL_EPS=second.eps, NORMS=call.norms, PLANE=g.plane, BLOCK_P=merge.block_programs,
        BLOCK_C=merge.block_channels, ACC=options["ACC"], num_warps=merge.warps,
    )  # fmt: skip


def partial_statistics(call: Forward, programs: int, channel_blocks: int) -> Tensor:
    """Room for each program's mean and M2 of its channels, and its counts."""
    return call.x.new_empty(programs * (2 * call.norms * call.g.columns + channel_blocks), dtype=call.acc)


def momentum_parts(norm: Norm) -> tuple[float, float]:
    """The momentum as two float32 numbers: Triton passes a float as one, too coarse for float64 statistics."""
    high = ctypes.c_float(norm.momentum).value
    return high, norm.momentum - high
