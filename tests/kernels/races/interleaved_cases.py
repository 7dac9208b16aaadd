"""What runs interleaved: schedules, the tickets around a number for each program, a node of each form."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from oracle import problem
from resfused.kernels.gpu.tickets import is_last_to_arrive, open_second_phase, take_turn, wait_for_second_phase
from scheduler import Schedule

SCHEDULES = (
    Schedule("oldest", 1),
    Schedule("newest", 3, "backward"),
    Schedule("random", None, "shuffled", 1),
    Schedule("priorities", 5, "shuffled", 2),
)
SHAPES = {"channels_last": (2, 20, 3, 3), "contiguous": (3, 6, 2, 5)}
# So many programs for each channel block that they merge in groups.
SHAPES_IN_GROUPS = {"channels_last": (4, 20, 5, 4), "contiguous": (3, 6, 8, 10)}
BY_COLUMNS = (17, 3, 3, 3)


@triton.jit
def _two_phases_kernel(found, merged, seen, counters, programs, slice_blocks, channel_blocks, P: tl.constexpr):
    """What the one-launch kernels do, with a number for a tile."""
    is_second, block, program = take_turn(counters, programs, slice_blocks, channel_blocks)
    if block < channel_blocks:
        if is_second:
            wait_for_second_phase(counters, block, channel_blocks)
            tl.store(seen + block * programs + program, tl.load(merged + block))
        else:
            tl.store(found + block * programs + program, program + 1)
            if is_last_to_arrive(counters + 1 + block, programs):
                p = tl.arange(0, P)
                values = tl.load(found + block * programs + p, mask=p < programs, other=0)
                tl.store(merged + block, tl.sum(values))
                open_second_phase(counters, block, channel_blocks)


def two_phases(programs, slice_blocks, channel_blocks):
    """What every program of the second phase has seen of the first."""
    grid = 2 * -(-channel_blocks // slice_blocks) * slice_blocks * programs
    found, seen = (torch.empty((channel_blocks, programs), dtype=torch.int32) for _ in range(2))
    merged = torch.empty(channel_blocks, dtype=torch.int32)
    counters = found.new_zeros(1 + 2 * channel_blocks)
    _two_phases_kernel[(grid,)](found, merged, seen, counters, programs, slice_blocks, channel_blocks, 8)
    return seen


@contextmanager
def kept_zeros() -> Iterator[dict[int, torch.Tensor]]:
    """Zeros that a launch asks for are kept for the next, as on a GPU: it has to leave them zero. By their number."""
    zeros, kept = torch.zeros, {}

    def once(count, **options):
        if count not in kept:
            kept[count] = zeros(count, **options)
        return kept[count]

    with patch.object(torch, "zeros", once):
        yield kept


def node(form, shape, shapes=SHAPES, **options):
    """A problem of several channel blocks and of several programs for each. ``shape`` may be the name of a layout."""
    layout = shape if isinstance(shape, str) else "contiguous"
    shape = shapes.get(shape, shape)
    return problem(form, shape, torch.float32, torch.device("cpu"), layout=layout, **options)
