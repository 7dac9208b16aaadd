"""Device functions on one tile: which it is, where it lies, its ReLU bits, its norm, its statistics.

A tile has an outer and an inner axis, the inner one contiguous in memory: (positions, channels) for a channels_last
tensor, (channels, positions) for a contiguous one. ``CHANNELS_LAST`` says which; everything else is shared.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs


class Tiling(NamedTuple):
    """How an activation is cut into tiles, and how they are worked on. Known to the compiler.

    WIDE: offsets within a tile need 64 bits. ACC: the dtype of the arithmetic. STAGES: tiles of which one is worked on
    while the others are on their way.
    """

    CHANNELS_LAST: Any
    PLANE: Any
    BLOCK_S: Any
    BLOCK_C: Any
    WIDE: Any
    ACC: Any
    STAGES: Any


class Walk(NamedTuple):
    """A program's work: of a block of channels every ``programs``-th of ``tiles``, from number ``program`` on.

    A tile is one of ``blocks`` of positions of one of ``groups``. S, C: positions and columns of each group. stride:
    from one tile to the next.
    """

    channel_block: Any
    program: Any
    programs: Any
    groups: Any
    blocks: Any
    tiles: Any
    stride: Any
    S: Any
    C: Any


class Stride(NamedTuple):
    """How many groups and blocks on a program's next tile or step lies, carried where a group has no more blocks."""

    groups: Any
    blocks: Any
    in_group: Any


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


class TileNorm(NamedTuple):
    """What ``NormVectors`` points at, over a tile; scale: weight·rstd, shift: the bias. All None for no norm."""

    mean: Any
    rstd: Any
    scale: Any
    shift: Any


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
def walk_of(channel_block, program, programs, G, S, C, tiling: tl.constexpr):
    """The walk of a program over what (G, S, C) says of an activation."""
    blocks = tl.cast(tl.cdiv(S, tiling.BLOCK_S), tl.int32)
    stride = stride_of(programs, blocks, tiling.CHANNELS_LAST)
    return Walk(channel_block, program, programs, G, blocks, G * blocks, stride, S, C)


