"""The command ``memory``: what it counts, blocks that are checkpointed, its plot."""

import copy

import pytest
import small_networks
import torch
from measure import step_memory
from measure.network_timing import CHECKPOINT, OURS, TRAINING, WAYS, Judge, Workload
from record.results import Results, StepMemory
from report.plots import write_plots
from torch import nn
from workloads import zoo
from workloads.checkpointed import checkpointed
from workloads.detection import Detector, with_frozen_norms

import resfused

MADE = {"gpu": None, "torch": "2.14", "triton": "3.8", "commit": "abc"}


def test_bytes_on_a_cpu():
    """Of what is held at the end, and the most at once; not of what was there before."""
    x = torch.ones(8000)

    def call():
        return x.clone()[:500].clone()

    assert step_memory._on_a_cpu(call) == (500 * 4, 8500 * 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x).sin()


def test_checkpointed_blocks():
    """Each is called once more in the backward, whatever PyTorch's own module holds it; gradients are the same."""
    plain = nn.Sequential(nn.Linear(2, 3), nn.Sequential(Block(), nn.ReLU()), Block())
    network = checkpointed(copy.deepcopy(plain))
    x = torch.randn(4, 2)
    for each in (plain, network):
        each(x).sum().backward()
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    assert [block.calls for block in blocks] == [2, 2]
    for p, q in zip(plain.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_table_and_plot(tmp_path):
    found = [
        StepMemory([ms], "torchvision/resnet50", 16, 160, "float32", way, live * 2**20, 2 * live * 2**20, 1e-6)
        for way, ms, live in (("eager", 100.0, 50), ("resfused, recomputation", 80.0, 20))
    ]
    table = step_memory.table(found, "title")
    assert table.rows[1][4:] == ("20.0", "0.40", "40.0", "0.40", "80.0", "0.80")
    assert len({len(row) for row in table.rows} | {len(table.keys) + len(table.values)}) == 1
    written = write_plots(Results("a CPU", [MADE], found, tmp_path / "cpu"), tmp_path / "cpu")
    assert [path.name for path in written] == ["cpu-memory-against-time.png"]
    assert written[0].stat().st_size > 0


def test_a_detector_is_one_network(monkeypatch):
    """Its losses are its logits; of its layers those train that do, and its blocks are those of its features."""
    if not zoo.torchvision().extension._has_ops():
        pytest.skip("torchvision's own operators are not there beside this torch")
    small = zoo.Entry(lambda: Detector(with_frozen_norms(zoo.torchvision(), "fasterrcnn_resnet50_fpn", "resnet18")))
    monkeypatch.setitem(zoo.SMALL, "small/detector", small)
    workload = Workload("small/detector", TRAINING, 2, 96, "float32")
    judge = Judge(workload, torch.device("cpu"))
    with small_networks.counted() as ran, resfused.use_backend("native"):
        step = judge.step(WAYS[OURS])
        error, limit = judge.verdict(step)
        step.run()
    assert error <= limit
    # The stem and the first stage, which are not trained, have no backward.
    assert ran == [2 * 17, 2 * 12, 2 * 3]
    checkpoints = judge.step(WAYS[CHECKPOINT])._model
    assert sum("forward" in vars(m) for m in checkpoints.modules()) == 8
