"""``report.check``: what of a report ran, and why the rest did not."""

import pytest
import torch
import torch.nn.functional as F
from parts import CHANNELS, Parts
from torch import nn

import resfused

INPUT = (2, CHANNELS, 4, 4)


def residual():
    return Parts(lambda self, x: F.relu(self.b(F.relu(self.a(x))) + x))


def test_it_leaves_the_model_as_it_was(device):
    model = nn.Sequential(residual(), nn.Dropout(0.5)).to(device, torch.float64)
    report = resfused.fuse_(model)
    model[1].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    state = torch.get_rng_state()
    given = x.clone()
    check = report.check(model, x)
    assert check.places == (2, 2)
    assert check.norms == check.norms_in_evaluation == ("0.bn1", "0.bn2")
    assert str(check) == "2 of 2 places ran fused in training, 2 of 2 places ran fused in evaluation"
    assert torch.equal(x, given)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].bn1.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_it_says_why(device):
    model = nn.Sequential(*(residual() for _ in range(6))).to(device, torch.float64)
    report = resfused.fuse_(model)
    model[0].relu = None
    model[1].bn2.register_forward_hook(lambda *_: None)
    resfused.unfuse_(model[2])
    model[3].forward.plans.clear()
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    check = report.check(model, x)
    reasons = {entry.place.norms[0]: entry.reason for entry in check.idle if entry.training}
    assert (
        reasons["1.bn2"] == "bn2 has changed since fuse_: it is no BatchNorm of PyTorch's any more, or a hook is on it"
    )
    assert reasons["2.bn1"] == "the module has no fused forward any more"
    assert "1.bn2" in str(check)
    assert not any(name.startswith(("4", "5", "0")) for name in reasons)


def test_a_place_that_is_not_called(device):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.on = residual(), False

        def forward(self, x):
            return self.block(x) if self.on else x

    model = Skips().to(device, torch.float64)
    report = resfused.fuse_(model)
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    assert {entry.reason for entry in report.check(model, x).idle} == {"the model does not call the module"}


def test_an_addition_that_broadcasts(device):
    model = Parts(lambda self, x: F.relu(self.a(x) + x.mean((2, 3), keepdim=True))).to(device, torch.float64)
    report = resfused.fuse_(model)
    check = report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device))
    assert check.places == (0, 0)
    assert "shapes" in check.idle[0].reason


def test_two_norms_in_different_modes(device):
    """In evaluation one takes the batch's statistics still: it is called as it is."""
    model = Parts(lambda self, x: F.relu(self.a(x) + self.b(x)))
    model.bn2 = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    model = model.to(device, torch.float64)
    check = resfused.fuse_(model).check(model, torch.randn(INPUT, dtype=torch.float64, device=device))
    assert check.places == (1, 0)
    assert check.norms_in_evaluation == ("bn1",)
    assert "modes" in check.idle[0].reason


def test_another_model():
    report = resfused.fuse_(nn.Sequential(residual()))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but got int"):
        report.check(3)
    with pytest.raises(ValueError, match="has no submodule 0"):
        report.check(nn.Identity())
