"""Every kernel with its programs interleaved: no race, and bit for bit what one program after the other computes."""

import sys

import pytest
import torch
from interleaved_cases import SCHEDULES, node
from interleaving import interleaved
from oracle import FORMS, LAYOUTS, run
from resfused.kernels import gpu
from resfused.kernels.gpu import launch_table
from triton.runtime.interpreter import InterpretedFunction

import resfused.functional as fused

pytestmark = pytest.mark.interpreter
ONE_LAUNCH = {"_forward_kernel", "_backward_kernel"}
STREAMING = {"_statistics_kernel", "_normalise_kernel", "_reduce_kernel", "_apply_kernel"}
KERNELS = {
    name
    for module in [module for name, module in sys.modules.items() if name.startswith("resfused.kernels.gpu.")]
    for name, value in vars(module).items()
    if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
}


@pytest.fixture
def kept_zeros(monkeypatch):
    """Zeros that a launch asks for are kept for the next, as on a GPU: it has to leave them zero."""
    zeros, kept = torch.zeros, {}

    def once(count, **options):
        if count not in kept:
            kept[count] = zeros(count, **options)
        return kept[count]

    monkeypatch.setattr(torch, "zeros", once)
    yield
    assert not any(each.any() for each in kept.values())


def agree(function, *arguments, schedules=SCHEDULES):
    """Returns the kernels launched. What a launch leaves behind, the next schedule's finds."""
    expected = function(*arguments)
    names = set()
    for schedule in schedules:
        with interleaved(schedule) as log:
            found = function(*arguments)
        assert not log.findings, f"{schedule}\n{log}"
        assert all(torch.equal(found[name], expected[name]) for name in expected), schedule
        names |= {launch.kernel for launch in log.launches}
    return names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch(form, layout, small_launches, kept_zeros):
    with launch_table.using(ONE_LAUNCH_ELEMENTS=launch_table.EVERY_NODE, l2_bytes=lambda device: 2**11):
        assert agree(run, fused, node(form, layout)) == ONE_LAUNCH


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_separate_launches(form, layout, small_launches, kept_zeros):
    with launch_table.using(ONE_LAUNCH_ELEMENTS=launch_table.NO_NODE):
        assert STREAMING <= agree(run, fused, node(form, layout)) <= KERNELS - ONE_LAUNCH


def test_by_columns(small_launches, kept_zeros):
    """The merges are launches of their own."""
    assert agree(run, fused, node(FORMS[2], (17, 3, 3, 3)), schedules=SCHEDULES[2:]) == KERNELS - ONE_LAUNCH


def test_groups_side_by_side(small_launches, kept_zeros):
    assert agree(run, fused, node(FORMS[2], (8, 6, 2, 5)), schedules=SCHEDULES[2:]) >= STREAMING


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen(layout, small_launches, kept_zeros):
    """All gradients without waiting for a sum."""
    names = agree(run, fused, node(FORMS[2], layout, training=False), schedules=SCHEDULES[2:])
    assert {"_normalise_kernel", "_reduce_kernel"} <= names < KERNELS - ONE_LAUNCH


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_for_several_processes(layout, small_launches, kept_zeros):
    p = node(FORMS[2], layout)

    def statistics():
        return {"(mean, M2) twice": gpu.local_statistics(p.tensors["input"], p.tensors["residual"], True)}

    assert "_statistics_kernel" in agree(statistics, schedules=SCHEDULES[2:])
