"""Backward of relu(batch_norm(x) + s): the channel sums of the gradient, their merge, the gradients of the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Geometry, dense, geometry, in_layout_of
from . import launch_table
from .forward import Norm, accumulator, means_and_rstds, one_launch_options, tile_options
from .tickets import is_last_to_arrive, open_second_phase, take_turn, wait_for_second_phase
from .tile import (
    affine,
    aligned,
    by_channel,
    channels_of,
    in_order,
    load_norm,
    locate,
    locate_bits,
    locate_partials,
    schedule,
    schedule_second,
    store,
    unpack_bits,
)


@triton.jit
def _load_gradient(dy, dy_fork, start, local, inside, EVICT: tl.constexpr, ACC: tl.constexpr):
    """dy, or where the output was forked the sum of the gradients of both its copies."""
    gradient = tl.load(dy + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
    if dy_fork is not None:
        gradient += tl.load(dy_fork + start + local, mask=inside, other=0, eviction_policy=EVICT).to(ACC)
    return gradient


@triton.jit
def _relu_gradient(
    dy, z, inside, mask, tile, channel_block, S, C,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy where the forward let z through, by its mask or, where it kept none, by the sign of the same z."""
    if mask is not None:
        start, local, bits_inside = locate_bits(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        on = unpack_bits(tl.load(mask + start + local, mask=bits_inside, other=0))
    else:
        on = ~(z <= 0)
    # A select: 0·inf would be NaN.
    return tl.where(on & inside, dy, 0)


@triton.jit
def _reduce(
    dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    channel_block, program, programs, tiles, S, C,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr, PLANE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program's Σ dz, Σ dz·x̂ (and Σ dz·ŝ), and every gradient that needs no sum: dz, and all when FROZEN."""
    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    m, r, scale, shift = load_norm(mean, rstd, weight, bias, c, c_inside, EPS, FROZEN, PLANE, CHANNELS_LAST, ACC)
    TILE: tl.constexpr = (BLOCK_S, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_S)
    sum_dz = tl.zeros(TILE, ACC)
    sum_dz_x = tl.zeros(TILE, ACC)
    if residual is not None:
        residual_m, residual_r, residual_scale, residual_shift = load_norm(
            residual_mean, residual_rstd, residual_weight, residual_bias, c, c_inside,
            RESIDUAL_EPS, FROZEN, PLANE, CHANNELS_LAST, ACC,
        )  # fmt: skip
        sum_dz_residual = tl.zeros(TILE, ACC)

    for tile in range(program, tiles, programs):
        start, local, inside = locate(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        centred = tl.load(x + start + local, mask=inside, other=0).to(ACC) - m
        z = affine(centred, scale, shift)
        if residual is not None:
            residual_centred = tl.load(residual + start + local, mask=inside, other=0).to(ACC) - residual_m
            z += affine(residual_centred, residual_scale, residual_shift)
        dz = _load_gradient(dy, dy_fork, start, local, inside, "", ACC)
        dz = _relu_gradient(dz, z, inside, mask, tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        if dz_out is not None:
            store(dz_out + start + local, dz, inside)
        if dx is not None:
            store(dx + start + local, dz * scale, inside)
        if dresidual is not None:
            store(dresidual + start + local, dz * residual_scale, inside)
        if partials is not None:
            sum_dz += dz
            sum_dz_x += tl.where(inside, dz * centred, 0)
            if residual is not None:
                sum_dz_residual += tl.where(inside, dz * residual_centred, 0)

    if partials is not None:
        AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
        row = programs * C
        out = partials + program * C + c
        tl.store(out, tl.sum(sum_dz, axis=AXIS), mask=c_inside)
        tl.store(out + row, tl.sum(sum_dz_x * r, axis=AXIS), mask=c_inside)
        if residual is not None:
            tl.store(out + 2 * row, tl.sum(sum_dz_residual * residual_r, axis=AXIS), mask=c_inside)


@triton.jit
def _merge_sums(
    partials, sums, dweight, dbias, dresidual_weight, dresidual_bias, C, programs, channel_block,
    ROWS: tl.constexpr, PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The partial sums of all programs added in a fixed order, and the parameters' gradients, which they are."""
    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    for row in tl.static_range(ROWS):
        total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
        for first in range(0, programs * PLANE, BLOCK_P):
            at, inside, _, _ = locate_partials(first, c, c_inside, C, programs, PLANE, BLOCK_P)
            total += tl.load(partials + row * programs * C * PLANE + at, mask=inside, other=0)
        value = tl.sum(total, axis=0)
        tl.store(sums + row * C + c, value, mask=c_inside)
        if row == 0:
            if dbias is not None:
                store(dbias + c, value, c_inside)
            if dresidual_bias is not None:
                store(dresidual_bias + c, value, c_inside)
        elif row == 1:
            if dweight is not None:
                store(dweight + c, value, c_inside)
        else:
            if dresidual_weight is not None:
                store(dresidual_weight + c, value, c_inside)


@triton.jit
def _input_gradient(dz, centred, r, scale, mean_dz, mean_dz_x):
    """weight·rstd·(dz - Σdz/M - x̂·Σ(dz·x̂)/M)"""
    return scale * (dz - mean_dz - centred * r * mean_dz_x)


@triton.jit
def _apply(
    gradient, gradient_fork, x, residual, mask, sums, dz_out, dx, dresidual,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    channel_block, program, programs, tiles, M, S, C,
    IS_DZ: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr, PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The inputs' gradients that waited for the merged sums, from ``gradient``: dz, or dy (in two)."""
    c, c_inside = channels_of(channel_block, C, BLOCK_C)
    m, r, scale, shift = load_norm(mean, rstd, weight, bias, c, c_inside, 0.0, False, PLANE, CHANNELS_LAST, ACC)
    mean_dz = by_channel(tl.load(sums + c // PLANE, mask=c_inside, other=0) / M, CHANNELS_LAST)
    mean_dz_x = by_channel(tl.load(sums + C // PLANE + c // PLANE, mask=c_inside, other=0) / M, CHANNELS_LAST)
    if residual is not None:
        residual_m, residual_r, residual_scale, residual_shift = load_norm(
            residual_mean,
            residual_rstd,
            residual_weight,
            residual_bias,
            c,
            c_inside,
            0.0,
            False,
            PLANE,
            CHANNELS_LAST,
            ACC,
        )
        mean_dz_residual = by_channel(
            tl.load(sums + 2 * (C // PLANE) + c // PLANE, mask=c_inside, other=0) / M, CHANNELS_LAST
        )

    for step in range(program, tiles, programs):
        tile = in_order(step, tiles, REVERSED)
        start, local, inside = locate(tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        value = tl.load(x + start + local, mask=inside, other=0, eviction_policy=EVICT)
        centred = value.to(ACC) - m
        z = affine(centred, scale, shift)
        if residual is not None:
            s = tl.load(residual + start + local, mask=inside, other=0, eviction_policy=EVICT)
            residual_centred = s.to(ACC) - residual_m
            z += affine(residual_centred, residual_scale, residual_shift)
        dz = _load_gradient(gradient, gradient_fork, start, local, inside, EVICT, ACC)
        if not IS_DZ:
            dz = _relu_gradient(dz, z, inside, mask, tile, channel_block, S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C)
        if dz_out is not None:
            store(dz_out + start + local, dz, inside)
        if dx is not None:
            store(dx + start + local, _input_gradient(dz, centred, r, scale, mean_dz, mean_dz_x), inside)
        if dresidual is not None:
            value = _input_gradient(dz, residual_centred, residual_r, residual_scale, mean_dz, mean_dz_residual)
            store(dresidual + start + local, value, inside)


@triton.jit
def _reduce_kernel(
    dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias, G, S, C,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, FROZEN: tl.constexpr, PLANE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_reduce`` as a launch of its own."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    channel_block, program, programs, tiles = schedule(G, S, C, CHANNEL_MAJOR, BLOCK_S, BLOCK_C)
    _reduce(
        dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials,
        mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
        channel_block, program, programs, tiles, S, C,
        EPS, RESIDUAL_EPS, FROZEN, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
    )  # fmt: skip


@triton.jit
def _merge_sums_kernel(
    partials, sums, dweight, dbias, dresidual_weight, dresidual_bias, C, programs,
    ROWS: tl.constexpr, PLANE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_merge_sums`` as a launch of its own."""
    _merge_sums(
        partials, sums, dweight, dbias, dresidual_weight, dresidual_bias, C, programs, tl.program_id(0),
        ROWS, PLANE, BLOCK_P, BLOCK_C, ACC,
    )  # fmt: skip


@triton.jit
def _apply_kernel(
    gradient, gradient_fork, x, residual, mask, sums, dx, dresidual,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias, M, G, S, C,
    IS_DZ: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr, PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``_apply`` as a launch of its own."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    channel_block, program, programs, tiles = schedule_second(G, S, C, REVERSED, CHANNEL_MAJOR, BLOCK_S, BLOCK_C)
    _apply(
        gradient, gradient_fork, x, residual, mask, sums, None, dx, dresidual,
        mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
        channel_block, program, programs, tiles, M, S, C,
        IS_DZ, REVERSED, EVICT, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
    )  # fmt: skip


@triton.jit
def _backward_kernel(
    dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials, sums, counters,
    dweight, dbias, dresidual_weight, dresidual_bias,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    M, G, S, C, programs, slice_blocks,
    ROWS: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr, BLOCK_P: tl.constexpr, PLANE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduce, merge and apply in one launch, ordered by tickets. Batch statistics only."""
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    tiles = G * tl.cdiv(S, BLOCK_S)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    second, channel_block, program = take_turn(counters, programs, slice_blocks, channel_blocks)
    # The last slice may have fewer blocks than the others.
    if channel_block < channel_blocks:
        if second:
            wait_for_second_phase(counters, channel_block, channel_blocks)
            _apply(
                dy, dy_fork, x, residual, mask, sums, dz_out, dx, dresidual,
                mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
                channel_block, program, programs, tiles, M, S, C,
                False, REVERSED, EVICT, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
            )  # fmt: skip
        else:
            _reduce(
                dy, dy_fork, x, residual, mask, None, None, None, partials,
                mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
                channel_block, program, programs, tiles, S, C,
                0.0, 0.0, False, PLANE, CHANNELS_LAST, BLOCK_S, BLOCK_C, ACC,
            )  # fmt: skip
            if is_last_to_arrive(counters, channel_block, programs):
                _merge_sums(
                    partials, sums, dweight, dbias, dresidual_weight, dresidual_bias, C, programs, channel_block,
                    ROWS, PLANE, BLOCK_P, BLOCK_C, ACC,
                )  # fmt: skip
                open_second_phase(counters, channel_block, channel_blocks)


class Gradients(NamedTuple):
    """Which gradients are wanted, or the gradients; of the inputs of the forward in its order."""

    x: Tensor | bool | None
    residual: Tensor | bool | None
    weight: Tensor | bool | None
    bias: Tensor | bool | None
    residual_weight: Tensor | bool | None
    residual_bias: Tensor | bool | None


def backward(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    wanted: Gradients,
) -> Gradients:
    """The wanted gradients of ``forward``, None elsewhere, from what it was given and returned.

    ``dy_fork`` is a second gradient of the same output, added to ``dy`` on the way. ``residual`` is needed only with
    ``residual_norm``, ``residual_dtype`` only without; no ``stats`` means frozen statistics. Launches: reduce, merge,
    apply; the merge only for sums that something needs, the apply only where an input's gradient waits for them.
    """
    call = _prepare(dy, dy_fork, x, residual, mask, stats, norm, residual_norm)
    dx = torch.empty_like(call.x) if wanted.x else None
    dz = dresidual = None
    if wanted.residual and residual_norm is None:
        dz = torch.empty_like(call.x, dtype=residual_dtype)
    elif wanted.residual and call.residual is not None:
        dresidual = torch.empty_like(call.residual)
    parameters = _parameter_gradients(norm, residual_norm, wanted)
    waiting = stats is not None and any(t is not None for t in (dx, dresidual))
    if waiting and launch_table.takes_one_launch("backward", call.g):
        _launch_backward(call, dz, dx, dresidual, parameters)
    else:
        _launch_phases(call, dz, dx, dresidual, parameters, frozen=stats is None)
    return Gradients(dx, dresidual if dz is None else dz, *parameters)


def local_sums(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_dtype: torch.dtype | None,
    mask: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    wanted: Gradients,
) -> tuple[Tensor, Gradients]:
    """Every channel's sum of dz, dz·x̂ and, where the residual is normed, dz·ŝ: (2 or 3, C); gradients that are local.

    The first phase of ``backward``, with its arguments, for statistics over several processes. The gradients are the
    parameters' and that of a residual without a norm, where wanted. Two launches.
    """
    call = _prepare(dy, dy_fork, x, residual, mask, stats, norm, residual_norm)
    residual_alone = wanted.residual and residual_norm is None
    dz = torch.empty_like(call.x, dtype=residual_dtype) if residual_alone else None
    parameters = _parameter_gradients(norm, residual_norm, wanted)
    sums = call.x.new_empty((call.rows, call.g.channels), dtype=call.acc)
    _launch_sums(call, dz, (None, None), parameters, sums, frozen=False)
    return sums, Gradients(None, dz, *parameters)


def input_gradients(
    dy: Tensor,
    dy_fork: Tensor | None,
    dz: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    stats: Tensor,
    means: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The last phase of ``backward``: the wanted of dx and, where the residual is normed, its gradient. One launch.

    ``means``: the sums of ``local_sums`` over all processes, divided by the values per channel of all; ``dz``: the
    residual's gradient, where ``local_sums`` made it.
    """
    call = _prepare(dy, dy_fork, x, residual, mask, stats, norm, residual_norm)
    dx = torch.empty_like(call.x) if wanted[0] else None
    dresidual = torch.empty_like(call.residual) if wanted[1] and call.residual is not None else None
    _launch_apply(call, None if dz is None else in_layout_of(dz, call.x), dx, dresidual, means, 1)
    return dx, dresidual


class _Call(NamedTuple):
    """What every launch of one backward is given."""

    gradients: tuple[Tensor, Tensor | None]
    x: Tensor
    residual: Tensor | None
    mask: Tensor | None
    norms: tuple[Tensor | None, ...]
    eps: tuple[float | None, float | None]
    rows: int
    g: Geometry
    acc: torch.dtype


def _prepare(
    dy: Tensor,
    dy_fork: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    stats: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
) -> _Call:
    x = dense(x)
    dy = in_layout_of(dy, x)
    if dy_fork is not None:
        dy_fork = in_layout_of(dy_fork, x)
    if residual is not None:
        residual = in_layout_of(residual, x)
    second = norm if residual_norm is None else residual_norm
    mean, rstd, residual_mean, residual_rstd = means_and_rstds(stats, norm, residual_norm)
    return _Call(
        (dy, dy_fork),
        x,
        residual,
        mask,
        (mean, rstd, norm.weight, norm.bias, residual_mean, residual_rstd, second.weight, second.bias),
        (norm.eps, second.eps),
        2 if residual_norm is None else 3,
        geometry(x),
        accumulator(x, residual, dy),
    )


def _launch_phases(
    call: _Call,
    dz: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    parameters: list[Tensor | None],
    frozen: bool,
) -> None:
    """Fills the gradients that are not None, in three launches at most."""
    # With batch statistics an input's gradient waits for the sums; without, it is local.
    waiting = (None, None) if frozen else (dx, dresidual)
    local = (dx, dresidual) if frozen else (None, None)
    sums = None
    if any(t is not None for t in (*waiting, *parameters)):
        sums = call.x.new_empty((call.rows, call.g.channels), dtype=call.acc)
    _launch_sums(call, dz, local, parameters, sums, frozen)
    if sums is not None and any(t is not None for t in waiting):
        _launch_apply(call, dz, *waiting, sums, call.g.values)


def _launch_sums(
    call: _Call,
    dz: Tensor | None,
    local: tuple[Tensor | None, Tensor | None],
    parameters: list[Tensor | None],
    sums: Tensor | None,
    frozen: bool,
) -> None:
    """Fills ``dz`` and ``local``, in one launch; with ``sums`` also those and ``parameters``, in another."""
    x, g = call.x, call.g
    launch = launch_table.streaming("reduce", g, call.acc is torch.float64)
    partials = None if sums is None else x.new_empty((call.rows, launch.programs, g.columns), dtype=call.acc)
    grid, options = tile_options("reduce", g, call.acc)
    _reduce_kernel[grid](
        *call.gradients, x, call.residual, call.mask, dz, *local, partials, *call.norms,
        g.groups, g.positions, g.columns, EPS=call.eps[0], RESIDUAL_EPS=call.eps[1], FROZEN=frozen, **options,
    )  # fmt: skip
    if partials is None:
        return
    merge = launch_table.merge(launch.programs * g.plane, g.channels)
    _merge_sums_kernel[(merge.channel_blocks,)](
        partials, sums, *parameters, g.channels, launch.programs,
        ROWS=call.rows, PLANE=g.plane, BLOCK_P=merge.block_programs, BLOCK_C=merge.block_channels, ACC=options["ACC"],
        num_warps=merge.warps,
    )  # fmt: skip


def _launch_apply(
    call: _Call, dz: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, sums: Tensor, values: int
) -> None:
    """Fills the inputs' gradients, from ``sums`` over so many ``values`` of each channel."""
    g = call.g
    # dz is dy already masked (and added up), unless it was rounded to a narrower dtype.
    is_dz = dz is not None and dz.dtype is call.gradients[0].dtype
    grid, options = tile_options("apply", g, call.acc)
    _apply_kernel[grid](
        *((dz, None) if is_dz else call.gradients), call.x, call.residual, call.mask, sums, dx, dresidual,
        *call.norms, values, g.groups, g.positions, g.columns, IS_DZ=is_dz, **options,
    )  # fmt: skip


def _launch_backward(
    call: _Call, dz: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, parameters: list[Tensor | None]
) -> None:
    """The same in one launch, with batch statistics."""
    x, g = call.x, call.g
    # What the second phase reads again, hopefully from the L2 cache; the mask is a bit an element.
    reread = sum(t.element_size() for t in (*call.gradients, x, call.residual) if t is not None)
    launch = launch_table.ticketed("backward", g, reread, launch_table.l2_bytes(x.device))
    partials = x.new_empty((call.rows, launch.programs, g.channels), dtype=call.acc)
    _backward_kernel[launch.grid](
        *call.gradients, x, call.residual, call.mask, dz, dx, dresidual, partials,
        x.new_empty((call.rows, g.channels), dtype=call.acc), x.new_zeros(launch.counters, dtype=torch.int32),
        *parameters, *call.norms, g.values, g.groups, g.positions, g.channels, launch.programs, launch.slice_blocks,
        ROWS=call.rows, **one_launch_options(launch, g, call.acc),
    )  # fmt: skip


def _parameter_gradients(norm: Norm, residual_norm: Norm | None, wanted: Gradients) -> list[Tensor | None]:
    """Room for the wanted gradients of the parameters."""
    second = (None, None) if residual_norm is None else (residual_norm.weight, residual_norm.bias)
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format) if want and p is not None else None
        for p, want in zip((norm.weight, norm.bias, *second), wanted[2:], strict=True)
    ]
