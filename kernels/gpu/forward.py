"""Forward of relu(batch_norm(x) + s): statistics, their merge, normalise + add + ReLU."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Geometry, dense, geometry, in_layout_of
from . import launch_table
from .tickets import is_last_to_arrive, open_second_phase, take_turn, wait_for_second_phase
from .tile import (
    affine,
    aligned,
    channels_of,
    count_tile,
    in_order,
    load_norm,
    locate,
    locate_bits,
    locate_partials,
    merge_lanes,
    pack_bits,
    schedule,
    schedule_second,
    store,
    welford,
)


@triton.jit
def _take_statistics(
    x, residual, partials, channel_block, program, programs, tiles, S, C,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's mean, M2 and count of each channel of its block, over every P-th tile; of ``residual`` too."""
    TILE: tl.constexpr = (BLOCK_S, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_S)
    count = tl.zeros((BLOCK_S,), ACC)
    mean = tl.zeros(TILE, ACC)
    m2 = tl.zeros(TILE, ACC)
    if residual is not None:
        residual_mean = tl.zeros(TILE, ACC)
        residual_m2 = tl.zeros(TILE, ACC)

    for tile in range(program, tiles, 2 * programs):
        # Two tiles are on their way before either is used, with no more accumulators than for one.
        following = tile + programs
        start, local, inside = locate(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        next_start, _, next_inside = locate(following, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        next_inside &= following < tiles
        value = tl.load(x + start + local, mask=inside, other=0)
        next_value = tl.load(x + next_start + local, mask=next_inside, other=0)
        if residual is not None:
            residual_value = tl.load(residual + start + local, mask=inside, other=0)
            next_residual_value = tl.load(residual + next_start + local, mask=next_inside, other=0)

        count, share = count_tile(count, tile, tiles, S, CHANNELS_LAST, BLOCK_S)
        mean, m2 = welford(value, inside, share, mean, m2)
        if residual is not None:
            residual_mean, residual_m2 = welford(residual_value, inside, share, residual_mean, residual_m2)
        count, share = count_tile(count, following, tiles, S, CHANNELS_LAST, BLOCK_S)
        mean, m2 = welford(next_value, next_inside, share, mean, m2)
        if residual is not None:
            residual_mean, residual_m2 = welford(next_residual_value, next_inside, share, residual_mean, residual_m2)

    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    row = programs * C
    NORMS: tl.constexpr = 1 if residual is None else 2
    total, centre, spread = merge_lanes(count, mean, m2, CHANNELS_LAST)
    tl.store(partials + program * C + c, centre, mask=c_inside)
    tl.store(partials + row + program * C + c, spread, mask=c_inside)
    if residual is not None:
        _, centre, spread = merge_lanes(count, residual_mean, residual_m2, CHANNELS_LAST)
        tl.store(partials + 2 * row + program * C + c, centre, mask=c_inside)
        tl.store(partials + 3 * row + program * C + c, spread, mask=c_inside)
    tl.store(partials + 2 * NORMS * row + channel_block * programs + program, total)


@triton.jit
def _update(running, new, momentum, momentum_rest, c, c_inside):
    """running <- (1 - momentum)·running + momentum·new, in place, in the precision of ``new``."""
    old = tl.load(running + c, mask=c_inside, other=0).to(new.dtype)
    factor = tl.cast(momentum, new.dtype) + tl.cast(momentum_rest, new.dtype)
    store(running + c, (1 - factor) * old + factor * new, c_inside)


@triton.jit
def _merge_statistics(
    partials, counts, stats, running_mean, running_var, momentum, momentum_rest, M, C, programs, channel_block,
    EPS: tl.constexpr, PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One norm's partials (mean, M2) merged into ``stats``, and its running statistics updated.

    ``stats`` is (mean, rstd), or where EPS is None (mean, M2), for a merge with what other processes found.
    """
    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    count = tl.zeros((BLOCK_P,), ACC)
    mean = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for first in range(0, programs * PLANE, BLOCK_P):
        at, inside, p, p_inside = locate_partials(first, c, c_inside, C, programs, PLANE, BLOCK_P)
        added = tl.load(counts + p, mask=p_inside, other=0)
        count += added
        # Chan's update of (count, mean, M2), lane by lane; a lane without values adds nothing.
        share = (added / tl.where(count > 0, count, 1))[:, None]
        delta = tl.where(inside, tl.load(partials + at, mask=inside, other=0) - mean, 0)
        m2 += tl.load(partials + programs * C * PLANE + at, mask=inside, other=0)
        m2 += delta * delta * share * (count - added)[:, None]
        mean += delta * share
    _, mean, m2 = merge_lanes(count, mean, m2, True)
    tl.store(stats + c, mean, mask=c_inside)
    if EPS is None:
        tl.store(stats + C + c, m2, mask=c_inside)
    else:
        tl.store(stats + C + c, 1 / tl.sqrt(m2 / M + EPS), mask=c_inside)
    if running_mean is not None:
        _update(running_mean, mean, momentum, momentum_rest, c, c_inside)
    if running_var is not None:
        _update(running_var, m2 / (M - 1), momentum, momentum_rest, c, c_inside)


@triton.jit
def _normalise(
    x, residual, y, mask, mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    channel_block, program, programs, tiles, S, C,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = relu(norm(x) + s), s nothing, ``residual`` or its norm, and the bits of y's gradient mask."""
    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    m, _, scale, shift = load_norm(mean, rstd, weight, bias, c, c_inside, EPS, FROZEN, PLANE, CHANNELS_LAST, ACC)
    if residual_mean is not None:
        residual_m, _, residual_scale, residual_shift = load_norm(
            residual_mean, residual_rstd, residual_weight, residual_bias, c, c_inside,
            RESIDUAL_EPS, FROZEN, PLANE, CHANNELS_LAST, ACC,
        )  # fmt: skip

    for step in range(program, tiles, programs):
        tile = in_order(step, tiles, REVERSED)
        start, local, inside = locate(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        value = tl.load(x + start + local, mask=inside, other=0, eviction_policy=EVICT)
        z = affine(value.to(ACC) - m, scale, shift)
        if residual is not None:
            s = tl.load(residual + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
            if residual_mean is not None:
                s = affine(s - residual_m, residual_scale, residual_shift)
            z += s
        # NaN is not <= 0: it stays, as in torch.relu.
        off = z <= 0
        store(y + start + local, tl.where(off, 0, z), inside)
        if mask is not None:
            start, local, inside = locate_bits(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
            tl.store(mask + start + local, pack_bits(~off), mask=inside)


@triton.jit
def _statistics_kernel(
    x, residual, partials, G, S, C,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_take_statistics`` as a launch of its own."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    channel_block, program, programs, tiles = schedule(G, S, C, CHANNEL_MAJOR, BLOCK_S, BLOCK_C)
    _take_statistics(
        x, residual, partials, channel_block, program, programs, tiles, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC
    )


@triton.jit
def _merge_statistics_kernel(
    partials, stats, running_mean, running_var, residual_running_mean, residual_running_var,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest, M, C, programs,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr, PLANE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_merge_statistics`` for one norm, or for two in the halves of the grid."""
    # The programs of every channel block have the same counts: those of the first serve all.
    counts = partials + 2 * NORMS * programs * C * PLANE
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel_block = tl.program_id(0)
    if channel_block < channel_blocks:
        _merge_statistics(
            partials, counts, stats, running_mean, running_var, momentum, momentum_rest, M, C, programs,
            channel_block, EPS, PLANE, BLOCK_P, BLOCK_C, ACC,
        )  # fmt: skip
    elif NORMS == 2:
        _merge_statistics(
            partials + 2 * programs * C * PLANE, counts, stats + 2 * C, residual_running_mean, residual_running_var,
            residual_momentum, residual_momentum_rest, M, C, programs,
            channel_block - channel_blocks, RESIDUAL_EPS, PLANE, BLOCK_P, BLOCK_C, ACC,
        )  # fmt: skip


@triton.jit
def _normalise_kernel(
    x, residual, y, mask, mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    G, S, C,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr,
    PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_normalise`` as a launch of its own."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    channel_block, program, programs, tiles = schedule_second(G, S, C, REVERSED, CHANNEL_MAJOR, BLOCK_S, BLOCK_C)
    _normalise(
        x, residual, y, mask, mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
        channel_block, program, programs, tiles, S, C,
        EPS, RESIDUAL_EPS, FROZEN, REVERSED, EVICT, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
    )  # fmt: skip


@triton.jit
def _forward_kernel(
    x, residual, y, mask, partials, stats, counters, running_mean, running_var, weight, bias,
    residual_running_mean, residual_running_var, residual_weight, residual_bias,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest, M, G, S, C, programs, slice_blocks,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_P: tl.constexpr, PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics, merge and normalise in one launch, ordered by tickets; ``residual`` is normed where NORMS is 2."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    tiles = G * tl.cdiv(S, BLOCK_S)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    second, channel_block, program = take_turn(counters, programs, slice_blocks, channel_blocks)
    # The last slice may have fewer blocks than the others.
    if channel_block < channel_blocks:
        if second:
            wait_for_second_phase(counters, channel_block, channel_blocks)
            _normalise(
                x, residual, y, mask, stats, stats + C, weight, bias,
                stats + 2 * C if NORMS == 2 else None, stats + 3 * C if NORMS == 2 else None,
                residual_weight, residual_bias, channel_block, program, programs, tiles, S, C,
                EPS, RESIDUAL_EPS, False, REVERSED, EVICT, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
            )  # fmt: skip
        else:
            _take_statistics(
                x, residual if NORMS == 2 else None, partials, channel_block, program, programs, tiles, S, C,
                CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
            )  # fmt: skip
            if is_last_to_arrive(counters, channel_block, programs):
                counts = partials + 2 * NORMS * programs * C + channel_block * programs
                _merge_statistics(
                    partials, counts, stats, running_mean, running_var, momentum, momentum_rest, M, C, programs,
                    channel_block, EPS, PLANE, BLOCK_P, BLOCK_C, ACC,
                )  # fmt: skip
                if NORMS == 2:
                    _merge_statistics(
                        partials + 2 * programs * C, counts, stats + 2 * C,
                        residual_running_mean, residual_running_var, residual_momentum, residual_momentum_rest,
                        M, C, programs, channel_block, RESIDUAL_EPS, PLANE, BLOCK_P, BLOCK_C, ACC,
                    )  # fmt: skip
                open_second_phase(counters, channel_block, channel_blocks)


class Norm(NamedTuple):
    """One BatchNorm's tensors, each of shape (C,) or None, and numbers; no eps where nothing is to be normalised."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float | None


_NOTHING_BUT_STATISTICS = Norm(None, None, None, None, 0.0, None)


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic on these activations."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


@launch_table.cached
def tile_options(kernel: str, g: Geometry, acc: torch.dtype) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the compile-time arguments that every streaming kernel takes."""
    launch = launch_table.streaming(kernel, g, acc is torch.float64)
    constants = _tile_constants(g, acc, launch.block_positions, launch.block_channels, launch.warps)
    constants["CHANNEL_MAJOR"] = launch.channel_major
    return launch.grid, constants | _order_constants() if kernel in ("normalise", "apply") else constants


@launch_table.cached
def one_launch_options(launch: launch_table.OneLaunch, g: Geometry, acc: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments that both one-launch kernels take."""
    constants = _tile_constants(g, acc, launch.block_positions, launch.block_channels, launch.warps)
    return constants | _order_constants() | {"BLOCK_P": launch.block_programs}


def _order_constants() -> dict[str, Any]:
    """How the second phase, which reads an activation for the last time, goes about it."""
    return {
        "REVERSED": launch_table.SECOND_PHASE_REVERSED,
        "EVICT": "evict_first" if launch_table.SECOND_PHASE_EVICTS_FIRST else "",
    }


def _tile_constants(
    g: Geometry, acc: torch.dtype, block_positions: int, block_channels: int, warps: int
) -> dict[str, Any]:
    return {
        "PLANE": g.plane,
        "CHANNELS_LAST": g.channels_last,
        "ALIGN": math.gcd(g.inner, 16),
        "BLOCK_S": block_positions,
        "BLOCK_C": block_channels,
        "ACC": tl.float64 if acc is torch.float64 else tl.float32,
        "num_warps": warps,
    }


def means_and_rstds(stats: Tensor | None, norm: Norm, residual_norm: Norm | None) -> tuple[Tensor | None, ...]:
    """(mean, rstd, residual mean, residual rstd): of the batch, or the running ones with the variance for rstd."""
    if stats is not None:
        return tuple(stats) if residual_norm is not None else (*stats, None, None)
    second = (residual_norm.running_mean, residual_norm.running_var) if residual_norm is not None else (None, None)
    return norm.running_mean, norm.running_var, *second


def forward(
    x: Tensor, residual: Tensor | None, norm: Norm, residual_norm: Norm | None, training: bool, save_mask: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """relu(batch_norm(x) + s) for ``x`` of shape (N, C, *spatial), N·C·spatial > 0.

    s is nothing, ``residual``, or with ``residual_norm`` the batch norm of ``residual``. Returns y in the promoted
    dtype and the layout of ``x``; with ``save_mask``, in the middle form, the packed mask; with ``training`` the batch
    statistics (mean, rstd[, mean, rstd]), float32 or float64, after updating the running ones. One launch; three with
    ``training``, or one and the clearing of its counters where the launch table says so.
    """
    x, residual, g, acc = _prepare(x, residual)
    y, mask = _outputs(x, residual, residual_norm, g, save_mask)
    if not training:
        _launch_normalise(x, residual, y, mask, None, norm, residual_norm, g, acc)
        return y, mask, None
    stats = x.new_empty((2 if residual_norm is None else 4, g.channels), dtype=acc)
    if launch_table.takes_one_launch("forward", g):
        _launch_forward(x, residual, y, mask, stats, norm, residual_norm, g, acc)
    else:
        _launch_statistics(x, residual, stats, norm, residual_norm, g, acc)
        _launch_normalise(x, residual, y, mask, stats, norm, residual_norm, g, acc)
    return y, mask, stats


def local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    """Every channel's (mean, M2) in ``x``, with ``norm_residual`` followed by those in ``residual``: (2 or 4, C).

    The first phase of ``forward``, for statistics over several processes, in the precision of its own. Two launches.
    """
    x, residual, g, acc = _prepare(x, residual)
    stats = x.new_empty((4 if norm_residual else 2, g.channels), dtype=acc)
    second = _NOTHING_BUT_STATISTICS if norm_residual else None
    _launch_statistics(x, residual, stats, _NOTHING_BUT_STATISTICS, second, g, acc)
    return stats


def normalise(
    x: Tensor, residual: Tensor | None, stats: Tensor, norm: Norm, residual_norm: Norm | None
) -> tuple[Tensor, Tensor | None]:
    """The last phase of ``forward``: y and its mask with given ``stats``, (mean, rstd[, mean, rstd]). One launch."""
    x, residual, g, acc = _prepare(x, residual)
    y, mask = _outputs(x, residual, residual_norm, g, save_mask=True)
    _launch_normalise(x, residual, y, mask, stats, norm, residual_norm, g, acc)
    return y, mask


def _prepare(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Geometry, torch.dtype]:
    """The activations in one layout, their geometry, the dtype of the arithmetic on them."""
    x = dense(x)
    return x, None if residual is None else in_layout_of(residual, x), geometry(x), accumulator(x, residual)


def _outputs(
    x: Tensor, residual: Tensor | None, residual_norm: Norm | None, g: Geometry, save_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """Room for y, and for its mask where one is to be saved and needed."""
    y = torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    masked = save_mask and needs_mask(residual, residual_norm)
    return y, x.new_empty(g.mask_numel, dtype=torch.uint8) if masked else None


def _launch_statistics(
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    g: Geometry,
    acc: torch.dtype,
) -> None:
    """Fills ``stats`` and updates the running statistics, in two launches."""
    norms = 1 if residual_norm is None else 2
    second = norm if residual_norm is None else residual_norm
    launch = launch_table.streaming("statistics", g, acc is torch.float64)
    grid, options = tile_options("statistics", g, acc)
    partials = _partial_statistics(x, norms, launch.programs, launch.channel_blocks, g, acc)
    _statistics_kernel[grid](
        x, None if residual_norm is None else residual, partials, g.groups, g.positions, g.columns, **options
    )
    merge = launch_table.merge(launch.programs * g.plane, g.channels)
    _merge_statistics_kernel[(merge.channel_blocks * norms,)](
        partials, stats, norm.running_mean, norm.running_var, second.running_mean, second.running_var,
        *_float32_parts(norm.momentum), *_float32_parts(second.momentum), g.values, g.channels, launch.programs,
        EPS=norm.eps, RESIDUAL_EPS=second.eps, NORMS=norms, PLANE=g.plane, BLOCK_P=merge.block_programs,
        BLOCK_C=merge.block_channels, ACC=options["ACC"], num_warps=merge.warps,
    )  # fmt: skip


def _launch_normalise(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mask: Tensor | None,
    stats: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    g: Geometry,
    acc: torch.dtype,
) -> None:
    """Fills ``y`` and ``mask``, with the batch's statistics or, without them, the running ones."""
    mean, rstd, residual_mean, residual_rstd = means_and_rstds(stats, norm, residual_norm)
    second = norm if residual_norm is None else residual_norm
    grid, options = tile_options("normalise", g, acc)
    _normalise_kernel[grid](
        x, residual, y, mask, mean, rstd, norm.weight, norm.bias,
        residual_mean, residual_rstd, second.weight, second.bias, g.groups, g.positions, g.columns,
        EPS=norm.eps, RESIDUAL_EPS=second.eps, FROZEN=stats is None, **options,
    )  # fmt: skip


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    mask: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    g: Geometry,
    acc: torch.dtype,
) -> None:
    """Fills ``stats``, ``y`` and ``mask`` and updates the running statistics, in one launch."""
    norms = 1 if residual_norm is None else 2
    second = norm if residual_norm is None else residual_norm
    # What the second phase reads again, hopefully from the L2 cache: x, and the residual where it is normed.
    reread = (
        x.element_size() if residual_norm is None or residual is None else x.element_size() + residual.element_size()
    )
    launch = launch_table.ticketed("forward", g, reread, launch_table.l2_bytes(x.device))
    partials = _partial_statistics(x, norms, launch.programs, launch.channel_blocks, g, acc)
    _forward_kernel[launch.grid](
        x, residual, y, mask, partials, stats, x.new_zeros(launch.counters, dtype=torch.int32),
        norm.running_mean, norm.running_var, norm.weight, norm.bias,
        second.running_mean, second.running_var, second.weight, second.bias,
        *_float32_parts(norm.momentum), *_float32_parts(second.momentum),
        g.values, g.groups, g.positions, g.channels, launch.programs, launch.slice_blocks,
        EPS=norm.eps, RESIDUAL_EPS=second.eps, NORMS=norms, **one_launch_options(launch, g, acc),
    )  # fmt: skip


def _partial_statistics(
    x: Tensor, norms: int, programs: int, channel_blocks: int, g: Geometry, acc: torch.dtype
) -> Tensor:
    """Room for each program's mean and M2 of its channels, and its counts."""
    return x.new_empty(programs * (2 * norms * g.columns + channel_blocks), dtype=acc)


def needs_mask(residual: Tensor | None, residual_norm: Norm | None) -> bool:
    """Only a residual that is not saved for the backward hides the sign from it; else x and s give it again."""
    return residual is not None and residual_norm is None


def _float32_parts(value: float) -> tuple[float, float]:
    """``value`` as two float32 numbers: Triton passes a float as one, which is too coarse for float64 statistics."""
    high = ctypes.c_float(value).value
    return high, value - high
