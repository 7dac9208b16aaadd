"""What networks of the zoo write that blocks of ResNets do not: each in few lines, fused as it is or left."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from parts import ADD, ADD_NORM, ALONE, CHANNELS, RELU, SUM_NORM, Parts, conv, forms, fused_like_plain, norm
from torch import nn

import resfused
from resfused import Fused
from resfused.conversion.fused_forward import FusedForward

INPUT = (2, CHANNELS, 4, 4)


def onto_a_fresh_sum(self, x):
    out = self.conv1(x) + x
    out += self.b(x)
    return self.relu(out)


def onto_sums_in_place(self, x):
    out = self.conv1(x) * 2
    out += x
    out += self.b(x)
    return self.relu(out)


def not_in_place(self, x):
    out = self.conv1(x) + x
    return self.relu(out + self.b(x))


def norm_first(self, x):
    return self.relu((self.b(x) + x) + self.conv1(x))


def three_norms(self, x):
    """As RepVGG's block: the identity's norm is computed first and added last."""
    identity = self.bn3(x)
    out = self.a(x) + self.b(x)
    out += identity
    return self.relu(out)


def from_zero(self, x):
    out = 0
    out += self.a(x)
    return self.relu(out)


def two_from_zero(self, x):
    out = 0
    for branch in (self.a, self.b):
        out += branch(x)
    return self.relu(out)


def dropped_out(self, x):
    return self.relu(self.dropout(self.a(x)) + x)


def functionally_dropped_out(self, x):
    return self.relu(F.dropout(self.a(x), 0.0) + x)


def others_in_place(self, x):
    """As GhostNet: ReLUs of other values, in place, between a norm and its own."""
    first = self.conv1(x)
    out = self.b(x)
    first = F.relu_(first)
    return self.relu(out) + first


def asserting(self, x):
    out = self.a(x)
    torch._assert(out.ndim == 4, "4D")
    return self.relu(out)


FUSED = {
    "+= onto a fresh sum": (onto_a_fresh_sum, [ADD]),
    "+= onto sums in place": (onto_sums_in_place, [ADD]),
    "+ onto a fresh sum": (not_in_place, [ADD]),
    "a norm before other addends": (norm_first, [ADD]),
    "three norms": (three_norms, [ADD, SUM_NORM]),
    "0 + norm": (from_zero, [RELU]),
    "0 + norm + norm": (two_from_zero, [ADD_NORM]),
    "dropout of nothing": (dropped_out, [ADD]),
    "F.dropout of nothing": (functionally_dropped_out, [ADD]),
    "others changed in place": (others_in_place, [RELU]),
    "its shape asked for": (asserting, [RELU]),
}


@pytest.mark.parametrize("name", FUSED)
def test_is_fused(name, device):
    code, expected = FUSED[name]
    model = Parts(code)
    model.bn3, model.dropout = norm(), nn.Dropout(0.0)
    report = fused_like_plain(model, device)
    assert forms(report) == expected
    check = report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device))
    assert check.places == (len(expected), len(expected))
    assert not check.idle


def onto_the_input(self, x):
    x += self.a(x)
    return self.relu(x)


def onto_a_view(self, x):
    out = self.conv1(x)
    view = out.view_as(out)
    view += self.b(x)
    return self.relu(view), out


def what_it_reads_changed(self, x):
    first = self.conv1(x)
    view = first.view_as(first)
    out = self.bn2(view)
    F.relu_(first)
    return self.relu(out) + view


def what_was_made_for_it_changed(self, x):
    first = self.conv1(x)
    out = self.bn2(first)
    F.relu_(first)
    return self.relu(out) + first


LEFT = [onto_the_input, onto_a_view, what_it_reads_changed, what_was_made_for_it_changed]


@pytest.mark.parametrize("code", LEFT)
def test_what_others_hold_is_left(code, device):
    """The norm alone is fused, where it is."""
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    model = Parts(code, nn.ReLU()).to(device, torch.float64)
    plain = Parts(code, nn.ReLU()).to(device, torch.float64)
    plain.load_state_dict(model.state_dict())
    assert forms(resfused.fuse_(model)) == [ALONE]
    with torch.no_grad():
        for actual, expected in zip(model(x.clone()), plain(x.clone()), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_dropout_that_drops_is_left_in_training(device):
    """Fused in evaluation, where it does nothing; and once its probability is another, as it is there."""
    model = Parts(dropped_out)
    model.dropout = nn.Dropout(0.5)
    report = resfused.fuse_(model.to(device, torch.float64))
    assert [(e.form, e.in_training, e.in_evaluation) for e in report.fused] == [
        (ALONE, True, False),
        (ADD, False, True),
    ]
    assert str(report).splitlines()[0] == "1 of 2 norms fused in 1 place"
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    assert report.check(model, x).places == (1, 1)
    model.dropout.p = 0.0
    report = resfused.fuse_(model)
    assert forms(report) == [ADD]
    assert report.check(model, x).places == (1, 1)
    model.dropout.p = 0.5
    check = report.check(model, x)
    assert check.places == (0, 0)
    assert "dropout has changed since fuse_: its p is another" in str(check)


class CountedNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d without an activation."""

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


