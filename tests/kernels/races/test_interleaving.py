"""The scheduler and the detector, on kernels of a few lines: what is in order, what races, what waits for ever."""

import pytest
import torch
import triton
import triton.language as tl
from interleaving import interleaved
from scheduler import DISPATCHES, PICKS, DeadlockError, Schedule

pytestmark = pytest.mark.interpreter


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@triton.jit
def _message_kernel(
    data, flag, out, BARRIER: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr, SCOPE: tl.constexpr
):  # fmt: skip
    """The first program tells the second."""
    if tl.program_id(0) == 0:
        tl.store(data, 7)
        if BARRIER:
            tl.debug_barrier()
        tl.atomic_xchg(flag, 1, sem=SEND, scope=SCOPE)
    else:
        while tl.atomic_add(flag, 0, sem=RECEIVE) == 0:
            pass
        tl.store(out, tl.load(data))


def message(schedule, barrier=True, send="release", receive="acquire", scope="gpu"):
    data, out = torch.empty(1, dtype=torch.int32), integers(1)
    with interleaved(schedule) as log:
        _message_kernel[(2,)](data, integers(1), out, barrier, send, receive, scope)
    assert out.item() == 7
    return log.kinds


@pytest.mark.parametrize("pick", PICKS)
def test_a_message_is_in_order_or_a_race(pick):
    for seed, dispatch in enumerate(DISPATCHES):
        schedule = Schedule(pick, None, dispatch, seed)
        assert message(schedule) == set()
        assert message(schedule, send="acq_rel", receive="acq_rel") == set()
        assert message(schedule, scope="sys") == set()
        for broken in (
            {"send": "relaxed"}, {"send": "acquire"}, {"receive": "relaxed"}, {"receive": "release"},
            {"barrier": False}, {"scope": "cta"},
        ):  # fmt: skip
            assert message(schedule, **broken) == {"race"}, broken


def test_a_program_that_is_not_resident_cannot_be_waited_for():
    with pytest.raises(
        DeadlockError, match=r"_message_kernel: all of 1 resident programs spin, at test_interleaving.py:\d+"
    ):
        message(Schedule(resident=1, dispatch="backward"))
    assert message(Schedule(resident=2, dispatch="backward")) == set()


