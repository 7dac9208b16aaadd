"""Block sizes, warps and grid sizes of every kernel, by layout and size, from the table in ``launch_table.json``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch

from ..geometry import Geometry
from . import launch_file
from .launch_file import Entry as Entry


class Merge(NamedTuple):
    """How a launch's last programs merge what all have found. channels: of a share, which one of them merges.

    elements: partial results side by side. counters: of who has arrived.
    """

    channels: int
    elements: int
    counters: int


class Launch(NamedTuple):
    """programs: of a channel block. merge: of what they find, where they do. activations: walked side by side, each in
    a part of the grid.
    """

    block_positions: int
    block_channels: int
    channel_blocks: int
    programs: int
    warps: int
    stages: int
    channel_major: bool
    merge: Merge
    activations: int = 1

    @property
    def grid(self) -> tuple[int]:
        """One axis only: the others end at 65535."""
        return (self.activations * self.channel_blocks * self.programs,)


# What is tuned; ``launch_file.Table`` says what each is.
_TUNED = launch_file.read()
STREAMING = _TUNED.streaming
TICKETED = _TUNED.ticketed
SECOND_PHASE_REVERSED = _TUNED.second_phase_reversed
SECOND_PHASE_EVICTS_FIRST = _TUNED.second_phase_evicts_first
CHANNEL_MAJOR = _TUNED.channel_major
# In the precision of the arithmetic, the largest block of channels for CHANNEL_MAJOR.
CHANNEL_MAJOR_BYTES = 16 * 2**20
# Every training node takes one launch a direction, or none does.
EVERY_NODE: dict[tuple[str, bool], int | None] = dict.fromkeys(TICKETED, None)
NO_NODE: dict[tuple[str, bool], int | None] = dict.fromkeys(TICKETED, 0)
_ASKED = os.environ.get("RESFUSED_ONE_LAUNCH")
if _ASKED not in (None, "0", "1"):
    raise ValueError(f"RESFUSED_ONE_LAUNCH must be 0 or 1, or not be set, but is {_ASKED!r}")
ONE_LAUNCH_ELEMENTS = {None: _TUNED.one_launch_elements, "0": NO_NODE, "1": EVERY_NODE}[_ASKED]
# Of the L2 cache, what two slices may take: one between its phases, and the next one's first.
L2_SHARE = 0.8
# The narrowest slice of a channels_last tensor, in bytes.
LEAST_SLICE = 64
# Without a GPU to ask: an H100's.
L2_BYTES = 50 * 2**20
MULTIPROCESSORS = 132
# What beginning a program costs, in steps: its vectors over channels, and its first loads, which nothing hides.
BEGINNING = 2
# Waves of programs that a grid may have beyond the least, and how full the last should be.
MORE_WAVES = 8
LEAST_FILLED = 0.9
# Partial results that are merged side by side, programs times channels: few, whose registers every program holds.
MERGED_ELEMENTS = 1024
# Where a channel block has more programs than this, groups of so many merge what they have found first.
MERGED_PROGRAMS = 32
# A stream's counters: at least so many, for most launches the same.
LEAST_COUNTERS = 1024


_Function = TypeVar("_Function", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(function: _Function) -> _Function:
    """Remembers what a function makes of the table, until ``using`` puts another in force."""
    _caches.append(lru_cache(maxsize=4096)(function))
    return _caches[-1]


@contextmanager
def using(**constants: Any) -> Iterator[None]:
    """Other values of this module's constants in force within it: ``**Table.constants``, or some of them by name."""
    before = {name: globals()[name] for name in constants}
    try:
        _put_in_force(constants)
        yield
    finally:
        _put_in_force(before)


def _put_in_force(constants: dict[str, Any]) -> None:
    globals().update(constants)
    for cache in _caches:
        cache.cache_clear()


def takes_one_launch(direction: str, g: Geometry) -> bool:
    """Whether a training node's "forward" or "backward" is one launch, ordered by tickets, and not two.

    Never by columns, where a block of them may cut a channel.
    """
    most = ONE_LAUNCH_ELEMENTS[direction, g.channels_last]
    return g.plane == 1 and (most is None or g.numel <= most)


