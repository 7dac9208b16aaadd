"""Forward of activation(batch_norm(x) + s): statistics, then the rest, in launches of their own or in one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import RELU, Activation
from ..call import NOTHING_BUT_STATISTICS, Norm, outputs
from . import launch_table
from .launching import Forward, activation_options, one_launch_options, quad_options
from .merging import Merging, Parts
from .normalise import Spread, launch_normalise
from .normalise import normalise as _normalise
from .plans import Made
from .statistics import (
    Running,
    launch_statistics,
    merge_statistics,
    momentum_parts,
    partial_statistics,
    publish_statistics,
    room_for_partials,
    take_statistics,
)
from .tickets import is_last_to_arrive, open_second_phase, take_turn, wait_for_second_phase
from .tile import NormVectors, Order, Tiling, aligned, channels_of, walk_of


@triton.jit
def _forward_kernel(
    x, residual, y, mask, partials, stats, counters,
    running_mean, running_var, weight, bias,
    residual_running_mean, residual_running_var, residual_weight, residual_bias,
    momentum, momentum_rest, residual_momentum, residual_momentum_rest,
    M, G, S, C, programs, slice_blocks,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    EPS: tl.constexpr, RESIDUAL_EPS: tl.constexpr, NORMS: tl.constexpr, BY_GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    REVERSED: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_P: tl.constexpr, PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics, merge and normalise in one launch, ordered by tickets; ``residual`` is normed where NORMS is 2."""
    activation: tl.constexpr = Activation(ACTIVATION, SLOPE)
    spread: tl.constexpr = Spread(False, EPS, RESIDUAL_EPS)
    order: tl.constexpr = Order(REVERSED, EVICT)
    tiling: tl.constexpr = Tiling(CHANNELS_LAST, PLANE, BLOCK_S, BLOCK_C, WIDE, ACC, STAGES)
    merging: tl.constexpr = Merging(PLANE, BLOCK_P, BLOCK_C, ACC)
    S, C = aligned(S, C, CHANNELS_LAST, ALIGN)
    channel_blocks = tl.cdiv(C, BLOCK_C)
    is_second, channel_block, program = take_turn(counters, programs, slice_blocks, channel_blocks)
    walk = walk_of(channel_block, program, programs, G, S, C, tiling)
    # The last slice may have fewer blocks than the others.
    if channel_block < channel_blocks:
        if is_second:
            wait_for_second_phase(counters, channel_block, channel_blocks)
            norm = NormVectors(stats, stats + C, weight, bias)
            second = NormVectors(
                stats + 2 * C if NORMS == 2 else None, stats + 3 * C if NORMS == 2 else None,
                residual_weight, residual_bias,
            )  # fmt: skip
            _normalise(x, residual, y, mask, norm, second, walk, activation, spread, order, tiling)
        else:
            take_statistics(x, partials, walk, BY_GROUPS, WHOLE, tiling)
            room = room_for_partials(programs, C, channel_blocks)
            if NORMS == 2:
                take_statistics(residual, partials + room, walk, BY_GROUPS, WHOLE, tiling)
            if is_last_to_arrive(counters + 1 + channel_block, programs):
                counts = partials + 2 * programs * C + channel_block * programs
                c, c_inside = channels_of(channel_block, C, BLOCK_C)
                parts = Parts(0, programs, 1)
                _, mean, m2 = merge_statistics(partials, counts, parts, walk, c, c_inside, merging)
                running = Running(running_mean, running_var, momentum, momentum_rest)
                publish_statistics(stats, running, mean, m2, M, C, c, c_inside, EPS)
                if NORMS == 2:
                    _, mean, m2 = merge_statistics(
                        partials + room, counts + room, parts, walk, c, c_inside, merging
                    )  # fmt: skip
                    residual_running = Running(
                        residual_running_mean, residual_running_var, residual_momentum, residual_momentum_rest
                    )
                    publish_statistics(
                        stats + 2 * C, residual_running, mean, m2, M, C, c, c_inside, RESIDUAL_EPS
                    )  # fmt: skip
                open_second_phase(counters, channel_block, channel_blocks)


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    residual_norm: Norm | None,
    training: bool,
    masked: bool,
    activation: Activation = RELU,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """activation(batch_norm(x) + s) for ``x`` of shape (N, C, *spatial), N·C·spatial > 0.

    s is nothing, ``residual``, or with ``residual_norm`` the batch norm of ``residual``. Returns y in the promoted
    dtype and the layout of ``x``; with ``masked`` the packed bits of the activation's derivative, which must have two
    values; with ``training`` the batch statistics (mean, rstd[, mean, rstd]), float32 or float64, after updating the
    running ones. One launch; two with ``training``, or one and the clearing of its counters where the launch table
    says so.
    """
    phase = "forward" if training else "frozen forward"
    call = Forward.of(phase, x, residual, norm, residual_norm, activation, masked)
    y, mask = outputs(call.x, call.residual, call.g.mask_numel, masked)
    if not training:
        launch_normalise(call, None, y, mask)
        return y, mask, None
    stats = _room_for_statistics(call)
    if launch_table.takes_one_launch("forward", call.g):
        _launch_forward(call, stats, y, mask)
    else:
        launch_statistics(call, stats)
        launch_normalise(call, stats, y, mask)
    return y, mask, stats