@triton.jit
def stride_of(programs, blocks, CHANNELS_LAST: tl.constexpr):
    """The stride of a program among so many, over groups of so many blocks; a channels_last tensor has one group."""
    if CHANNELS_LAST:
        return Stride(0, programs, blocks)
    else:
        return Stride(programs // blocks, programs % blocks, blocks)


@triton.jit
def first_walk(number, numbers, G, S, C, CHANNEL_MAJOR: tl.constexpr, tiling: tl.constexpr):
    """What program ``number`` does of a first phase. Neighbours share rows, or CHANNEL_MAJOR a channel block."""
    channel_blocks = tl.cdiv(C, tiling.BLOCK_C)
    programs = numbers // channel_blocks
    if CHANNEL_MAJOR:
        return walk_of(number // programs, number % programs, programs, G, S, C, tiling)
    else:
        return walk_of(number % channel_blocks, number // channel_blocks, programs, G, S, C, tiling)


@triton.jit
def second_walk(G, S, C, CHANNEL_MAJOR: tl.constexpr, REVERSED: tl.constexpr, tiling: tl.constexpr):
    """As ``first_walk``, for the second phase: REVERSED, it begins with the block that the first ended with."""
    walk = first_walk(tl.program_id(0), tl.num_programs(0), G, S, C, CHANNEL_MAJOR, tiling)
    channel_block = walk.channel_block
    if REVERSED and CHANNEL_MAJOR:
        channel_block = tl.cdiv(C, tiling.BLOCK_C) - 1 - channel_block
    return walk_of(channel_block, walk.program, walk.programs, G, S, C, tiling)


@triton.jit
def first_place(program, blocks, CHANNELS_LAST: tl.constexpr):
    """The group and the block of positions of a program's first tile."""
    if CHANNELS_LAST:
        return tl.cast(0, tl.int32), program
    else:
        return program // blocks, program % blocks


@triton.jit
def next_place(group, block, stride, CHANNELS_LAST: tl.constexpr):
    """Those of its next. A sum and a carry: a division for every tile would hold up its loads."""
    block += stride.blocks
    if not CHANNELS_LAST:
        carries = block >= stride.in_group
        block = tl.where(carries, block - stride.in_group, block)
        group += stride.groups + carries.to(tl.int32)
    return group, block


@triton.jit
def in_order(group, block, walk, REVERSED: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where a tile lies. From the last to the first, a walk begins with what the one before it has left in cache."""
    if REVERSED:
        block = walk.blocks - 1 - block
        if not CHANNELS_LAST:
            group = walk.groups - 1 - group
    return group, block


@triton.jit
def inside_block(block, extent, BLOCK: tl.constexpr):
    """Which elements of a block of an axis exist."""
    left = extent - tl.cast(block, tl.int64) * BLOCK
    return tl.arange(0, BLOCK) < tl.minimum(left, BLOCK).to(tl.int32)


@triton.jit
def within_tile(S, C, CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """The offsets of a tile's elements from its first, in 32 bits or where WIDE in 64."""
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    if WIDE:
        s = s.to(tl.int64)
        c = c.to(tl.int64)
    if CHANNELS_LAST:
        return s[:, None] * C + c[None, :]
    else:
        return c[:, None] * S + s[None, :]


@triton.jit
def locate(group, block, walk, tiling: tl.constexpr):
    """The 64-bit offset of a tile's first element, the offsets of the others from it, which are inside."""
    return _locate(
        group, block, walk.blocks, walk.channel_block, walk.S, walk.C,
        tiling.CHANNELS_LAST, tiling.BLOCK_S, tiling.BLOCK_C, tiling.WIDE,
    )  # fmt: skip


@triton.jit
def locate_bits(group, block, walk, tiling: tl.constexpr):
    """As ``locate``, for the tile's bytes in a mask whose inner axis is packed by eight."""
    if tiling.CHANNELS_LAST:
        return _locate(
            group, block, walk.blocks, walk.channel_block, walk.S, tl.cdiv(walk.C, 8),
            True, tiling.BLOCK_S, tiling.BLOCK_C // 8, tiling.WIDE,
        )  # fmt: skip
    else:
        return _locate(
            group, block, walk.blocks, walk.channel_block, tl.cdiv(walk.S, 8), walk.C,
            False, tiling.BLOCK_S // 8, tiling.BLOCK_C, tiling.WIDE,
        )  # fmt: skip


@triton.jit
def _locate(
    group, block, blocks, channel_block, S, C,
    CHANNELS_LAST: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    s0 = tl.cast(block, tl.int64) * BLOCK_S
    c0 = tl.cast(channel_block, tl.int64) * BLOCK_C
    # What is the same for every tile stands alone.
    start = c0 + s0 * C if CHANNELS_LAST else c0 * S + tl.cast(group, tl.int64) * (tl.cast(C, tl.int64) * S) + s0
    # Only the last block may end beyond the last position.
    left = tl.cast(S - tl.cast(blocks - 1, tl.int64) * BLOCK_S, tl.int32)
    s_inside = tl.arange(0, BLOCK_S) < tl.where(block == blocks - 1, left, BLOCK_S)
    inside = by_position(s_inside, CHANNELS_LAST) & by_channel(inside_block(channel_block, C, BLOCK_C), CHANNELS_LAST)
    return start, within_tile(S, C, CHANNELS_LAST, BLOCK_S, BLOCK_C, WIDE), inside


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
def load_rstd(norm, column, c_inside, EPS: tl.constexpr, FROZEN: tl.constexpr, tiling: tl.constexpr):
    """rstd of a block of columns."""
    r = tl.load(norm.rstd + column // tiling.PLANE, mask=c_inside, other=1).to(tiling.ACC)
    if FROZEN:
        r = 1 / tl.sqrt(r + EPS)
    return r


@triton.jit
def load_norm(norm, column, c_inside, EPS: tl.constexpr, FROZEN: tl.constexpr, tiling: tl.constexpr):
    """The norm of a block of columns."""
    c = column // tiling.PLANE
    m = tl.load(norm.mean + c, mask=c_inside, other=0).to(tiling.ACC)
    r = load_rstd(norm, column, c_inside, EPS, FROZEN, tiling)
    scale = r
    if norm.weight is not None:
        scale = r * tl.load(norm.weight + c, mask=c_inside, other=0).to(tiling.ACC)
    shift = tl.zeros_like(m)
    if norm.bias is not None:
        shift = tl.load(norm.bias + c, mask=c_inside, other=0).to(tiling.ACC)
    return TileNorm(
        by_channel(m, tiling.CHANNELS_LAST),
        by_channel(r, tiling.CHANNELS_LAST),
        by_channel(scale, tiling.CHANNELS_LAST),
        by_channel(shift, tiling.CHANNELS_LAST),
    )


@triton.jit
def affine(centred, scale, shift):
    """weight·x̂ + bias. One fused multiply-add everywhere, so that a recomputed sign is the forward's own."""
    return tl.fma(centred, tl.broadcast_to(scale, centred.shape), tl.broadcast_to(shift, centred.shape))


@triton.jit
def welford(value, s_inside, count, mean, m2, CHANNELS_LAST: tl.constexpr):
    """Each lane's (count, mean, M2) with one more value, in the positions that are inside; ``count`` is by position."""
    count += s_inside.to(count.dtype)
    inside = by_position(s_inside, CHANNELS_LAST)
    delta = tl.where(inside, value - mean, 0)
    mean += delta * by_position(1 / tl.where(count > 0, count, 1), CHANNELS_LAST)
    m2 += delta * tl.where(inside, value - mean, 0)
    return count, mean, m2


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
