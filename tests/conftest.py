"""Picks the device before the first import: a GPU where there is one, else the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from covering import LAUNCHES
from workloads.interpreter import speed_up

from resfused import backend

speed_up()
# oneDNN's backward of a strided 1x1 convolution of fewer than 8 channels writes beyond its memory (torch 2.14, AVX2).
torch.backends.mkldnn.set_flags(False)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def in_cpp(monkeypatch):
    """CPU tensors take the kernels in C++, as where nobody asks for the interpreter; child processes' too."""
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    if not torch.cuda.is_available():
        monkeypatch.setenv("RESFUSED_BACKEND", "native")


@pytest.fixture
def small_launches():
    """Tiles and grids so small that every loop turns, every tail is ragged and every merge has parts."""
    from resfused.kernels import geometry
    from resfused.kernels.gpu import launch_table

    entry = launch_table.Entry(elements=64, inner=16, programs=12, warps=1, stages=2)
    small = launch_table.using(
        STREAMING=dict.fromkeys(launch_table.STREAMING, ((None, entry),)),
        TICKETED=dict.fromkeys(launch_table.TICKETED, entry),
        MULTIPROCESSORS=1,
        MERGED_ELEMENTS=32,
        MERGED_PROGRAMS=2,
        CHANNEL_MAJOR=True,
    )
    with small, mock.patch.multiple(geometry, COLUMNS_LEAST_IMAGES=4, COLUMNS_ROW=16):
        yield


@pytest.fixture(params=LAUNCHES)
def launches(request):
    """Both ways to launch a training node."""
    from resfused.kernels.gpu import launch_table

    nodes = launch_table.EVERY_NODE if request.param == "one launch" else launch_table.NO_NODE
    with launch_table.using(ONE_LAUNCH_ELEMENTS=nodes):
        yield request.param


def pytest_collection_modifyitems(items):
    on_gpu = torch.cuda.is_available()
    for item in items:
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none"))
        if on_gpu and item.get_closest_marker("interpreter"):
            item.add_marker(pytest.mark.skip(reason="about the interpreter, and here a GPU runs the kernels"))
