"""Merges by the last program to arrive: their counters, by stream and while a graph is captured; groups and shares."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from resfused.kernels.geometry import Geometry
from resfused.kernels.gpu import launch_table, merging

MERGE = launch_table.Merge(64, 1024, 40)


@pytest.fixture
def compiled(monkeypatch):
    """As where kernels are compiled, on a GPU: which stream is current, whether it is captured; zeros are the CPU's."""
    current = SimpleNamespace(stream=0, captured=False)
    zeros = torch.zeros
    monkeypatch.setattr(merging, "_INTERPRETED", False)
    monkeypatch.setattr(
        merging, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: current.stream))
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.captured)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    merging._kept.cache_clear()
    yield current
    merging._kept.cache_clear()


def counters(count=40, index=0):
    return merging.counters_for(MERGE._replace(counters=count), torch.device("cuda", index))


def test_a_stream_s_launches_share_counters(compiled):
    first = counters()
    assert first.dtype is torch.int32
    assert first.numel() >= 40
    assert not first.any()
    assert counters(41) is first
    assert counters(10**5).numel() >= 10**5


def test_streams_share_no_counters(compiled):
    found = [counters(), counters(index=1)]
    compiled.stream = 7
    found += [counters(), counters(index=1)]
    assert len({each.data_ptr() for each in found}) == 4


def test_a_captured_launch_has_counters_of_its_own(compiled):
    """A replay may run beside launches on any stream; what a capture has cleared is not yet."""
    kept = counters()
    compiled.captured = True
    first, second = counters(), counters()
    assert len({each.data_ptr() for each in (kept, first, second)}) == 3
    compiled.captured = False
    assert counters() is kept


def test_the_interpreter_keeps_none(compiled, monkeypatch):
    """Where a launch may be interrupted, and leave its counters as they were."""
    monkeypatch.setattr(merging, "_INTERPRETED", True)
    assert counters() is not counters()


@pytest.mark.parametrize("programs", [1, 32, 33, 528])
def test_a_counter_for_each_share_and_each_group(programs):
    blocks, groups = 3, -(-programs // launch_table.MERGED_PROGRAMS)
    found = launch_table._merge(Geometry(True, 1, 10**6, 130), 64, programs, False, 2)
    assert found == (64, launch_table.MERGED_ELEMENTS, 2 * (blocks + blocks * groups))


@pytest.mark.parametrize(("plane", "channels"), [(49, 2), (64, 1), (196, 1), (9, 8)])
def test_a_share_covers_a_block_of_columns(plane, channels):
    """So that no block has some of more than two."""
    found = launch_table._merge(Geometry(True, 1, 256, 512 * plane, plane), 64, 4, False, 1)
    assert found.channels == channels
    assert channels * plane >= 64
