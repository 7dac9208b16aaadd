"""What runs interleaved: schedules, the tickets around a number for each program, a node of each form."""

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
SHAPES = {"channels_last": (4, 20, 2, 5), "contiguous": (2, 10, 2, 5)}


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
            if is_last_to_arrive(counters, block, programs):
                p = tl.arange(0, P)
                values = tl.load(found + block * programs + p, mask=p < programs, other=0)
                tl.store(merged + block, tl.sum(values))
                open_second_phase(counters, block, channel_blocks)


def two_phases(programs, slice_blocks, channel_blocks):
    """What every program of the second phase has seen of the first."""
    grid = 2 * -(-channel_blocks // slice_blocks) * slice_blocks * programs
    found, seen = (torch.empty((channel_blocks, programs), dtype=torch.int32) for _ in range(2))
    merged = torch.empty(channel_blocks, dtype=torch.int32)
    counters = torch.zeros(1 + 2 * channel_blocks, dtype=torch.int32)
    _two_phases_kernel[(grid,)](found, merged, seen, counters, programs, slice_blocks, channel_blocks, 8)
    return seen


def node(form, shape, **options):
    """A problem of several channel blocks and of several programs for each. ``shape`` may be the name of a layout."""
    layout = shape if isinstance(shape, str) else "contiguous"
    shape = SHAPES.get(shape, shape)
    return problem(form, shape, torch.float32, torch.device("cpu"), layout=layout, **options)
