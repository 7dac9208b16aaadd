"""Device functions on one tile: which it is, where it lies, its ReLU bits, its norm, its statistics.

A tile has an outer and an inner axis, the inner one contiguous in memory: (positions, channels) for a channels_last
tensor, (channels, positions) for a contiguous one. ``CHANNELS_LAST`` says which; everything else is shared.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs


class Tiling(NamedTuple):
    """How an activation is cut into tiles, and the dtype of the arithmetic on them. Known to the compiler."""

    CHANNELS_LAST: Any
    PLANE: Any
    BLOCK_S: Any
    BLOCK_C: Any
    ACC: Any


class Walk(NamedTuple):
    """A program's work: of a block of channels every ``programs``-th of ``tiles``, from number ``program`` on.

    S, C: positions and columns of the activation, each group of it.
    """

    channel_block: Any
    program: Any
    programs: Any
    tiles: Any
    S: Any
    C: Any


class Order(NamedTuple):
    """How a second phase, which reads an activation for the last time, goes about it. Known to the compiler."""

    REVERSED: Any
    EVICT: Any


class NormVectors(NamedTuple):
    """Pointers to one norm's vectors over channels; ``rstd`` to the variance where statistics are frozen."""

    mean: Any
    rstd: Any
    weight: Any
    bias: Any


