"""Every kernel with its programs interleaved: no race, and bit for bit what one program after the other computes."""

import pytest
import torch
from interleaved_cases import BY_COLUMNS, SCHEDULES, SHAPES_IN_GROUPS, kept_zeros, node
from interleaving import interleaved
from oracle import FORMS, LAYOUTS, run
from resfused.kernels import gpu
from resfused.kernels.geometry import geometry
from resfused.kernels.gpu import launch_table

import resfused.functional as fused

pytestmark = pytest.mark.interpreter
ONE_LAUNCH = {"_forward_kernel", "_backward_kernel"}
SEPARATE = {"_statistics_kernel", "_normalise_kernel", "_reduce_kernel", "_apply_kernel"}


@pytest.fixture(autouse=True)
def _counters_are_left_zero():
    with kept_zeros() as kept:
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
def test_one_launch(form, layout, small_launches):
    with launch_table.using(ONE_LAUNCH_ELEMENTS=launch_table.EVERY_NODE, l2_bytes=lambda device: 2**11):
        assert agree(run, fused, node(form, layout)) == ONE_LAUNCH


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_separate_launches(form, layout, small_launches):
    with launch_table.using(ONE_LAUNCH_ELEMENTS=launch_table.NO_NODE):
        assert agree(run, fused, node(form, layout)) == SEPARATE


@pytest.mark.parametrize("form", FORMS[::2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merges_in_groups(form, layout, small_launches):
    p = node(form, layout, SHAPES_IN_GROUPS)
    g, norms = geometry(p.tensors["input"]), 1 if form == FORMS[0] else 2
    for kernel in ("statistics", "reduce"):
        assert launch_table.streaming(kernel, g, norms=norms).programs > launch_table.MERGED_PROGRAMS
    assert agree(run, fused, p) == SEPARATE


@pytest.mark.parametrize("form", FORMS[::2])
def test_by_columns(form, small_launches):
    """Channels that lie in several blocks."""
    p = node(form, BY_COLUMNS)
    assert geometry(p.tensors["input"]).plane > 1
    assert agree(run, fused, p, schedules=SCHEDULES[1:]) == SEPARATE


def test_groups_of_images_side_by_side(small_launches):
    assert agree(run, fused, node(FORMS[2], (8, 6, 2, 5)), schedules=SCHEDULES[2:]) == SEPARATE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen(layout, small_launches):
    """All gradients without waiting for a sum."""
    names = agree(run, fused, node(FORMS[2], layout, training=False), schedules=SCHEDULES[2:])
    assert names == {"_normalise_kernel", "_reduce_kernel"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_for_several_processes(layout, small_launches):
    p = node(FORMS[2], layout)

    def statistics():
        return {"(mean, M2) twice": gpu.local_statistics(p.tensors["input"], p.tensors["residual"], True)}

    assert agree(statistics, schedules=SCHEDULES[2:]) == {"_statistics_kernel"}