@triton.jit
def _relay_kernel(data, flag, out, CLEAR: tl.constexpr):
    """The first program tells the last; those between touch the flag on the way."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(data, 7)
        tl.debug_barrier()
        tl.atomic_add(flag, 1, sem="release")
    elif program < tl.num_programs(0) - 1:
        while tl.atomic_add(flag, 0, sem="relaxed") != program:
            pass
        if CLEAR:
            tl.store(flag, program + 1)
        else:
            tl.atomic_add(flag, 1, sem="relaxed")
    else:
        while tl.atomic_add(flag, 0, sem="relaxed") != program:
            pass
        tl.atomic_add(flag, 0, sem="acquire")
        tl.store(out, tl.load(data))


@pytest.mark.parametrize("pick", PICKS)
def test_a_release_goes_through_atomics_and_ends_with_a_store(pick):
    for clear, expected in ((False, set()), (True, {"data", "flag"})):
        with interleaved(Schedule(pick)) as log:
            _relay_kernel[(4,)](torch.empty(1), integers(1), torch.zeros(1), clear)
        assert {finding.argument for finding in log.findings} == expected


@triton.jit
def _arrive_kernel(counter, lasts, SEM: tl.constexpr, RESET: tl.constexpr):
    """The last to arrive says so, and leaves the counter as it was found."""
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        if RESET:
            tl.store(counter, 0)
        tl.atomic_add(lasts, 1, sem="relaxed")


@pytest.mark.parametrize("pick", PICKS)
def test_the_last_to_arrive_may_reset_the_counter_that_it_has_acquired(pick):
    """And has to: in a second launch on the same counter nobody is the last else."""
    for sem, reset, expected in (
        ("acq_rel", True, set()), ("acq_rel", False, set()), ("relaxed", True, {"race"}), ("release", True, {"race"}),
    ):  # fmt: skip
        counter, lasts = integers(1), integers(1)
        for _ in range(2):
            with interleaved(Schedule(pick, 3, "shuffled")) as log:
                _arrive_kernel[(5,)](counter, lasts, sem, reset)
            assert log.kinds == expected
        assert (counter.item(), lasts.item()) == ((0, 2) if reset else (10, 1))


@triton.jit
def _copy_kernel(source, target, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < n), mask=i < n)


def test_overlapping_stores_race_and_touching_ones_do_not():
    for step, expected in ((4, set()), (3, {"race"})):
        with interleaved(Schedule()) as log:
            _copy_kernel[(3,)](torch.ones(10), torch.empty(10), 10, step, 4)
        assert log.kinds == expected


def test_views_of_one_storage_are_one_memory():
    """Under whatever names and dtypes they come."""
    memory = torch.ones(24)
    for offset, expected in ((12, set()), (11, {"race"})):
        with interleaved(Schedule()) as log:
            _copy_kernel[(3,)](memory[:12], memory[offset:].view(torch.int16)[::2], 12, 4, 4)
        assert log.kinds == expected


def test_what_nobody_has_written():
    with interleaved(Schedule()) as log:
        source = torch.empty(12)
        _copy_kernel[(2,)](torch.ones(12), source, 12, 4, 4)
        _copy_kernel[(2,)](source, torch.empty(12), 12, 4, 4)
        assert not log.findings
        _copy_kernel[(3,)](source, torch.empty(12), 12, 4, 4)
        assert source[8:].isnan().all()
        _copy_kernel[(3,)](source.zero_(), torch.empty(12), 12, 4, 4)
    ((finding, example),) = log.findings.items()
    assert finding.kind == "uninitialised"
    assert example.startswith("source + 8: load at test_interleaving.py:")


def test_what_is_not_the_launch_s():
    with interleaved(Schedule()), pytest.raises(IndexError, match=r"store at .*, outside the launch's arguments"):
        _copy_kernel[(3,)](torch.ones(12), torch.empty(11), 12, 4, 4)


@triton.jit
def _return_kernel(x, BARRIER: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(x + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + 4 + i, tl.load(x + 3 - i))


def test_a_program_meets_its_own_stores_behind_a_barrier():
    for barrier, expected in ((True, set()), (False, {"no barrier"})):
        with interleaved(Schedule()) as log:
            _return_kernel[(1,)](torch.empty(8), barrier)
        assert log.kinds == expected


@triton.jit
def _increment_kernel(x, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(x, 1, sem="relaxed")
    else:
        tl.store(x, tl.load(x) + 1)


@pytest.mark.parametrize(
    "schedule", [Schedule("oldest"), Schedule("turns"), Schedule("random", 4, "shuffled")], ids=str
)
def test_a_lost_update_is_a_race_even_where_none_is_lost(schedule):
    for atomic in (True, False):
        x = integers(1)
        with interleaved(schedule) as log:
            _increment_kernel[(9,)](x, atomic)
        assert log.kinds == (set() if atomic else {"race"})
        if atomic or schedule.pick == "oldest":
            assert x.item() == 9
        else:
            assert x.item() < 9


@triton.jit
def _order_kernel(turns, out, steps):
    """Who was there, step by step."""
    for _ in range(steps):
        tl.store(out + tl.atomic_add(turns, 1, sem="relaxed"), tl.program_id(0))


def order(schedule, programs=6, steps=3):
    out = integers(programs * steps)
    with interleaved(schedule) as log:
        _order_kernel[(programs,)](integers(1), out, steps)
    assert not log.findings
    assert [launch[:3] for launch in log.launches] == [("_order_kernel", programs, 2 * programs * steps)]
    assert log.launches[0].switches >= programs
    return out.tolist()


def test_who_goes_on():
    programs = list(range(6))
    assert order(Schedule("oldest")) == [p for p in programs for _ in range(3)]
    assert order(Schedule("newest", dispatch="backward")) == [p for p in programs for _ in range(3)]
    assert order(Schedule("oldest", 1, "backward")) == [p for p in reversed(programs) for _ in range(3)]
    assert order(Schedule("turns")) == programs * 3
    assert order(Schedule("turns", 2)) == [p for first in (0, 2, 4) for p in (first, first + 1) * 3]
    starved = order(Schedule("starve"))
    assert starved[-3:] == [starved[-1]] * 3


@pytest.mark.parametrize("pick", ["random", "starve", "priorities"])
def test_a_seed_is_an_order(pick):
    orders = [order(Schedule(pick, 4, "shuffled", seed)) for seed in range(4)]
    assert len(set(map(tuple, orders))) == 4
    assert orders == [order(Schedule(pick, 4, "shuffled", seed)) for seed in range(4)]


@triton.jit
def _failing_kernel(out):
    tl.store(out + tl.program_id(0), 1)
    tl.store(out + 3, 1 // 0)


def test_a_kernel_s_error_ends_its_launch():
    with interleaved(Schedule("turns")) as log, pytest.raises(ZeroDivisionError):
        _failing_kernel[(3,)](integers(9))
    assert not log.launches
    with pytest.raises(ValueError, match="a schedule picks by"), interleaved(Schedule("best")):
        _order_kernel[(3,)](integers(1), integers(9), 3)
