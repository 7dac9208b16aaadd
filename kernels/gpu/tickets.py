"""Device functions that order the work of one launch: what a program does, what it waits for, what it tells others.

Each program takes a number. Work is handed out by it in the order S0, S1, N0, S2, N1, ..: the first phase (S) of a
slice of channel blocks, then the second (N) of the slice before. A second-phase program waits until the first phase of
its channel block has ended; everything it waits for holds a smaller number, so has started, and itself waits for
nothing: no deadlock, whatever the grid and the GPU.

``counters``, zero when the launch starts: the next number; for every channel block how many first-phase programs have
ended; and whether the last of them has published what they found.
"""

import triton
import triton.language as tl


@triton.jit
def take_turn(counters, programs, slice_blocks, channel_blocks):
    """(second phase?, channel block, number among the ``programs`` of that block) of this program's work."""
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    in_slice = programs * slice_blocks
    turn = ticket // in_slice
    slices = tl.cdiv(channel_blocks, slice_blocks)
    last = turn == 2 * slices - 1
    second = last | ((turn % 2 == 0) & (turn > 0))
    following = tl.where(last, slices - 1, tl.where(second, turn // 2 - 1, (turn + 1) // 2))
    within = ticket % in_slice
    return second, following * slice_blocks + within % slice_blocks, within // slice_blocks


@triton.jit
def is_last_to_arrive(counter, arrivals):
    """Publishes this program's stores; true in the last of so many to arrive, which then sees those of all.

    It leaves the counter zero, as it was: nobody else comes back to it in this launch.
    """
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == arrivals - 1
    tl.store(counter, 0, mask=is_last)
    return is_last


@triton.jit
def open_second_phase(counters, channel_block, channel_blocks):
    """Publishes this program's stores to the block's second phase."""
    tl.debug_barrier()
    tl.atomic_xchg(counters + 1 + channel_blocks + channel_block, 1, sem="release")


@triton.jit
def wait_for_second_phase(counters, channel_block, channel_blocks):
    """Returns once the block's second phase is open, with what was published before."""
    gate = counters + 1 + channel_blocks + channel_block
    while tl.atomic_add(gate, 0, sem="acquire") == 0:
        pass
