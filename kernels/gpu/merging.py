"""Partial results of a launch's programs, merged in a fixed order by the last program to arrive.

Where many programs share a block of channels, groups of them come first: the last of a group merges the group's results
into the place of its first program's, and the last group's merges those. So nobody reads hundreds one after the other.
Walked by columns, a channel may lie in several blocks: its results are merged when all of these have arrived.

``counters`` of who has arrived are zero when a launch begins and left so: one for each share of the channels that is
merged at a time, and behind them one for each group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from . import launch_table

_INTERPRETED = bool(knobs.runtime.interpret)


class Merging(NamedTuple):
    """How partial results are merged: so many columns a channel, results and channels side by side.

    Known to the compiler.
    """

    PLANE: Any
    BLOCK_P: Any
    BLOCK_C: Any
    ACC: Any


class Parts(NamedTuple):
    """Partial results to be merged: those of ``count`` programs, from ``first`` on, ``stride`` apart."""

    first: Any
    count: Any
    stride: Any


class Round(NamedTuple):
    """``arrivals`` at a ``counter``, of which the last merges ``parts`` of a ``share`` of the channels."""

    counter: Any
    arrivals: Any
    parts: Any
    share: Any


@triton.jit
def locate_parts(begin, parts, c, c_inside, C, merging: tl.constexpr):
    """Offsets of the next partial results of channels ``c``, which of them exist; whose they are, who of those exists.

    Each program has one for every column of a channel, of which there are ``C``.
    """
    entry = begin + tl.arange(0, merging.BLOCK_P)
    exists = entry < parts.count * merging.PLANE
    program = parts.first + entry // merging.PLANE * parts.stride
    at = (program * C + entry % merging.PLANE)[:, None] + c[None, :] * merging.PLANE
    return at, exists[:, None] & c_inside[None, :], program, exists


@triton.jit
def room_for_counters(walk, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, merging: tl.constexpr):
    """Counters of one norm's merges; it is walked in blocks of BLOCK_C columns."""
    shares = tl.cdiv(walk.C // merging.PLANE, merging.BLOCK_C)
    return shares + tl.cdiv(walk.C, BLOCK_C) * tl.cdiv(walk.programs, GROUP)


@triton.jit
def rounds_of(walk, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, merging: tl.constexpr):
    """The numbers of a program's rounds: from the first on, and up to which.

    Of its group and, if it was the last there, of all; by columns, of each share that its block has some of.
    """
    if merging.PLANE == 1:
        return tl.where(walk.programs > GROUP, 0, 1), 2
    else:
        COLUMNS: tl.constexpr = merging.BLOCK_C * merging.PLANE
        first = walk.channel_block * BLOCK_C
        return first // COLUMNS, tl.cdiv(tl.minimum(first + BLOCK_C, walk.C), COLUMNS)


@triton.jit
def is_final(number, merging: tl.constexpr):
    """Whether what is merged in a round is whole."""
    return number == 1 if merging.PLANE == 1 else True


@triton.jit
def round_of(counters, number, walk, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, merging: tl.constexpr):
    """A program's round of this number."""
    if merging.PLANE == 1:
        groups = tl.cdiv(walk.programs, GROUP)
        group = walk.program // GROUP
        if number == 0:
            at = tl.cdiv(walk.C, BLOCK_C) + walk.channel_block * groups + group
            first = group * GROUP
            count = tl.minimum(walk.programs - first, GROUP)
            stride = 1
        else:
            at = walk.channel_block
            first = 0
            count = tl.where(groups > 1, groups, walk.programs)
            stride = tl.where(groups > 1, GROUP, 1)
        return Round(counters + at, count, Parts(first, count, stride), walk.channel_block)
    else:
        COLUMNS: tl.constexpr = merging.BLOCK_C * merging.PLANE
        first_block = number * COLUMNS // BLOCK_C
        blocks = tl.cdiv(tl.minimum((number + 1) * COLUMNS, walk.C), BLOCK_C) - first_block
        return Round(counters + number, blocks * walk.programs, Parts(0, walk.programs, 1), number)


def counters_for(merge: launch_table.Merge, device: torch.device) -> Tensor:
    """Zeros for the merges of a launch, which leaves them zero.

    The launches of a stream follow each other, and share what was cleared once. A graph is replayed beside any stream:
    while one is captured, each launch has counters of its own, which every replay clears. So in the interpreter, where
    a launch may end before its end.
    """
    if _INTERPRETED or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(merge.counters, dtype=torch.int32, device=device)
    return _kept(device, driver.active.get_current_stream(device.index), launch_table.room(merge.counters))


@lru_cache(maxsize=128)
def _kept(device: torch.device, stream: int, count: int) -> Tensor:
    """``stream`` tells apart what may be used at one time."""
    return torch.zeros(count, dtype=torch.int32, device=device)
