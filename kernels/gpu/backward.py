"""Backward of activation(batch_norm(x) + s): channel sums, then the inputs' gradients, in one launch or in several."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation import Activation
from ..call import Gradients, Kept, parameter_gradients
from ..geometry import in_layout_of
from . import launch_table
from .apply import Sums, apply, launch_apply
from .launching import Backward, activation_options, one_launch_options
from .merging import Merging, Parts
from .normalise import Spread
from .plans import Made
from .reduce import Gradient, InputGradients, ParameterGradients, Saved, launch_sums, merge_sums, publish_sums, reduce
from .tickets import is_last_to_arrive, open_second_phase, take_turn, wait_for_second_phase
from .tile import NormVectors, Order, Tiling, aligned, channels_of, walk_of


@triton.jit
def _backward_kernel(
    dy, dy_fork, x, residual, mask, dz_out, dx, dresidual, partials, sums, counters,
    dweight, dbias, dresidual_weight, dresidual_bias,
    mean, rstd, weight, bias, residual_mean, residual_rstd, residual_weight, residual_bias,
    M, G, S, C, programs, slice_blocks,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, REVERSED: tl.constexpr, EVICT: tl.constexpr,
    BLOCK_P: tl.constexpr, PLANE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reduce, merge and apply in one launch, ordered by tickets. Batch statistics only."""
    gradient = Gradient(dy, dy_fork)
    saved = Saved(x, residual, mask)
    norm = NormVectors(mean, rstd, weight, bias)
    second = NormVectors(residual_mean, residual_rstd, residual_weight, residual_bias)
    activation: tl.constexpr = Activation(ACTIVATION, SLOPE)
    order: tl.constexpr = Order(REVERSED, EVICT)
    spread: tl.constexpr = Spread(False, 0.0, 0.0)
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
            out = InputGradients(dz_out, dx, dresidual)
            apply(gradient, saved, Sums(sums, M), out, norm, second, walk, False, activation, order, tiling)
        else:
            nothing = InputGradients(None, None, None)
            reduce(gradient, saved, nothing, partials, norm, second, walk, activation, spread, tiling)
            if is_last_to_arrive(counters + 1 + channel_block, programs):
                parameters = ParameterGradients(dweight, dbias, dresidual_weight, dresidual_bias)
                c, c_inside = channels_of(channel_block, C, BLOCK_C)
                found = merge_sums(partials, Parts(0, programs, 1), walk, c, c_inside, ROWS, merging)
                publish_sums(sums, parameters, found, C, c, c_inside, ROWS)
                open_second_phase(counters, channel_block, channel_blocks)


def backward(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> Gradients:
    """The wanted gradients of ``forward``, None elsewhere, from what it has ``kept``.

    ``dy_fork`` is a second gradient of the same output, added to ``dy`` on the way. Launches: reduce, which sums only
    what something needs, and apply, only where an input's gradient waits for the sums.
    """
    call = Backward.of("backward", dy, dy_fork, kept, *wanted)
    dx, of_residual = call.rooms(bool(wanted.x), bool(wanted.residual))
    dz, dresidual = (of_residual, None) if kept.residual_norm is None else (None, of_residual)
    parameters = parameter_gradients(kept.norm, kept.residual_norm, wanted)
    waiting = kept.stats is not None and any(t is not None for t in (dx, dresidual))
    if waiting and launch_table.takes_one_launch("backward", call.g):
        _launch_backward(call, dz, dx, dresidual, parameters)
    else:
        _launch_phases(call, dz, dx, dresidual, parameters, frozen=kept.stats is None)
    return Gradients(dx, of_residual, *parameters)


def local_sums(dy: Tensor, dy_fork: Tensor | None, kept: Kept, wanted: Gradients) -> tuple[Tensor, Gradients]:
    """Every channel's sum of dz, dz·x̂ and, where the residual is normed, dz·ŝ: (2 or 3, C); gradients that are local.

    The first phase of ``backward``, with its arguments, for statistics over several processes. The gradients are the
    parameters' and that of a residual without a norm, where wanted. One launch.
    """
    call = Backward.of("sums", dy, dy_fork, kept, *wanted)
    _, dz = call.rooms(False, bool(wanted.residual) and kept.residual_norm is None)
    parameters = parameter_gradients(kept.norm, kept.residual_norm, wanted)
    sums = call.like.new_empty((call.rows, call.g.channels), dtype=call.acc)
    launch_sums(call, (dz, None, None), parameters, sums, frozen=False)
    return sums, Gradients(None, dz, *parameters)


def input_gradients(
    dy: Tensor, dy_fork: Tensor | None, dz: Tensor | None, kept: Kept, means: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The last phase of ``backward``: the wanted of dx and, where the residual is normed, its gradient. One launch.

    ``means``: the sums of ``local_sums`` over all processes, divided by the values per channel of all; ``dz``: the
    residual's gradient, where ``local_sums`` made it.
    """
    call = Backward.of("inputs", dy, dy_fork, kept, None if dz is None else dz.dtype, means.dtype, *wanted)
    dx, dresidual = call.rooms(wanted[0], wanted[1] and kept.residual_norm is not None)
    launch_apply(call, None if dz is None else in_layout_of(dz, call.like), dx, dresidual, means, 1)
    return dx, dresidual


def _launch_phases(
    call: Backward,
    dz: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    parameters: list[Tensor | None],
    frozen: bool,
) -> None:
    """Fills the gradients that are not None, in two launches at most."""
    # With batch statistics an input's gradient waits for the sums; without, it is local.
    waiting = (None, None) if frozen else (dx, dresidual)
    local = (dz, dx, dresidual) if frozen else (dz, None, None)
    sums = None
    if any(t is not None for t in (*waiting, *parameters)):
        sums = call.like.new_empty((call.rows, call.g.channels), dtype=call.acc)
    launch_sums(call, local, parameters, sums, frozen)
    if sums is not None and any(t is not None for t in waiting):
        launch_apply(call, dz, *waiting, sums, call.g.values)


def _launch_backward(
    call: Backward, dz: Tensor | None, dx: Tensor | None, dresidual: Tensor | None, parameters: list[Tensor | None]
) -> None:
    """The same in one launch, with batch statistics."""
    like, g = call.like, call.g
    # What the second phase reads again, hopefully from the L2 cache; the mask is a bit an element.
    reread = sum(t.element_size() for t in (*call.gradients, call.x, call.residual) if t is not None)
    launch = launch_table.ticketed(
        "backward", g, reread, launch_table.l2_bytes(like.device), launch_table.multiprocessors(like.device)
    )
    partials = like.new_empty((call.rows, launch.programs, g.channels), dtype=call.acc)

    def made() -> Made:
        integers = g.values, g.groups, g.positions, g.channels, launch.programs, launch.slice_blocks
        numbers = {"ROWS": call.rows} | activation_options(call.activation)
        return Made(launch.grid, integers, numbers | one_launch_options(launch, g, call.acc))

    call.plan.launch(
        _backward_kernel, made, *call.gradients, call.x, call.residual, call.mask, dz, dx, dresidual, partials,
        like.new_empty((call.rows, g.channels), dtype=call.acc), like.new_zeros(launch.counters, dtype=torch.int32),
        *parameters, *call.vectors,
    )  # fmt: skip