@pytest.mark.parametrize("kind", [CountedNorm, nn.BatchNorm2d])
def test_two_norms_that_count(kind, device):
    model = Parts(lambda self, x: F.relu(self.a(x) + self.b(x)))
    model.bn1, model.bn2 = kind(CHANNELS), kind(CHANNELS)
    report = fused_like_plain(model, device)
    assert [(e.form, e.norms, e.in_training, e.in_evaluation) for e in report.fused] == [
        (ADD_NORM, ("bn1", "bn2"), True, True)
    ]
    x = torch.randn(INPUT, dtype=torch.float64, device=device)
    assert report.check(model, x).norms == ("bn1", "bn2")


class Body(nn.ModuleDict):
    """As torchvision's IntermediateLayerGetter."""

    def forward(self, x):
        found = {}
        for name, module in self.items():
            x = module(x)
            found[name] = x
        return found["relu"]


class Features(nn.ModuleList):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def residual():
    return Parts(lambda self, x: F.relu(self.b(F.relu(self.a(x))) + x))


def test_containers_with_a_forward(device):
    """Their norms are fused, and pairs handed on in them."""
    for model in (
        Body({"conv1": conv(), "bn1": norm(), "relu": nn.ReLU()}),
        Features([conv(), norm(), nn.ReLU(), residual(), residual()]),
    ):
        report = fused_like_plain(model, device)
        assert not report.left
        assert sum(entry.forked for entry in report.fused) == (2 if isinstance(model, Features) else 0)
        assert not report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device)).idle


class Mixer(nn.Module):
    """A shortcut that nothing follows."""

    def __init__(self):
        super().__init__()
        self.fn = nn.Sequential(conv(), nn.GELU(), norm())

    def forward(self, x):
        return self.fn(x) + x


def test_no_forward_is_replaced_where_nothing_is_fused(device):
    def replaced(model):
        return {name for name, each in model.named_modules() if isinstance(vars(each).get("forward"), FusedForward)}

    model = nn.Sequential(nn.Sequential(Mixer(), conv(), nn.GELU(), norm()), nn.Sequential(Mixer(), conv()))
    assert not resfused.fuse_(model, lambda norm, name: False).fused
    assert not replaced(model)
    # Where something is, those that have no part in it are left alone.
    model = nn.Sequential(nn.Sequential(residual(), residual()), nn.Sequential(Mixer(), Mixer()))
    report = resfused.fuse_(model, lambda norm, name: name.startswith("0"))
    assert sum(entry.forked for entry in report.fused) == 2
    assert replaced(model) == {"", "0", "0.0", "0.1", "1", "1.0"}


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return x * x.new_ones(1) if self.training else x


def test_a_norm_in_two_forms_is_one_norm(device):
    """As timm's BasicBlock with drop path."""

    def code(self, x):
        y = self.drop(self.a(x))
        y += self.b(x)
        return F.relu(y)

    model = Parts(code)
    model.drop = OnlyInTraining()
    report = fused_like_plain(model, device)
    assert [(e.form, e.norms, e.in_training, e.in_evaluation) for e in report.fused] == [
        (ADD, ("bn2",), True, False),
        (ALONE, ("bn1",), True, False),
        (ADD_NORM, ("bn1", "bn2"), False, True),
    ]
    assert str(report).splitlines()[0] == "2 of 2 norms fused in 2 places"
    assert report.check(model, torch.randn(INPUT, dtype=torch.float64, device=device)).places == (2, 1)


def test_lazy_norms():
    model = nn.Sequential(conv(), nn.LazyBatchNorm2d(), nn.ReLU())
    assert resfused.fuse_(model).left[0].reason == "it is lazy: run the model once before"


class FrozenBatchNorm2d(nn.Module):
    """By its name one of those that are neither trained nor updated; its code is another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(CHANNELS))

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


def test_norms_that_are_none_of_pytorchs_are_told():
    report = resfused.fuse_(nn.Sequential(conv(), FrozenBatchNorm2d(), nn.ReLU()))
    (left,) = report.left
    assert left.norm == "1"
    assert left.reason.startswith("the forward of its class FrozenBatchNorm2d has neither")


def test_script_says_what_to_do():
    model = nn.Sequential(conv(), norm(), nn.ReLU())
    resfused.fuse_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AttributeError, match=r"call resfused\.unfuse_\(model\) before"):
            torch.jit.script(model)
        resfused.unfuse_(model)
        torch.jit.script(model)


def test_quantisation_after_fuse_warns(device):
    model = nn.Sequential(conv(), norm(), nn.ReLU()).to(device)
    resfused.fuse_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        prepared = torch.ao.quantization.prepare_qat(model.train())
    with pytest.warns(UserWarning, match="nothing is fused any more"):
        prepared(torch.randn(INPUT, device=device))


def test_reports_are_printed_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    print(resfused.fuse_(nn.Sequential(conv(), norm(), nn.ReLU())))
    assert capsys.readouterr().out.startswith("1 of 1 norm fused in 1 place\n")


def test_long_lists_are_grouped_by_reason():
    model = nn.Sequential(*(m for _ in range(40) for m in (conv(), norm(), nn.GELU())))
    report = resfused.fuse_(model, lambda norm, name: False)
    lines = report.table().splitlines()
    assert any("40 filter_fn refuses it" in " ".join(line.split()) for line in lines)
    assert len(lines) < 12
    assert all(f" {name}" in report.table() for name in (entry.norm for entry in report.left))


def test_places_are_what_they_were():
    """The sixth field has a default: who made reports by hand still can."""
    assert Fused("", RELU, ("bn",), False, True).in_evaluation
