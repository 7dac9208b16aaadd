"""What ``fuse_`` says of a model: in short, in full, and in the model's own repr."""

import copy
import pickle
import sys

import pytest
import torch
from small_networks import BasicBlock, chain
from torch import nn

import resfused
from resfused import Fused, Left, Report

FORMS = ("norm+relu", "norm+add+relu", "norm+add(norm)+relu")


class InvertedResidual(nn.Module):
    """A class whose name takes "an", with code that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(x) + torch.zeros(())


def report_of_everything() -> Report:
    """Every form, handed on or not, in training or not, and more reasons than are told."""
    fused = [
        Fused(f"block{i}", form, (f"block{i}.bn",), forked, in_training)
        for i, (form, forked, in_training) in enumerate((f, p, t) for f in FORMS for p in (0, 1) for t in (0, 1))
    ]
    left = [Left(f"layer{i}.{j}.bn", f"reason {i}") for i in range(7) for j in range(7 - i)]
    return Report(tuple(fused), tuple(left))


@pytest.mark.parametrize("on_kernels", [True, False])
def test_in_short_is_at_most_15_lines(on_kernels):
    lines = str(Report(report_of_everything().fused, report_of_everything().left, on_kernels)).splitlines()
    assert len(lines) <= 15
    assert lines[0] == "6 of 34 norms fused in 6 places in training, 12 in 12 places in evaluation"
    assert "     7 reason 0" in lines
    assert "       layer0.0.bn, layer0.1.bn, layer0.2.bn and 4 more" in lines
    assert lines[-1] == "     6 for 3 other reasons: see table()"


def test_passes_are_named_only_where_they_are_saved(monkeypatch):
    monkeypatch.setattr("resfused.conversion.fuse.backend_for", lambda x: "triton")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert str(resfused.fuse_(model)).splitlines() == [
        "1 of 1 norm fused in 1 place",
        "     1 norm+relu: 8 passes over memory a training step, not 13",
    ]
    monkeypatch.undo()
    with resfused.use_backend("torch"):
        report = resfused.fuse_(model)
    assert "passes" not in str(report)
    assert "PyTorch's own operators run" in str(report)
    assert "none here" in report.table()


def test_same_reasons_of_other_modules_are_one():
    lines = str(resfused.fuse_(nn.Sequential(*(InvertedResidual() for _ in range(4))))).splitlines()
    assert lines == [
        "0 of 4 norms fused in 0 places",
        "left as they are:",
        "     4 an InvertedResidual, cannot be traced: it calls zeros, which does not depend on its input",
        "       0.bn, 1.bn, 2.bn and 1 more",
    ]


def test_many_forms_are_at_most_15_lines():
    names = ("", "+relu", "+silu", "+relu6", "+gelu", "+sigmoid", "+hardswish")
    fused = [Fused("", f"norm{a}", (f"bn{a}{i}",), False, True) for i, a in enumerate(names) for _ in range(i + 1)]
    lines = str(Report(tuple(fused), report_of_everything().left)).splitlines()
    assert len(lines) <= 15
    assert "     7 norm+hardswish: 8 passes over memory a training step, not 13" in lines
    assert "     3 of 2 other forms: see table()" in lines
    assert lines[-1].endswith("other reasons: see table()")


def test_passes_of_every_form():
    """As they are counted; a norm alone saves none."""
    saved = {
        "norm": 0,
        "norm+add": 2,
        "norm+add(norm)": 6,
        "norm+silu": 5,
        "norm+add+relu6": 5.875,
        "norm+add+silu": 5,
        "norm+add(norm)+gelu_tanh": 11,
    }
    for form, passes in saved.items():
        assert Fused("", form, ("bn",), False, True).passes_saved == passes
    assert Fused("", "norm+add", ("bn",), True, True).passes_saved == 3


def test_the_table_has_every_place_and_every_reason(monkeypatch):
    """Also where rich is not installed."""
    monkeypatch.setitem(sys.modules, "rich", None)
    report = report_of_everything()
    lines = report.table().splitlines()
    for entry in report.fused:
        assert any(line.split()[0] == entry.module and entry.norms[0] in line for line in lines[1:] if line)
    for each in report.left:
        at = next(i for i, line in enumerate(lines) if line.split()[1:] == each.reason.split())
        assert each.norm in lines[at + 1].replace(",", "").split()


def test_the_repr_says_what_is_fused():
    model = chain()
    before = repr(model)
    resfused.fuse_(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "fused: norm+relu (bn1), norm+add(norm)+relu (bn2, downsample.1)" in repr(twin)
        assert twin.layer1[0].extra_repr() == "fused: norm+relu (bn1), norm+add+relu (bn2)"
    resfused.unfuse_(model)
    assert repr(model) == before
    assert "fused" in repr(twin)


def test_the_repr_follows_the_module():
    """A copy's line is about the copy; its class says what it said before."""
    block = BasicBlock(4, 4)
    resfused.fuse_(block)
    twin = copy.deepcopy(block)
    twin.relu.register_forward_hook(lambda module, args, output: None)
    assert "fused: no more" in repr(twin)
    assert "fused: norm+relu" in repr(block)

    class Named(BasicBlock):
        def extra_repr(self):
            return "its own"

    named = Named(4, 4)
    resfused.fuse_(named)
    assert named.extra_repr().splitlines() == ["its own", "fused: norm+relu (bn1), norm+add+relu (bn2)"]