def local_statistics(x: Tensor, residual: Tensor | None, norm_residual: bool) -> Tensor:
    """Every channel's (mean, M2) in ``x``, with ``norm_residual`` followed by those in ``residual``: (2 or 4, C).

    The first phase of ``forward``, for statistics over several processes, in the precision of its own. One launch.
    """
    second = NOTHING_BUT_STATISTICS if norm_residual else None
    call = Forward.of("statistics", x, residual, NOTHING_BUT_STATISTICS, second)
    stats = _room_for_statistics(call)
    launch_statistics(call, stats)
    return stats


def normalise(
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    norm: Norm,
    residual_norm: Norm | None,
    masked: bool,
    activation: Activation = RELU,
) -> tuple[Tensor, Tensor | None]:
    """The last phase of ``forward``, with given ``stats``, (mean, rstd[, mean, rstd]). One launch."""
    call = Forward.of("normalise", x, residual, norm, residual_norm, activation, stats.dtype, masked)
    y, mask = outputs(call.x, call.residual, call.g.mask_numel, masked)
    launch_normalise(call, stats, y, mask)
    return y, mask


def _room_for_statistics(call: Forward) -> Tensor:
    return call.x.new_empty((2 * call.norms, call.g.channels), dtype=call.acc)


def _launch_forward(call: Forward, stats: Tensor, y: Tensor, mask: Tensor | None) -> None:
    """Fills ``stats``, ``y`` and ``mask`` and updates the running statistics, in one launch."""
    x, residual, norm, second, g = call.x, call.residual, call.norm, call.second, call.g
    # What the second phase reads again, hopefully from the L2 cache: x, and the residual where it is normed.
    reread = x.element_size()
    if call.residual_norm is not None and residual is not None:
        reread += residual.element_size()
    launch = launch_table.ticketed(
        "forward", g, reread, launch_table.l2_bytes(x.device), launch_table.multiprocessors(x.device)
    )
    partials = partial_statistics(call, launch)

    def made() -> Made:
        integers = g.values, g.groups, g.positions, g.channels, launch.programs, launch.slice_blocks
        numbers = {"EPS": norm.eps, "RESIDUAL_EPS": second.eps, "NORMS": call.norms}
        numbers |= activation_options(call.activation) | quad_options(launch, g)
        return Made(launch.grid, integers, numbers | one_launch_options(launch, g, call.acc))

    call.plan.launch(
        _forward_kernel, made, x, residual, y, mask, partials, stats, x.new_zeros(launch.counters, dtype=torch.int32),
        norm.running_mean, norm.running_var, norm.weight, norm.bias,
        second.running_mean, second.running_var, second.weight, second.bias,
        *momentum_parts(norm), *momentum_parts(second),
    )  # fmt: skip