@cached
def streaming(
    kernel: str,
    g: Geometry,
    wide: bool = False,
    norms: int = 1,
    multiprocessors: int | None = None,
    forked: bool = False,
) -> Launch:
    """The launch of a kernel that walks whole activations of geometry ``g``; ``wide`` for arithmetic in float64.

    Of two ``norms`` the statistics are taken side by side; elsewhere they share a tile, of half the elements for their
    vectors. Where a ``forked`` output's second gradient comes on top, those of apply over channels_last take another
    half, and half as many programs again have room, whose loads are in flight; the addresses of the statistics' loads
    take a half where those are narrow. For so many ``multiprocessors``, or without a number MULTIPROCESSORS.
    """
    size = g.numel
    entry = next(e for limit, e in STREAMING[kernel, g.channels_last] if limit is None or size <= limit)
    activations = norms if kernel == "statistics" else 1
    elements = entry.elements // (2 if wide else 1) // (norms // activations)
    resident = (multiprocessors or MULTIPROCESSORS) * entry.programs
    if forked and norms == 2 and kernel == "apply" and g.channels_last:
        elements //= 2
        resident += 0 if wide else resident // 2
    if kernel == "statistics" and not wide and g.inner % 8 != 0:
        elements //= 2
    positions, channels = _tile(g, elements, entry.inner)
    channel_blocks = -(-g.columns // channels)
    programs = _programs(_steps(kernel, g, positions), activations * channel_blocks, resident)
    block_bytes = g.numel // channel_blocks * (8 if wide else 4)
    channel_major = CHANNEL_MAJOR and g.channels_last and block_bytes <= CHANNEL_MAJOR_BYTES
    merge = _merge(g, channels, programs, wide, activations)
    return Launch(
        positions, channels, channel_blocks, programs, entry.warps, entry.stages, channel_major, merge, activations
    )  # fmt: skip


def _merge(g: Geometry, columns: int, programs: int, wide: bool, activations: int) -> Merge:
    """Of so many programs for each block of ``columns``, which a share of the channels is or covers."""
    channels = _power_of_two(-(-columns // g.plane), 1, columns)
    elements = max(MERGED_ELEMENTS // (2 if wide else 1), columns)
    groups = -(-g.columns // columns) * -(-programs // MERGED_PROGRAMS)
    return Merge(channels, elements, activations * (-(-g.channels // channels) + groups))


def room(counters: int) -> int:
    """How many counters are kept where so many are needed."""
    return _power_of_two(counters, LEAST_COUNTERS, 2**31)


def takes_groups(g: Geometry) -> bool:
    """Whether the statistics take four groups a step, whose tiles end alike, and not four tiles of one group."""
    return not g.channels_last and g.groups % 4 == 0


def needs_wide_offsets(g: Geometry, positions: int, channels: int) -> bool:
    """Whether a tile spans 2^31 elements or more."""
    outer, inner, stride = (positions, channels, g.columns) if g.channels_last else (channels, positions, g.positions)
    return (outer - 1) * stride + inner > 2**31


def _steps(kernel: str, g: Geometry, positions: int) -> int:
    """Steps that a walk over a block of channels has: tiles, or for the statistics four at a time, ragged ones too."""
    if kernel not in ("statistics", "forward"):
        return g.groups * -(-g.positions // positions)
    if takes_groups(g):
        return g.groups // 4 * -(-g.positions // positions)
    return g.groups * -(-g.positions // (4 * positions))


def _programs(steps: int, blocks: int, resident: int) -> int:
    """Programs of each of the ``blocks``: with waves well filled, those that take the least time, counted in steps."""

    def cost(programs: int) -> tuple[bool, int, float]:
        waves = -(-programs * blocks // resident)
        filled = programs * blocks / (waves * resident)
        return filled < LEAST_FILLED, waves * (-(-steps // programs) + BEGINNING), -filled

    least = -(-blocks // resident)
    waves = range(least, least + MORE_WAVES)
    return min({min(steps, each * resident // blocks) for each in waves}, key=cost)


class OneLaunch(NamedTuple):
    """slice_blocks: channel blocks of a slice. programs: of a channel block, in either phase."""

    block_positions: int
    block_channels: int
    block_programs: int
    channel_blocks: int
    slice_blocks: int
    programs: int
    warps: int
    stages: int

    @property
    def grid(self) -> tuple[int]:
        slices = -(-self.channel_blocks // self.slice_blocks)
        return (2 * slices * self.slice_blocks * self.programs,)

    @property
    def counters(self) -> int:
        """One for the tickets, two for each channel block."""
        return 1 + 2 * self.channel_blocks


@cached
def ticketed(kernel: str, g: Geometry, reread: int, l2_bytes: int, multiprocessors: int | None = None) -> OneLaunch:
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
    resident = (multiprocessors or MULTIPROCESSORS) * entry.programs
    programs = min(_steps(kernel, g, positions), max(1, resident // slice_blocks))
    block_programs = _power_of_two(programs, 1, max(1, MERGED_ELEMENTS // channels))
    return OneLaunch(
        positions, channels, block_programs, channel_blocks, slice_blocks, programs, entry.warps, entry.stages
    )


@cached
def l2_bytes(device: torch.device) -> int:
    """The size of a device's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_BYTES


@cached
def multiprocessors(device: torch.device) -> int:
    """How many a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


def _tile(g: Geometry, elements: int, inner: int) -> tuple[int, int]:
    """(positions, channels) of a tile; that of a tensor with few rows is longer along the inner axis."""
    outer = g.positions if g.channels_last else g.columns
    least_inner = elements // _power_of_two(outer, 1, elements)
    inner_block = _power_of_two(g.inner, 8, max(inner, least_inner))
    outer_block = _power_of_two(outer, 1, elements // inner_block)
    return (outer_block, inner_block) if g.channels_last else (inner_block, outer_block)


def _power_of_two(extent: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``extent``, within [least, most]."""
    return max(least, min(most, 1 << (extent - 1).bit_length()))