# The interpreter truncates float32 to bfloat16 where a GPU rounds.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def by_channel(v, CHANNELS_LAST: tl.constexpr):
    """A vector over channels, broadcastable over a tile."""
    if CHANNELS_LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def by_position(v, CHANNELS_LAST: tl.constexpr):
    """A vector over positions, broadcastable over a tile."""
    if CHANNELS_LAST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def aligned(S, C, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """(S, C), the inner one known to the compiler as a multiple of ALIGN, so that accesses widen."""
    if CHANNELS_LAST:
        return S, C // ALIGN * ALIGN
    else:
        return S // ALIGN * ALIGN, C


@triton.jit
def first_walk(G, S, C, CHANNEL_MAJOR: tl.constexpr, tiling: tl.constexpr):
    """What this program does of a first phase. Neighbours share rows, or with CHANNEL_MAJOR a block of channels."""
    channel_blocks = tl.cdiv(C, tiling.BLOCK_C)
    programs = tl.num_programs(0) // channel_blocks
    tiles = G * tl.cdiv(S, tiling.BLOCK_S)
    if CHANNEL_MAJOR:
        return Walk(tl.program_id(0) // programs, tl.program_id(0) % programs, programs, tiles, S, C)
    else:
        return Walk(tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks, programs, tiles, S, C)


@triton.jit
def second_walk(G, S, C, CHANNEL_MAJOR: tl.constexpr, REVERSED: tl.constexpr, tiling: tl.constexpr):
    """As ``first_walk``, for the second phase: REVERSED, it begins with the block that the first ended with."""
    walk = first_walk(G, S, C, CHANNEL_MAJOR, tiling)
    channel_block = walk.channel_block
    if REVERSED and CHANNEL_MAJOR:
        channel_block = tl.cdiv(C, tiling.BLOCK_C) - 1 - channel_block
    return Walk(channel_block, walk.program, walk.programs, walk.tiles, S, C)


@triton.jit
def in_order(step, tiles, REVERSED: tl.constexpr):
    """The tile of a step. From the last to the first, a walk begins with what the one before it has left in cache."""
    if REVERSED:
        return tiles - 1 - step
    else:
        return step


@triton.jit
def positions_inside(tile, S, BLOCK_S: tl.constexpr):
    """Which of a tile's positions exist."""
    left = S - tl.cast(tile % tl.cdiv(S, BLOCK_S), tl.int64) * BLOCK_S
    return tl.arange(0, BLOCK_S) < tl.minimum(left, BLOCK_S).to(tl.int32)


@triton.jit
def locate(tile, walk, tiling: tl.constexpr):
    """The 64-bit offset of a tile's first element, the 32-bit offsets of the others from it, which are inside."""
    return _locate(
        tile, walk.channel_block, walk.S, walk.C, tiling.CHANNELS_LAST, tiling.BLOCK_S, tiling.BLOCK_C
    )  # fmt: skip


@triton.jit
def locate_bits(tile, walk, tiling: tl.constexpr):
    """As ``locate``, for the tile's bytes in a mask whose inner axis is packed by eight."""
    if tiling.CHANNELS_LAST:
        return _locate(tile, walk.channel_block, walk.S, tl.cdiv(walk.C, 8), True, tiling.BLOCK_S, tiling.BLOCK_C // 8)
    else:
        return _locate(tile, walk.channel_block, tl.cdiv(walk.S, 8), walk.C, False, tiling.BLOCK_S // 8, tiling.BLOCK_C)


@triton.jit
def _locate(tile, channel_block, S, C, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles_per_group = tl.cdiv(S, BLOCK_S)
    group = tl.cast(tile // tiles_per_group, tl.int64)
    s0 = tl.cast(tile % tiles_per_group, tl.int64) * BLOCK_S
    c0 = tl.cast(channel_block, tl.int64) * BLOCK_C
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    c_inside = c < tl.minimum(C - c0, BLOCK_C).to(tl.int32)
    inside = by_position(positions_inside(tile, S, BLOCK_S), CHANNELS_LAST) & by_channel(c_inside, CHANNELS_LAST)
    if CHANNELS_LAST:
        start = (group * S + s0) * C + c0
        local = s[:, None] * C + c[None, :]
    else:
        start = (group * C + c0) * S + s0
        local = c[:, None] * S + s[None, :]
    return start, local, inside


@triton.jit
def pack_bits(flags):
    """Eight neighbours of the inner axis in one byte, the first in the lowest bit."""
    OUTER: tl.constexpr = flags.shape[0]
    INNER: tl.constexpr = flags.shape[1]
    bits = tl.reshape(flags.to(tl.int32), (OUTER, INNER // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """The inverse of ``pack_bits``."""
    OUTER: tl.constexpr = packed.shape[0]
    BYTES: tl.constexpr = packed.shape[1]
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (OUTER, BYTES * 8)) != 0


@triton.jit
def store(pointer, value, inside):
    """Stores ``value`` rounded to nearest in the pointer's dtype."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value.to(tl.float32))
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def channels_of(channel_block, C, BLOCK_C: tl.constexpr):
    """The channels of a block, and which of them exist."""
    c = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def locate_partials(first, c, c_inside, C, programs, PLANE: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets of partial results of channels ``c`` from the ``first`` on, which exist, whose they are and whether.

    Each program has one for every column of a channel.
    """
    entry = first + tl.arange(0, BLOCK_P)
    inside = entry < programs * PLANE
    at = (entry // PLANE * C * PLANE + entry % PLANE)[:, None] + c[None, :] * PLANE
    return at, inside[:, None] & c_inside[None, :], entry // PLANE, inside


@triton.jit
def load_rstd(norm, column, c_inside, EPS: tl.constexpr, FROZEN: tl.constexpr, tiling: tl.constexpr):
    """rstd of a block of columns."""
    r = tl.load(norm.rstd + column // tiling.PLANE, mask=c_inside, other=1).to(tiling.ACC)
    if FROZEN:
        r = 1 / tl.sqrt(r + EPS)
    return r


@triton.jit
def load_norm(norm, column, c_inside, EPS: tl.constexpr, FROZEN: tl.constexpr, tiling: tl.constexpr):
    """(mean, rstd, weight·rstd, bias) of a block of columns, over a tile."""
    c = column // tiling.PLANE
    m = tl.load(norm.mean + c, mask=c_inside, other=0).to(tiling.ACC)
    r = load_rstd(norm, column, c_inside, EPS, FROZEN, tiling)
    scale = r
    if norm.weight is not None:
        scale = r * tl.load(norm.weight + c, mask=c_inside, other=0).to(tiling.ACC)
    shift = tl.zeros_like(m)
    if norm.bias is not None:
        shift = tl.load(norm.bias + c, mask=c_inside, other=0).to(tiling.ACC)
    return (
        by_channel(m, tiling.CHANNELS_LAST),
        by_channel(r, tiling.CHANNELS_LAST),
        by_channel(scale, tiling.CHANNELS_LAST),
        by_channel(shift, tiling.CHANNELS_LAST),
    )


@triton.jit
def affine(centred, scale, shift):
    """weight·x̂ + bias. One fused multiply-add everywhere, so that a recomputed sign is the forward's own."""
    return tl.fma(centred, scale + tl.zeros_like(centred), shift + tl.zeros_like(centred))


@triton.jit
def count_tile(count, tile, walk, tiling: tl.constexpr):
    """Each position's number of values with one more tile, and the weight of that tile's value in their mean."""
    count += (positions_inside(tile, walk.S, tiling.BLOCK_S) & (tile < walk.tiles)).to(count.dtype)
    return count, by_position(1 / tl.where(count > 0, count, 1), tiling.CHANNELS_LAST)


@triton.jit
def welford(value, inside, share, mean, m2):
    """Each lane's running (mean, M2) with one more value, its ``share`` of them, in the lanes that are inside."""
    value = value.to(mean.dtype)
    delta = tl.where(inside, value - mean, 0)
    mean += delta * share
    m2 += delta * tl.where(inside, value - mean, 0)
    return mean, m2


@triton.jit
def merge_lanes(count, mean, m2, CHANNELS_LAST: tl.constexpr):
    """(count, mean, M2) of each channel from the lanes of a tile; ``count`` is by position.

    The mean is corrected by the mean of the deviations from it, which keeps it exact to rounding where mean >> std.
    """
    AXIS: tl.constexpr = 0 if CHANNELS_LAST else 1
    total = tl.sum(count)
    share = by_position(count, CHANNELS_LAST)
    centre = tl.sum(mean * share, axis=AXIS) / total
    centre += tl.sum((mean - by_channel(centre, CHANNELS_LAST)) * share, axis=AXIS) / total
    deviation = mean - by_channel(centre, CHANNELS_LAST)
    return total, centre, tl.sum(m2 + deviation * (deviation * share), axis=AXIS)
