"""The ticketed kernels: the order of their work, several slices and one, agreement with the separate launches."""

from importlib import import_module
from itertools import permutations

import pytest
import torch
import triton
import triton.language as tl
from covering import covering
from oracle import FORMS, LAYOUTS, TOLERANCE, assert_close, problem, run
from resfused.kernels.geometry import Geometry
from resfused.kernels.gpu import launch_table
from resfused.kernels.gpu.tickets import take_turn

import resfused.functional as fused
from resfused import reference


@triton.jit
def _turns_kernel(counters, out, programs, slice_blocks, channel_blocks):
    """What each program is given to do, by ticket."""
    second, channel_block, program = take_turn(counters, programs, slice_blocks, channel_blocks)
    ticket = tl.program_id(0)
    tl.store(out + 3 * ticket, second.to(tl.int32))
    tl.store(out + 3 * ticket + 1, channel_block)
    tl.store(out + 3 * ticket + 2, program)


@pytest.mark.interpreter
@pytest.mark.parametrize(("programs", "slice_blocks", "channel_blocks"), [(3, 2, 5), (2, 4, 4), (1, 1, 3), (4, 3, 1)])
def test_order_of_the_work(programs, slice_blocks, channel_blocks):
    """Everything exactly once, and no second phase before all of its block's first phase: what rules out deadlock."""
    slices = -(-channel_blocks // slice_blocks)
    grid = 2 * slices * slice_blocks * programs
    out = torch.full((grid, 3), -1, dtype=torch.int32)
    _turns_kernel[(grid,)](torch.zeros(1, dtype=torch.int32), out, programs, slice_blocks, channel_blocks)
    turns = [tuple(row) for row in out.tolist() if row[1] < channel_blocks]
    expected = {(s, b, p) for s in (0, 1) for b in range(channel_blocks) for p in range(programs)}
    assert len(turns) == len(expected)
    assert set(turns) == expected
    for second, block, program in turns:
        if second:
            before = turns[: turns.index((second, block, program))]
            assert {(0, block, p) for p in range(programs)} <= set(before)


L2_BYTES = {"one slice": 0, "narrow slices": 2**11, "wide slices": 2**14}


@covering(form=FORMS, layout=LAYOUTS, slices=L2_BYTES)
def test_values(form, layout, slices, device, small_launches, monkeypatch):
    monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", launch_table.EVERY_NODE)
    monkeypatch.setattr(launch_table, "l2_bytes", lambda device: L2_BYTES[slices])
    for shape, dtype in (((2, 75, 3, 5), torch.float64), ((3, 40, 4, 4), torch.float32), ((6, 1, 3, 2), torch.float64)):
        p = problem(form, shape, dtype, device, layout=layout)
        assert_close(run(fused, p), run(reference, p, torch.float64), TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_agreement_with_separate_launches(form, layout, device, monkeypatch):
    """To the rounding of differently grouped sums."""
    p = problem(form, (4, 20, 6, 6), torch.float32, device, layout=layout)
    monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", launch_table.NO_NODE)
    separate = run(fused, p)
    monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", launch_table.EVERY_NODE)
    ticketed = run(fused, p)
    assert_close(ticketed, separate, 1e-6)


def test_one_launch_is_one_launch(device, monkeypatch):
    """Forward and backward, each one kernel."""
    monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", launch_table.EVERY_NODE)
    launched = []

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("statistics", "normalise", "forward", "reduce", "apply", "backward"):
        module = import_module(f"resfused.kernels.gpu.{name}")
        for name in [name for name in dir(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(name, getattr(module, name)))
    for form in FORMS:
        launched.clear()
        run(fused, problem(form, (2, 8, 3, 3), torch.float32, device))
        assert launched == ["_forward_kernel", "_backward_kernel"]


def test_slices_follow_the_cache():
    """Two slices fit the cache's share; where not even the narrowest does, one slice holds everything."""
    for g in (Geometry(True, 1, 12544, 2048), Geometry(False, 256, 49, 2048), Geometry(True, 1, 50176, 1024)):
        launch = launch_table.ticketed("forward", g, 2, 50 * 2**20)
        assert 1 < launch.slice_blocks < launch.channel_blocks
        width = launch.slice_blocks * launch.block_channels
        assert 2 * width * g.values * 2 <= launch_table.L2_SHARE * 50 * 2**20
        assert not g.channels_last or width * 2 >= launch_table.LEAST_SLICE
    launch = launch_table.ticketed("forward", Geometry(True, 1, 256 * 112 * 112, 64), 2, 50 * 2**20)
    assert launch.slice_blocks == launch.channel_blocks


def test_ways_to_launch_may_not_change_between_forward_and_backward(device, monkeypatch):
    """The mask is read as it was written, small planes and all."""
    p = problem(FORMS[1], (40, 3, 7, 7), torch.float64, device)
    expected = run(reference, p, torch.float64)["gradient of residual"]
    for first, second in permutations((launch_table.EVERY_NODE, launch_table.NO_NODE)):
        x, r = (p.tensors[name].clone().requires_grad_() for name in ("input", "residual"))
        monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", first)
        y = fused.batch_norm_add_relu(x, r, None, None, p.tensors["weight"], p.tensors["bias"], True, eps=0.1)
        monkeypatch.setattr(launch_table, "ONE_LAUNCH_ELEMENTS", second)
        (gradient,) = torch.autograd.grad(y, r, p.dy)
        assert_close({"r": gradient}, {"r": expected}, 1e-12)
