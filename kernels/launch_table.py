"""Block sizes, warps and grid sizes of every kernel, by layout and size. The one file to retune for a GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .geometry import Geometry


class Entry(NamedTuple):
    """elements: of a tile. inner: of them, side by side in memory. programs: at most in the grid. warps: of a program.

    The tile of a tensor with few rows is longer along the inner axis.
    """

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
        (2**22, Entry(1024, 64, 512, 4)), (2**24, Entry(1024, 64, 1152, 4)), (None, Entry(1024, 64, 2048, 4))
    ),
    ("statistics", False): (
        (2**22, Entry(1024, 64, 512, 4)), (2**24, Entry(2048, 64, 1152, 4)), (None, Entry(2048, 64, 2048, 4))
    ),
    ("normalise", True): ((None, Entry(2048, 64, 8192, 4)),),
    ("normalise", False): ((None, Entry(2048, 64, 8192, 4)),),
    ("reduce", True): ((2**22, Entry(1024, 64, 512, 4)), (None, Entry(2048, 64, 1024, 4))),
    ("reduce", False): ((2**22, Entry(1024, 64, 512, 4)), (None, Entry(2048, 64, 1024, 4))),
    ("apply", True): ((None, Entry(2048, 64, 8192, 4)),),
    ("apply", False): ((None, Entry(1024, 64, 8192, 4)),),
}  # fmt: skip
# Partial results of this many programs are merged side by side, for this many channels in a program.
MERGE = (128, 8)
MERGE_WARPS = 8


@lru_cache(maxsize=4096)
def streaming(kernel: str, g: Geometry) -> Launch:
    """The launch of a kernel that walks whole activations of geometry ``g``."""
    size = g.values * g.channels
    entry = next(e for limit, e in STREAMING[kernel, g.channels_last] if limit is None or size <= limit)
    outer = g.positions if g.channels_last else g.channels
    least_inner = entry.elements // _power_of_two(outer, 1, entry.elements)
    inner_block = _power_of_two(g.inner, 8, max(entry.inner, least_inner))
    outer_block = _power_of_two(outer, 1, entry.elements // inner_block)
    positions, channels = (outer_block, inner_block) if g.channels_last else (inner_block, outer_block)
    channel_blocks = -(-g.channels // channels)
    tiles = g.groups * -(-g.positions // positions)
    programs = min(tiles, max(1, entry.programs // channel_blocks))
    return Launch(positions, channels, channel_blocks, programs, entry.warps)


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
