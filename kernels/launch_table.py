"""Block sizes, warps and grid sizes of every kernel, by layout and size. The one file to retune for a GPU."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .geometry import Geometry


class Entry(NamedTuple):
    """elements: of a tile. inner: those side by side in memory. programs: at most in the grid. warps: of a program."""

    elements: int
    inner: int
    programs: int
    warps: int


class Launch(NamedTuple):
    block_positions: int
    block_channels: int
    channel_blocks: int
    programs: int
    warps: int
    channel_major: bool

    @property
    def grid(self) -> tuple[int]:
        """One axis only: the others end at 65535."""
        return (self.channel_blocks * self.programs,)


class MergeLaunch(NamedTuple):
    block_programs: int
    block_channels: int
    channel_blocks: int
    warps: int


# (kernel, channels_last) -> entries by the largest number of elements they serve; the last serves the rest.
# Loads in flight set the sizes: as many elements a thread as registers allow for the programs that share a
# multiprocessor to have 32 KiB on their way. The statistics have two tiles on theirs. Short rows fit planes that are
# no power of two. More programs mean more partial results, which must stay small beside the tensor.
STREAMING: dict[tuple[str, bool], tuple[tuple[int | None, Entry], ...]] = {
    ("statistics", True): (
        (2**22, Entry(1024, 64, 512, 4)), (2**24, Entry(1024, 64, 1176, 4)), (None, Entry(1024, 64, 2048, 4))
    ),
    ("statistics", False): (
        (2**22, Entry(1024, 64, 512, 4)), (2**24, Entry(2048, 64, 1176, 4)), (None, Entry(2048, 64, 2048, 4))
    ),
    ("normalise", True): ((None, Entry(2048, 64, 8192, 4)),),
    ("normalise", False): ((None, Entry(2048, 64, 8192, 4)),),
    ("reduce", True): ((2**22, Entry(1024, 64, 512, 4)), (None, Entry(2048, 64, 1024, 4))),
    ("reduce", False): ((2**22, Entry(1024, 64, 512, 4)), (None, Entry(2048, 64, 1024, 4))),
    ("apply", True): ((None, Entry(2048, 64, 8192, 4)),),
    ("apply", False): ((None, Entry(1024, 64, 8192, 4)),),
}  # fmt: skip
# The second phase begins with the tiles that the first ended with, and lets go of what is read for the last time.
SECOND_PHASE_REVERSED = True
SECOND_PHASE_EVICTS_FIRST = True
# Whether separate launches go through a channels_last tensor block of channels by block of channels, not row by row,
# where a block, in the precision of the arithmetic, is no larger than this. Rows, until a GPU has compared them.
CHANNEL_MAJOR = False
CHANNEL_MAJOR_BYTES = 16 * 2**20
# Whether a training node takes one launch a direction, ordered by tickets, or three. Three until a GPU has run the one.
ONE_LAUNCH = os.environ.get("RESFUSED_ONE_LAUNCH", "0") == "1"
# (kernel, channels_last) -> the tile; programs: at most in one phase of a slice.
TICKETED: dict[tuple[str, bool], Entry] = {
    ("forward", True): Entry(1024, 64, 512, 4),
    ("forward", False): Entry(1024, 64, 512, 4),
    ("backward", True): Entry(1024, 64, 512, 4),
    ("backward", False): Entry(1024, 64, 512, 4),
}
# A contiguous tensor is walked by columns where it has so many images, and planes that fill their tiles worse than this
# or are not made of whole 16 bytes in half precision.
COLUMNS_LEAST_IMAGES = 32
COLUMNS_MOST_FILLED = 0.9
# Of the L2 cache, what two slices may take: one between its phases, and the next one's first.
L2_SHARE = 0.8
# The narrowest slice of a channels_last tensor, in bytes.
LEAST_SLICE = 64
# Without a GPU to ask: an H100's.
L2_BYTES = 50 * 2**20
# Partial results of this many programs are merged side by side, for this many channels in a program.
MERGE = (128, 8)
MERGE_WARPS = 8
# The same within a one-launch kernel, whose channels are the tile's: programs times channels.
MERGED_ELEMENTS = 2048


def takes_one_launch(g: Geometry) -> bool:
    """Whether a training node is one launch a direction: not by columns, where a block of them may cut a channel."""
    return ONE_LAUNCH and g.plane == 1


def walks_columns(images: int, plane: int) -> bool:
    """Whether a contiguous tensor's planes are too small to be walked one by one."""
    if images < COLUMNS_LEAST_IMAGES:
        return False
    row = STREAMING["normalise", False][-1][1].inner
    return plane % 8 != 0 or plane < COLUMNS_MOST_FILLED * row * -(-plane // row)


@lru_cache(maxsize=4096)
def streaming(kernel: str, g: Geometry, wide: bool = False) -> Launch:
    """The launch of a kernel that walks whole activations of geometry ``g``; ``wide`` for arithmetic in float64."""
    size = g.numel
    entry = next(e for limit, e in STREAMING[kernel, g.channels_last] if limit is None or size <= limit)
    positions, channels = _tile(g, entry.elements // 2 if wide else entry.elements, entry.inner)
    channel_blocks = -(-g.columns // channels)
    tiles = g.groups * -(-g.positions // positions)
    # The nearest to the entry's: one more or less for each of many blocks is half the grid.
    programs = min(tiles, max(1, (2 * entry.programs + channel_blocks) // (2 * channel_blocks)))
    block_bytes = g.numel // channel_blocks * (8 if wide else 4)
    channel_major = CHANNEL_MAJOR and g.channels_last and block_bytes <= CHANNEL_MAJOR_BYTES
    return Launch(positions, channels, channel_blocks, programs, entry.warps, channel_major)


class OneLaunch(NamedTuple):
    """slice_blocks: channel blocks of a slice. programs: of a channel block, in either phase."""

    block_positions: int
    block_channels: int
    block_programs: int
    channel_blocks: int
    slice_blocks: int
    programs: int
    warps: int

    @property
    def grid(self) -> tuple[int]:
        slices = -(-self.channel_blocks // self.slice_blocks)
        return (2 * slices * self.slice_blocks * self.programs,)

    @property
    def counters(self) -> int:
        """One for the tickets, two for each channel block."""
        return 1 + 2 * self.channel_blocks


@lru_cache(maxsize=4096)
def ticketed(kernel: str, g: Geometry, reread: int, l2_bytes: int) -> OneLaunch:
    """The one launch of a direction; ``reread``: the bytes of each element that its second phase reads again."""
    entry = TICKETED[kernel, g.channels_last]
    fitting = int(l2_bytes * L2_SHARE) // (2 * g.values * reread)
    inner = entry.inner
    if g.channels_last and fitting < inner and fitting * reread >= LEAST_SLICE:
        inner = max(LEAST_SLICE // reread, 1 << (fitting.bit_length() - 1))
    positions, channels = _tile(g, entry.elements, inner)
    channel_blocks = -(-g.columns // channels)
    # Where not even one block fits, a single slice: both phases whole, one after the other.
    slice_blocks = min(fitting // channels, channel_blocks) or channel_blocks
    tiles = g.groups * -(-g.positions // positions)
    programs = min(tiles, max(1, entry.programs // slice_blocks))
    block_programs = _power_of_two(programs, 1, max(1, MERGED_ELEMENTS // channels))
    return OneLaunch(positions, channels, block_programs, channel_blocks, slice_blocks, programs, entry.warps)


@lru_cache(maxsize=16)
def l2_bytes(device: torch.device) -> int:
    """The size of a device's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_BYTES


def _tile(g: Geometry, elements: int, inner: int) -> tuple[int, int]:
    """(positions, channels) of a tile; that of a tensor with few rows is longer along the inner axis."""
    outer = g.positions if g.channels_last else g.columns
    least_inner = elements // _power_of_two(outer, 1, elements)
    inner_block = _power_of_two(g.inner, 8, max(inner, least_inner))
    outer_block = _power_of_two(outer, 1, elements // inner_block)
    return (outer_block, inner_block) if g.channels_last else (inner_block, outer_block)


@lru_cache(maxsize=4096)
def merge(programs: int, channels: int) -> MergeLaunch:
    """The launch that merges the partial results of ``programs`` programs."""
    most_programs, most_channels = MERGE
    block_channels = _power_of_two(channels, 1, most_channels)
    block_programs = _power_of_two(programs, 1, most_programs)
    return MergeLaunch(block_programs, block_channels, -(-channels // block_channels), MERGE_WARPS)


def _power_of_two(extent: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``extent``, within [least, most]."""
    return max(least, min(most, 1 << (extent - 1).bit_length()))
